"""Places and deadlines: who waits for room, who is refused, and whose time is over."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import Overflow
from atomr_accel_flashattn.actor import deadlines
from tests.actor.calls import expire, message, start
from tests.fakes.inner import HeldDevice
from tests.fakes.waiting import PATIENCE, until


def test_a_timeout_fails_what_waits_and_what_is_in_flight(device: HeldDevice):
    with start(device, max_in_flight=1) as actor:
        first, waiting, patient = (actor.ask(message(seed)) for seed in range(3))
        device.wait_for(1)
        for reply in (first, waiting):
            expire(actor, reply)
            with pytest.raises(fa.RequestTimeoutError, match=r"within 0\.05 s"):
                reply.result(PATIENCE)
        assert issubclass(fa.RequestTimeoutError, TimeoutError)
        device.launches[0].complete()
        device.wait_for(2)
        device.complete_all()
        assert patient.result(PATIENCE).out is not None
    assert len(device.launches) == 2, "what timed out while it waited is not launched"


def test_stop_gets_into_a_full_mailbox(device: HeldDevice):
    actor = start(device, max_in_flight=1, mailbox_limit=1, overflow=Overflow.REFUSE)
    replies = [actor.ask(message())]
    device.wait_for(1)
    with pytest.raises(fa.MailboxFullError, match="mailbox of 1"):
        replies.extend(actor.ask(message(seed)) for seed in range(10))
    actor.stop(drain=False, timeout=0.05)
    assert all(reply.done() for reply in replies)


def test_back_pressure_waits_for_a_place_in_order(device: HeldDevice):
    with start(device, max_in_flight=1, mailbox_limit=1) as actor:
        messages = [message(seed) for seed in range(5)]
        replies = [actor.ask(messages[0])]
        device.wait_for(1)
        senders = []
        for count, each in enumerate(messages[1:], 2):
            senders.append(threading.Thread(target=lambda each=each: replies.append(actor.ask(each))))
            senders[-1].start()
            until(lambda count=count: actor._mailbox.unsettled + len(actor._mailbox._outside) == count, "the next sender")
        assert len(actor._mailbox._outside) >= 2  # one is in the mailbox, one with the actor, which waits for a launch to finish
        assert len(replies) <= 3
        for count in range(1, 6):
            device.wait_for(count)
            device.launches[count - 1].complete()
        for sender in senders:
            sender.join(PATIENCE)
        assert [launch.job.message for launch in device.launches] == messages
        assert all(reply.result(PATIENCE).out is not None for reply in replies)


def test_a_callback_of_a_request_whose_time_is_over_never_waits(device: HeldDevice):
    with start(device, max_in_flight=1, mailbox_limit=1) as actor:
        first = actor.ask(message())
        device.wait_for(1)
        second = actor.ask(message())
        until(lambda: actor.waiting == 0)  # with the actor's thread
        told: list[object] = []

        def again(_: object) -> None:
            try:
                actor.ask(message())
            except fa.MailboxFullError as error:
                told.append(error)

        late = actor.ask(message())
        late.add_done_callback(again)
        expire(actor, late)
        with pytest.raises(fa.RequestTimeoutError):
            late.result(PATIENCE)
        until(lambda: told)
        device.complete_all()
        device.wait_for(2)
        device.complete_all()
        assert all(reply.result(PATIENCE).out is not None for reply in (first, second))


def test_who_gave_up_queueing_is_not_kept(device: HeldDevice):
    actor = start(device, max_in_flight=1, mailbox_limit=1)
    kept = [actor.ask(message())]
    device.wait_for(1)
    for _ in range(2):
        kept.append(actor.ask(message()))
        until(lambda: actor.waiting == len(kept) - 2)
    given_up = [message(), message(), message()]
    arrays = [weakref.ref(each.request.q) for each in given_up]
    with pytest.raises(fa.RequestTimeoutError, match="no place in the mailbox"):
        actor.ask(given_up[0], timeout=0.01)

    async def main() -> None:
        with pytest.raises(fa.RequestTimeoutError, match="no place in the mailbox"):
            await actor.ask_async(given_up[1], timeout=0.01)
        task = asyncio.create_task(actor.ask_async(given_up[2]))
        await asyncio.sleep(0.01)
        assert actor.waiting == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert actor.waiting == 1
    given_up.clear()
    gc.collect()
    assert [array() for array in arrays] == [None] * 3
    until(lambda: device.complete_all() or actor.unanswered == 0, "the end of those that were accepted")
    actor.stop(timeout=PATIENCE)


def test_deadlines_of_answered_requests_are_swept_and_the_others_stay(device: HeldDevice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deadlines, "_SWEEP_AT", 4)
    with start(device, max_in_flight=1) as actor:
        for count in range(1, 9):
            reply = actor.ask(message(), timeout=PATIENCE)
            device.wait_for(count)
            device.complete_all()
            reply.result(PATIENCE)
        late = actor.ask(message())
        device.wait_for(9)
        expire(actor, late)
        assert isinstance(late.exception(PATIENCE), fa.RequestTimeoutError)
        device.complete_all()


def test_the_wait_for_a_place_is_part_of_the_timeout(device: HeldDevice):
    with start(device, max_in_flight=1, mailbox_limit=1) as actor:
        accepted = []
        with pytest.raises(fa.RequestTimeoutError, match="no place"):
            accepted.extend(actor.ask(message(seed), timeout=0.05) for seed in range(10))
        assert actor.waiting <= 2
        assert len(accepted) <= 3
        until(lambda: device.complete_all() or actor.unanswered == 0, "the end of those that were accepted")
