"""A Reply: a future whose outcome anybody may set, and that a thread of the actor tells everybody of."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.actor import Reply
from tests.actor.calls import message, start
from tests.fakes.inner import HeldDevice
from tests.fakes.waiting import PATIENCE, until

OUTPUT = fa.Output(None)


class Nobody:
    """Looks after nothing."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


def test_a_reply_is_answered_without_its_base_class_which_wait_sets_up():
    reply = Reply()
    assert reply.begin()
    reply.resolve(OUTPUT)
    assert reply.result() is OUTPUT
    assert not reply._has_base
    assert wait([reply], 0).done == {reply}
    assert set(vars(Future())) <= set(vars(reply))
    assert Future.result(reply, 0) is OUTPUT
    with pytest.raises(AttributeError):
        reply.nothing  # type: ignore[attr-defined]  # noqa: B018 - the look is the test


def test_an_outcome_is_there_before_everybody_was_told():
    reply, told = Reply(Nobody()), []
    reply.add_done_callback(told.append)
    assert reply.begin()
    assert (reply.running(), reply.cancel(), reply.done()) == (True, False, False)
    assert reply.decide(OUTPUT)
    assert not reply.decide(OSError("later"))
    assert reply.result(0) is OUTPUT
    assert (reply.exception(), reply.done(), reply.cancelled(), reply.running()) == (None, True, False, False)
    assert (told, wait([reply], 0).done) == ([], set())
    reply.finish()
    reply.finish()
    assert (told, wait([reply], 0).done) == ([reply], {reply})
    reply.add_done_callback(told.append)
    assert told == [reply] * 2


@pytest.mark.parametrize("outcome", [OUTPUT, OSError("no"), None])
@pytest.mark.parametrize("way", ["result", "exception", "wait", "callback", "await"])
def test_everybody_is_told_of_an_answer_an_error_and_a_cancel(way: str, outcome: Any):
    reply, found = Reply(), []

    def told(done: Future[Any]) -> None:
        assert done is reply
        found.append(way)

    async def awaited() -> None:
        await reply

    def listen() -> None:
        ways = {
            "result": lambda: reply.result(PATIENCE),
            "exception": lambda: reply.exception(PATIENCE),
            "wait": lambda: wait([reply], PATIENCE),
            "callback": lambda: reply.add_done_callback(told),
            "await": lambda: asyncio.run(awaited()),
        }
        with contextlib.suppress(OSError, CancelledError, asyncio.CancelledError):
            ways[way]()
        if way != "callback":
            found.append(way)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    until(lambda: reply._callbacks or reply._waiters, "the listener")  # type: ignore[attr-defined]
    if outcome is None:
        assert reply.cancel()
    else:
        reply.resolve(outcome)
    until(lambda: found == [way], f"the end of {way}")
    listener.join(PATIENCE)
    assert reply.cancelled() == (outcome is None)


def test_a_wait_whose_time_is_over_leaves_nothing_behind():
    reply = Reply()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            reply.result(0.001)
    assert reply._callbacks == ()


def test_a_callback_that_fails_or_exits_is_logged_and_keeps_no_other_from_being_called(
    caplog: pytest.LogCaptureFixture, device: HeldDevice
):
    def leave(_: Future[Any]) -> None:
        raise SystemExit

    def fail(_: Future[Any]) -> None:
        raise ValueError

    with start(device) as actor:
        called: list[str] = []
        reply = actor.ask(message())
        for callback in (leave, fail, lambda _: called.append(threading.current_thread().name)):
            reply.add_done_callback(callback)
        device.wait_for(1)
        device.complete_all()
        until(lambda: called == ["flash-attn-completions"], "the last callback")
        again = actor.ask(message())
        device.wait_for(2)
        device.complete_all()
        assert again.result(PATIENCE).out is not None
    assert [record.message for record in caplog.records] == ["a callback of a Reply failed"] * 2


def test_an_exit_of_ones_own_is_not_swallowed():
    reply = Reply()
    reply.resolve(OUTPUT)

    def leave(_: Future[Any]) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        reply.add_done_callback(leave)


def test_who_waits_in_the_standard_librarys_ways_after_the_stop_is_answered():
    with fa.FlashAttnActor.start(fa.FlashAttnProps(device="cpu")) as actor:
        reply = actor.ask(message())
        reply.result(PATIENCE)
    assert wait([reply], PATIENCE).done == {reply}
