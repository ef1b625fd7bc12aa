"""A signal at every step of a call, most of them Ctrl-C: whatever is interrupted, everybody else is answered, and the actor goes on.

A signal handler runs where the interpreter looks for one: at the start of a function of Python's, and after a call of one of C's. A profile
function is called at these places, and what it raises is raised there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

from atomr_accel_flashattn import ActorStoppedError, FlashAttnHandle
from atomr_accel_flashattn.actor import Reply
from tests.actor.devices import PATIENCE, until
from tests.actor.fake_gpu import FakeDriver, hold, sent, start

PLACES = ("/actor/", "/concurrent/futures/", "/threading.py", "/queue.py", "/pykka/")  # what an actor consists of
MOST_STEPS = 1000
ELSEWHERE = 70  # a context in which callers launch nothing: requests go through the mailbox
MOMENT = 0.003  # seconds until a launch that is held is finished


def ctrl_c() -> None:
    raise KeyboardInterrupt


class Signal:
    """A profile function that calls ``handler`` once, at step ``step``; ``came`` says where."""

    def __init__(self, step: int, handler: Callable[[], object]) -> None:
        self.left = step
        self.handler = handler
        self.came = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        name = frame.f_code.co_filename
        if self.came or event not in {"call", "c_return"} or "/tests/" in name or not any(place in name for place in PLACES):
            return
        if is_finalizer(frame):  # what it raises goes nowhere
            return
        self.left -= 1
        if self.left < 0:
            self.came = f"{name}:{frame.f_lineno}, {event} {arg or frame.f_code.co_name}"
            self.handler()


def is_finalizer(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def interrupt(work: Callable[[], object], step: int, handler: Callable[[], object] = ctrl_c) -> str:
    """Do ``work`` with a signal at ``step``. Where it came: empty when the work has fewer steps."""
    signal = Signal(step, handler)
    sys.setprofile(signal)
    raised = False
    try:
        work()
    except (KeyboardInterrupt, RuntimeError):  # the latter: threading.Condition had no lock to release
        raised = True
    finally:
        sys.setprofile(None)
    assert raised == (handler is ctrl_c and bool(signal.came)), f"a Ctrl-C at {signal.came} was swallowed"
    return signal.came


class Others:
    """Threads that sleep until ``reply`` is there. Their way does not call the completion thread, which holds a lock while it waits."""

    def __init__(self, reply: Reply) -> None:
        self.woken: list[str] = []
        for way in ("result", "exception"):
            threading.Thread(target=self.sleep, args=(reply, way), daemon=True).start()
        until(lambda: reply._made is not None and len(reply._made._waiters) == 2)  # type: ignore[attr-defined]

    def sleep(self, reply: Reply, way: str) -> None:
        with suppress(CancelledError, ActorStoppedError):
            getattr(Future, way)(reply, 3 * PATIENCE)  # a wait that nobody ends must not look like one that was ended
        self.woken.append(way)


class Scene:
    """An actor on a GPU that is made of Python, the replies that somebody has, and who else sleeps."""

    def __init__(self, cuda: FakeDriver, mailbox_limit: int = 1) -> None:
        self.cuda = cuda
        self.actor: FlashAttnHandle = start(max_in_flight=2, mailbox_limit=mailbox_limit)
        self.replies: list[Reply] = []
        self.others: list[Others] = []

    def ask(self, **options: Any) -> Reply:
        self.replies.append(self.actor.ask(sent(), **options))
        return self.replies[-1]

    def hold(self, seconds: float | None = None) -> None:
        hold(self.cuda)
        if seconds is not None:
            threading.Timer(seconds, self.cuda.landed.set).start()

    def let_go(self) -> None:
        self.cuda.busy, self.cuda.current = False, 0
        self.cuda.landed.set()

    def go_on(self) -> None:
        """As if nothing had been: through the mailbox, and without it."""
        self.cuda.current = ELSEWHERE
        assert self.actor.ask(sent()).result(PATIENCE).out is not None
        until(lambda: not self.actor._engine.flights.flying)
        self.cuda.current = 0
        until(self.launches_here)  # as soon as the actor's thread is done
        until(lambda: self.actor.unanswered == 0)

    def launches_here(self) -> bool:
        """Whether a request is launched by who sends it."""
        assert self.actor.ask(sent()).result(PATIENCE).out is not None
        return self.cuda.launchers[-1] == threading.current_thread().name


def wait_for_an_answer(scene: Scene) -> Callable[[], object]:
    return lambda: scene.ask().result(PATIENCE)


def sleep_until_an_answer(scene: Scene) -> Callable[[], object]:
    scene.hold(MOMENT)
    return lambda: scene.ask().result(PATIENCE)


def go_through_the_mailbox(scene: Scene) -> Callable[[], object]:
    scene.cuda.current = ELSEWHERE
    return lambda: scene.ask(timeout=PATIENCE).result(PATIENCE)


def queue_for_a_place(scene: Scene) -> Callable[[], object]:
    scene.hold()
    for _ in range(4):  # two in flight, one with the actor's thread, one in the mailbox
        scene.ask()
        until(lambda: scene.actor.waiting <= 1)
    until(lambda: scene.actor.waiting == 1)
    threading.Timer(MOMENT, scene.cuda.landed.set).start()
    return scene.ask


def want_to_be_called(scene: Scene) -> Callable[[], object]:
    scene.hold(MOMENT)
    reply = scene.ask()
    return lambda: reply.add_done_callback(lambda _: None)


def answer_others(scene: Scene) -> Callable[[], object]:
    scene.hold()
    reply = scene.ask()
    scene.others.append(Others(reply))
    scene.let_go()
    return reply.done


def cancel_for_others(scene: Scene) -> Callable[[], object]:
    scene.hold()
    scene.ask(), scene.ask()
    scene.cuda.current = ELSEWHERE
    reply = scene.ask()
    scene.others.append(Others(reply))
    return reply.cancel


@pytest.fixture
def scenes(cuda: FakeDriver) -> Iterator[Callable[..., Scene]]:
    def make(**options: int) -> Scene:
        scene = Scene(cuda, **options)
        made.append(scene)
        return scene

    made: list[Scene] = []
    yield make
    for scene in made:
        scene.let_go()
        scene.actor.stop(timeout=PATIENCE)


def steps(
    scenes: Callable[..., Scene], play: Callable[[Scene], Callable[[], object]], *, let_go: bool = True
) -> Iterator[tuple[Scene, str]]:
    """The scene with a Ctrl-C at each step of what is played, and where it came."""
    for step in range(MOST_STEPS):
        scene = scenes()
        came = interrupt(play(scene), step)
        if let_go:
            scene.let_go()
        yield scene, came
        if not came:
            return
    pytest.fail("there are more steps than were tried")


@pytest.mark.parametrize(
    "play",
    [
        wait_for_an_answer,
        sleep_until_an_answer,
        go_through_the_mailbox,
        queue_for_a_place,
        want_to_be_called,
        answer_others,
        cancel_for_others,
    ],
)
def test_everybody_is_answered_and_the_actor_goes_on(scenes: Callable[..., Scene], play: Callable[[Scene], Callable[[], object]]):
    for scene, came in steps(scenes, play):
        other = threading.Thread(target=scene.go_on, daemon=True)
        other.start()
        other.join(3 * PATIENCE)
        assert not other.is_alive(), f"nobody is answered after a Ctrl-C at {came}"
        until(lambda scene=scene: all(reply.is_over() for reply in scene.replies))
        until(lambda scene=scene: all(len(other.woken) == 2 for other in scene.others))
        assert scene.actor._mailbox.inside == 0
        scene.actor.stop(timeout=PATIENCE)


@pytest.mark.parametrize("drain", [True, False])
def test_a_stop_that_was_interrupted_goes_on_or_can_be_made_again(scenes: Callable[..., Scene], drain: bool):
    told: list[object] = []

    def queue(scene: Scene) -> None:
        try:
            scene.actor.ask(sent())
        except ActorStoppedError as error:
            told.append(error)

    def stop(scene: Scene) -> Callable[[], object]:
        scene.hold()
        for _ in range(4):
            scene.ask()
        scene.others.append(Others(scene.replies[0]))
        scene.replies[0].add_done_callback(told.append)
        threading.Thread(target=queue, args=(scene,), daemon=True).start()
        until(lambda: scene.actor.waiting == 2)
        return lambda: scene.actor.stop(drain=drain, timeout=MOMENT)

    for scene, came in steps(scenes, stop, let_go=False):
        again = threading.Thread(target=scene.actor.stop, kwargs={"timeout": MOMENT}, daemon=True)
        again.start()
        again.join(PATIENCE)
        assert not again.is_alive(), f"no stop after a Ctrl-C at {came}"
        assert all(isinstance(reply.exception(PATIENCE), ActorStoppedError) for reply in scene.replies)
        until(lambda scene=scene: len(scene.others[0].woken) == 2)
        until(lambda: len(told) == 2)
        assert scene.actor.unanswered == 0
        scene.let_go()
        told.clear()


@pytest.mark.parametrize("play", [wait_for_an_answer, sleep_until_an_answer, go_through_the_mailbox, want_to_be_called, answer_others])
def test_a_handler_may_send_too(scenes: Callable[..., Scene], play: Callable[[Scene], Callable[[], object]]):
    for step in range(MOST_STEPS):
        scene, came = scenes(mailbox_limit=4), []
        work = play(scene)
        thread = threading.Thread(target=lambda: came.append(interrupt(work, step, scene.ask)), daemon=True)  # noqa: B023 - joined here
        thread.start()
        thread.join(PATIENCE)
        assert came, "the thread that was interrupted waits for itself"
        scene.let_go()
        assert all(reply.result(PATIENCE).out is not None for reply in scene.replies)
        until(lambda scene=scene: all(len(other.woken) == 2 for other in scene.others))
        until(lambda scene=scene: scene.actor.unanswered == 0)
        scene.actor.stop(timeout=PATIENCE)
        if not came[0]:
            return
    pytest.fail("there are more steps than were tried")
