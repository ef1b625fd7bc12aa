"""Ctrl-C and SystemExit where they hurt: in a caller that answers or launches, and in callbacks that run in threads of the actor."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import pytest

from atomr_accel_flashattn import FlashAttnActor, FlashAttnProps
from atomr_accel_flashattn.actor.engine import Engine
from atomr_accel_flashattn.actor.locks import run_if_free
from tests.actor.devices import PATIENCE, HeldDevice, message, until
from tests.actor.fake_gpu import FakeDriver, hold, sent, start

if TYPE_CHECKING:
    from atomr_accel_flashattn import FlashAttnHandle
    from atomr_accel_flashattn.actor import Reply


class Interrupt:
    """Ctrl-C right after the next call of ``call`` since it was armed, or instead of it."""

    def __init__(self, call: Any, *, instead: bool = False) -> None:
        self.call = call
        self.instead = instead
        self.armed = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        armed, self.armed = self.armed, False
        result = None if armed and self.instead else self.call(*args, **options)
        if armed:
            raise KeyboardInterrupt
        return result


class InterruptedLock:
    """A lock whose next acquire that takes it is the last thing before Ctrl-C."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.acquire = Interrupt(lock.acquire)
        self.acquire.armed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lock, name)

    def __enter__(self) -> bool:
        return self.lock.__enter__()

    def __exit__(self, *error: object) -> None:
        self.lock.__exit__(*error)


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, instead: bool = False) -> Interrupt:
    made = Interrupt(getattr(owner, name), instead=instead)
    monkeypatch.setattr(owner, name, lambda *args: made(*args))  # noqa: PLW0108 - a function becomes a method, an Interrupt does not
    return made


def assert_no_more_than(limit: int, actor: FlashAttnHandle, cuda: FakeDriver) -> None:
    """In flight, whatever was interrupted before."""
    assert actor.ask(sent()).result(PATIENCE).out is not None
    until(lambda: len(actor._engine.flights.flying) == 0)
    hold(cuda)
    cuda.launchers.clear()
    replies = [actor.ask(sent()) for _ in range(limit + 3)]
    until(lambda: actor.waiting == 2)  # one is with the actor's thread, which waits for a place
    assert len(cuda.launchers) == limit
    cuda.landed.set()
    assert all(reply.result(PATIENCE).out is not None for reply in replies)
    until(lambda: actor.unanswered == 0)


def test_a_wait_that_is_interrupted_after_it_answered_makes_no_place_twice(
    cuda: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
):
    settled = interrupt(monkeypatch, Engine, "_landed_well")
    with start(max_in_flight=2) as actor:
        reply = actor.ask(sent())
        settled.armed = True
        with pytest.raises(KeyboardInterrupt):
            reply.result(PATIENCE)
        assert reply.result(0).out is not None
        assert_no_more_than(2, actor, cuda)


@pytest.mark.parametrize("way", ["result", "done"])
def test_a_wait_that_is_interrupted_as_it_begins_keeps_nobody_from_being_answered(cuda: FakeDriver, way: str):
    with start(max_in_flight=2) as actor:
        reply = actor.ask(sent())
        actor._engine.flights._taking = InterruptedLock(actor._engine.flights._taking)
        with pytest.raises(KeyboardInterrupt):
            getattr(reply, way)()
        assert not reply.is_over()
        assert actor._engine.flights._taking.acquire(timeout=PATIENCE)
        actor._engine.flights._taking.release()
        assert reply.result(PATIENCE).out is not None
        assert_no_more_than(2, actor, cuda)


def test_a_launch_that_is_interrupted_as_it_begins_keeps_nobody_from_launching(cuda: FakeDriver):
    with start(max_in_flight=2) as actor:
        lock = actor._engine._launching
        actor._engine._launching = InterruptedLock(lock)
        with pytest.raises(KeyboardInterrupt):
            actor.ask(sent())
        free = threading.Thread(target=lambda: lock.acquire(timeout=PATIENCE) and lock.release())
        free.start()
        free.join(PATIENCE / 2)
        assert not free.is_alive(), "the lock was left taken"
        assert_no_more_than(2, actor, cuda)


@pytest.mark.parametrize(
    ("name", "instead", "launches"),
    [("enter_begun", True, 0), ("enter_begun", False, 0), ("launch", True, 1), ("launch", False, 2), ("add", True, 2), ("add", False, 2)],
)
def test_a_launch_that_is_interrupted_leaves_no_request_behind(
    cuda: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    instead: bool,
    launches: int,
):
    with start(max_in_flight=2) as actor:
        engine = actor._engine
        owner = {"enter_begun": actor._mailbox, "launch": engine._inner, "add": engine.flights}[name]
        interrupted = interrupt(monkeypatch, type(owner), name, instead=instead)
        interrupted.armed = True
        with pytest.raises(KeyboardInterrupt):
            actor.ask(sent())
        until(lambda: actor.unanswered == 0)
        until(lambda: len(cuda.launchers) == 1 + launches)
        assert_no_more_than(2, actor, cuda)


def test_a_lock_is_taken_once_by_a_thread_and_never_from_another():
    lock = threading.RLock()
    assert run_if_free(lock, lambda: run_if_free(lock, lambda: "again")) is None
    assert run_if_free(lock, lambda: "work") == "work"
    held = threading.Thread(target=lock.acquire)
    held.start()
    held.join()
    assert run_if_free(lock, lambda: "work") is None
    assert not lock.acquire(blocking=False), "the lock of another thread was released"


def leave(_: Reply) -> None:
    raise SystemExit


def test_a_callback_that_exits_ends_no_thread_and_keeps_no_other_from_being_called(caplog: pytest.LogCaptureFixture):
    device = HeldDevice()
    actor = FlashAttnActor.start(FlashAttnProps(device="cpu", max_in_flight=1), device)
    called: list[str] = []
    flying, late, waiting = actor.ask(message()), actor.ask(message(), timeout=0.2), actor.ask(message())
    for reply in (flying, late, waiting):
        reply.add_done_callback(leave)
        reply.add_done_callback(lambda _: called.append(threading.current_thread().name))
    until(lambda: called == ["flash-attn-deadlines"])
    device.wait_for(1)
    device.flights[0].land()
    until(lambda: len(called) == 2)
    device.wait_for(2)
    device.refuse = OSError("gone")
    failing = actor.ask(message())
    failing.add_done_callback(leave)
    device.land_all()
    assert isinstance(failing.exception(PATIENCE), OSError)
    device.refuse = None
    last = actor.ask(message(), timeout=PATIENCE)
    device.wait_for(3)
    device.land_all()
    assert last.result(PATIENCE).out is not None
    actor.stop(timeout=PATIENCE)
    assert called[1:] == ["flash-attn-completions"] * 2
    assert [record.message for record in caplog.records] == ["a callback of a Reply failed"] * 4


def test_a_callers_own_exit_is_the_callers(monkeypatch: pytest.MonkeyPatch):
    device = HeldDevice()
    with FlashAttnActor.start(FlashAttnProps(device="cpu", max_in_flight=1), device) as actor:
        _, waiting = actor.ask(message()), actor.ask(message())
        waiting.add_done_callback(leave)
        with pytest.raises(SystemExit):
            waiting.cancel()
        with pytest.raises(CancelledError):
            waiting.result(0)
        device.wait_for(1)
        device.land_all()


def test_a_sweep_of_deadlines_asks_the_device_nothing(cuda: FakeDriver):
    with start() as actor:
        hold(cuda)
        cuda.log.clear()
        actor._deadlines._sweep_at = 3
        replies = [actor.ask(sent(), timeout=PATIENCE) for _ in range(4)]
        over = [reply.is_over() for reply in replies]
        asked = [entry for entry in cuda.log if entry[0] == "query"]
        cuda.landed.set()
        assert actor._deadlines._sweep_at > 3, "no sweep"
        assert (over, asked) == ([False] * 4, [])
