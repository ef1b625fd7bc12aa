"""Who launches, and who finds a launch finished: each request once, whichever thread it is."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, as_completed, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.actor import Reply, in_flight
from atomr_accel_flashattn.actor.engine import Engine
from tests.actor.calls import expected, sent, start_and_launch
from tests.fakes.driver import FakeDriver
from tests.fakes.gpu import FakeGpu
from tests.fakes.waiting import PATIENCE, until

if TYPE_CHECKING:
    from atomr_accel_flashattn.actor.reply import Ticket

ACTOR, COMPLETIONS = "FlashAttnActor-", "flash-attn-completions"


def test_the_first_launch_is_the_actors_and_those_that_repeat_it_are_their_callers(cuda: FakeDriver):
    with start_and_launch() as actor:
        assert cuda.launchers[0].startswith(ACTOR)
        cuda.log.clear()
        message = sent(1)
        reply = actor.ask(message)
        assert reply.running()
        assert [entry[0] for entry in cuda.log if entry[0] not in {"push", "context"}] == ["record", "wait", "launch", "record"]
        np.testing.assert_array_equal(reply.result(PATIENCE).out.array, expected(message).out)
    assert cuda.launchers[1] == threading.current_thread().name
    assert cuda.live_events == 0


def test_a_context_that_is_current_is_not_pushed(cuda: FakeDriver):
    with start_and_launch() as actor:
        cuda.current = 90
        cuda.log.clear()
        actor.ask(sent()).result(PATIENCE)
        assert ("push", 0) not in cuda.log


@pytest.mark.parametrize(("index", "current", "callers"), [(0, 0, True), (1, 0, False), (0, 70, False), (1, 91, True)])
def test_callers_launch_in_the_context_of_the_device_only(cuda: FakeDriver, index: int, current: int, callers: bool):
    with start_and_launch(index) as actor:
        cuda.current = current
        message = sent(1, index)
        np.testing.assert_array_equal(actor.ask(message).result(PATIENCE).out.array, expected(message).out)
    assert (cuda.launchers[1] == threading.current_thread().name) is callers


def test_who_waits_finds_the_launch_finished_without_being_woken(cuda: FakeDriver):
    with start_and_launch() as actor:
        cuda.log.clear()
        for seed in range(5):
            actor.ask(sent(seed)).result(PATIENCE)
        assert Counter(entry[0] for entry in cuda.log)["synchronize"] == 0
        assert actor.unanswered == 0


def test_launches_in_flight_are_no_more_than_allowed_and_the_rest_waits_in_order(cuda: FakeDriver):
    with start_and_launch(max_in_flight=2) as actor:
        cuda.hold()
        cuda.log.clear()
        messages = [sent(seed) for seed in range(6)]
        replies = [actor.ask(each) for each in messages]
        until(lambda: actor.waiting == 3)  # one is with the actor, which waits for a place
        assert sum(entry[0] == "launch" for entry in cuda.log) == 2
        cuda.completed.set()
        for reply, each in zip(replies, messages, strict=True):
            np.testing.assert_array_equal(reply.result(PATIENCE).out.array, expected(each).out)
        launched = [entry[2] for entry in cuda.log if entry[0] == "launch"]
        assert launched == [tuple(getattr(each.request.problem, name).ptr for name in "qkv") for each in messages]
        assert cuda.launchers[1] == cuda.launchers[2] == threading.current_thread().name
        assert cuda.launchers[-1].startswith(ACTOR)


def test_a_place_is_taken_over_from_a_launch_that_has_finished(cuda: FakeDriver):
    with start_and_launch(max_in_flight=1) as actor:
        replies = [actor.ask(sent(seed)) for seed in range(20)]
        assert set(cuda.launchers[1:]) == {threading.current_thread().name}
        assert all(reply.is_over() for reply in replies[:-1])


def test_the_completion_thread_does_not_have_to_be_woken_for_every_launch(cuda: FakeDriver):
    with start_and_launch() as actor:
        in_flight = actor._engine.in_flight
        until(lambda: in_flight._asleep, "a completion thread that has nothing to do")
        until(lambda: actor.ask(sent()).result(PATIENCE) and in_flight._resting and not in_flight._asleep, "one that looks by itself")


@pytest.fixture
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The completion thread does not look by itself while the test runs."""
    monkeypatch.setattr(in_flight, "_LOOK_SECONDS", PATIENCE)


@pytest.mark.usefixtures("nobody_else")
def test_one_question_is_enough_when_all_have_finished(cuda: FakeDriver):
    with start_and_launch(max_in_flight=8) as actor:
        cuda.hold()
        replies = [actor.ask(sent(seed)) for seed in range(8)]
        cuda.busy = False
        cuda.log.clear()
        assert replies[0].done()
        assert all(reply.is_over() for reply in replies)
        assert [entry[0] for entry in cuda.log] == ["query"]
        cuda.completed.set()


@pytest.mark.usefixtures("nobody_else")
def test_those_that_have_finished_are_answered_when_the_newest_has_not(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch):
    with start_and_launch(max_in_flight=4) as actor:
        cuda.hold()
        replies = [actor.ask(sent(seed)) for seed in range(4)]
        ends = [entry[1] for entry in cuda.log if entry[0] == "record" and entry[2] == 500][-4:]
        monkeypatch.setattr(cuda, "cuEventQuery", lambda event: (0 if event in ends[:2] else 600,))
        assert not replies[3].done()
        assert [reply.is_over() for reply in replies] == [True, True, False, False]
        cuda.completed.set()


@pytest.mark.usefixtures("nobody_else")
def test_a_newest_that_cannot_be_asked_keeps_none_of_the_others_from_being_answered(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch):
    with start_and_launch(max_in_flight=4) as actor:
        cuda.hold()
        replies = [actor.ask(sent(seed)) for seed in range(3)]
        newest = [entry[1] for entry in cuda.log if entry[0] == "record" and entry[2] == 500][-1]
        monkeypatch.setattr(cuda, "cuEventQuery", lambda event: (0,) if event != newest else 1 // 0)
        replies[0].done()
        assert [reply.is_over() for reply in replies] == [True, True, False]
        cuda.completed.set()


class Settlements:
    """Which launches were settled, how often, and by whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: Counter[int] = Counter()
        self.ways: Counter[str] = Counter()
        for name in ("_decide", "_resolve"):
            monkeypatch.setattr(Engine, name, self.counted(name, getattr(Engine, name)))

    def counted(self, name: str, way: Any) -> Any:
        def settle(engine: Engine, ticket: Ticket, *error: Any) -> Any:
            way(engine, ticket, *error)
            self.numbers[ticket.number] += 1
            self.ways[name] += 1

        return settle


def wait_somehow(reply: Reply, way: int) -> None:
    """As callers do: with a callback, together, by looking, or not at all."""
    if way == 0:
        reply.add_done_callback(lambda done: done.result())
    elif way == 1:
        wait([reply], PATIENCE)
    elif way == 2:
        until(reply.done)


def test_every_launch_is_settled_once_whoever_finds_it_finished(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch):
    settled = Settlements(monkeypatch)
    dice = random.Random(0)
    monkeypatch.setattr(cuda, "cuEventQuery", lambda _: (600 if dice.random() < 0.5 else 0,))
    messages = [sent(seed) for seed in range(8)]
    answers = [expected(each).out for each in messages]
    wrong: list[int] = []

    def client(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(200):
            number, way = choose.randrange(8), choose.randrange(5)
            reply = actor.ask(messages[number])
            wait_somehow(reply, way)
            if way != 4 and not np.array_equal(reply.result(PATIENCE).out.array, answers[number]):
                wrong.append(number)

    with start_and_launch(max_in_flight=3) as actor:
        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert actor.unanswered == 0
    assert len(settled.numbers) == 1601
    assert set(settled.numbers.values()) == {1}
    assert set(settled.ways) == {"_decide", "_resolve"}
    assert len(actor._engine.in_flight.launches) == 0
    assert cuda.live_events == 0


def test_a_timeout_of_result_and_an_answer_later(cuda: FakeDriver):
    with start_and_launch() as actor:
        cuda.hold()
        reply = actor.ask(sent())
        for _ in range(2):
            with pytest.raises(TimeoutError):
                reply.result(0.01)
            with pytest.raises(TimeoutError):
                reply.exception(0)
        assert reply.running()
        cuda.completed.set()
        assert reply.result(PATIENCE).out is not None


def test_a_request_whose_time_is_over_wakes_who_waits_for_it(cuda: FakeDriver):
    with start_and_launch() as actor:
        cuda.hold()
        with pytest.raises(fa.RequestTimeoutError):
            actor.ask(sent(), timeout=0.05).result()
        cuda.completed.set()


def test_a_sticky_error_that_a_waiter_sees_first_is_told_to_all(cuda: FakeDriver):
    actor = start_and_launch(max_in_flight=2)
    cuda.hold()
    replies = [actor.ask(sent(seed)) for seed in range(4)]
    cuda.sticky = True
    waiter = threading.Thread(target=replies[0].exception)
    waiter.start()
    until(lambda: any(entry[0] == "synchronize" for entry in cuda.log))
    cuda.completed.set()
    waiter.join(PATIENCE)
    errors = [reply.exception(PATIENCE) for reply in replies]
    assert all(isinstance(error, fa.DeviceLostError) for error in errors)
    assert len(set(map(id, errors))) == len(errors)
    with pytest.raises(fa.ActorStoppedError, match="device was lost"):
        actor.ask(sent())
    actor.stop(timeout=PATIENCE)
    assert actor.unanswered == 0


def test_a_stop_that_gives_up_wakes_who_waits(cuda: FakeDriver):
    actor = start_and_launch(max_in_flight=1)
    cuda.hold()
    replies = [actor.ask(sent(seed)) for seed in range(3)]
    found: list[BaseException | None] = []
    waiters = [threading.Thread(target=lambda each=each: found.append(each.exception())) for each in replies]
    for waiter in waiters:
        waiter.start()
    actor.stop(timeout=0.05)
    for waiter in waiters:
        waiter.join(PATIENCE)
    assert [type(error) for error in found] == [fa.ActorStoppedError] * 3
    assert actor.unanswered == 0
    cuda.completed.set()


def test_a_stop_that_drains_waits_for_launches_of_callers(cuda: FakeDriver):
    actor = start_and_launch()
    cuda.hold()
    replies = [actor.ask(sent(seed)) for seed in range(3)]
    stopping = threading.Thread(target=actor.stop)
    stopping.start()
    time.sleep(0.02)
    assert not any(reply.done() for reply in replies)
    cuda.completed.set()
    stopping.join(PATIENCE)
    assert all(reply.is_over() and reply.result(0).out is not None for reply in replies)
    assert cuda.live_events == 0


def test_callbacks_run_in_the_completion_thread_whoever_waits(cuda: FakeDriver):
    with start_and_launch() as actor:
        cuda.hold()
        reply = actor.ask(sent())
        ran: list[str] = []
        reply.add_done_callback(lambda _: ran.append(threading.current_thread().name))
        cuda.busy = False
        for _ in range(20):
            actor.ask(sent())
        cuda.completed.set()
        reply.result(PATIENCE)
        until(lambda: ran)
    assert ran == [COMPLETIONS]


def test_who_only_looks_or_waits_in_other_ways_is_served_too(cuda: FakeDriver):
    with start_and_launch() as actor:
        until(actor.ask(sent()).done)
        until(actor.ask(sent()).is_over)  # nobody asks the device
        assert wait([actor.ask(sent()) for _ in range(3)], PATIENCE).not_done == set()
        assert len(list(as_completed([actor.ask(sent()) for _ in range(3)], PATIENCE))) == 3
        cuda.hold()
        reply = actor.ask(sent())
        assert wait([reply], 0.01, FIRST_COMPLETED).done == set()
        cuda.completed.set()
        assert wait([reply], PATIENCE, FIRST_COMPLETED).done == {reply}


def test_a_launch_that_fails_in_its_callers_thread_is_tried_again_and_fails_alone(gpu: FakeGpu, cuda: FakeDriver):
    with start_and_launch() as actor:
        gpu.raises = fa.LaunchError("no", kernel_name="k")
        reply = actor.ask(sent())
        with pytest.raises(fa.LaunchError, match="no"):
            reply.result(PATIENCE)
        assert cuda.launchers[1] == threading.current_thread().name
        assert cuda.launchers[2].startswith(ACTOR)
        gpu.raises = None
        until(lambda: actor.unanswered == 0)
        assert actor.ask(sent()).result(PATIENCE).out is not None
        gpu.raises = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            actor.ask(sent())
        gpu.raises = None
        until(lambda: actor.unanswered == 0)


def test_an_event_loop_launches_nothing_itself(cuda: FakeDriver):
    async def main() -> None:
        async with start_and_launch() as actor:
            await actor.ask_async(sent())
            assert (await actor.ask(sent())).out is not None

    asyncio.run(main())
    assert all(name.startswith(ACTOR) for name in cuda.launchers)
