"""From ask to the answer, and from start to stop, above a device whose launches the test completes."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnMsg
from tests.actor.calls import expire, message, start
from tests.fakes.inner import HeldDevice
from tests.fakes.waiting import PATIENCE, until


def expected(sent: FlashAttnMsg.Forward) -> np.ndarray:
    return fa.run(sent.request).out


def test_the_reply_comes_when_the_device_is_done_and_not_before(device: HeldDevice):
    with start(device) as actor:
        reply = actor.ask(message())
        device.wait_for(1)
        assert reply.running()
        time.sleep(0.02)
        assert not reply.done()
        device.launches[0].complete()
        output = reply.result(PATIENCE)
    np.testing.assert_array_equal(output.out, expected(message()))
    assert output.lse.shape == (1, 2, 2)
    assert device.closed


def test_the_mailbox_does_not_wait_for_the_device_but_no_more_than_max_in_flight_are_unfinished(device: HeldDevice):
    with start(device, max_in_flight=3) as actor:
        replies = [actor.ask(message(seed)) for seed in range(5)]
        device.wait_for(3)
        time.sleep(0.05)
        assert len(device.launches) == 3
        device.launches[0].complete()
        device.wait_for(4)
        assert len(device.launches) == 4
        for launch in device.launches[1:]:
            launch.complete()
        device.wait_for(5)
        device.complete_all()
        for seed, reply in enumerate(replies):
            np.testing.assert_array_equal(reply.result(PATIENCE).out, expected(message(seed)))


def test_launches_that_finish_out_of_order_are_each_answered_with_their_own(device: HeldDevice):
    with start(device) as actor:
        replies = [actor.ask(message(seed)) for seed in range(4)]
        device.wait_for(4)
        for index in (2, 3, 1):
            device.launches[index].complete()
        assert not any(reply.done() for reply in replies)
        device.launches[0].complete()
        for seed, reply in enumerate(replies):
            np.testing.assert_array_equal(reply.result(PATIENCE).out, expected(message(seed)))


def test_a_request_that_fails_fails_alone(device: HeldDevice):
    with start(device) as actor:
        first, second, third = (actor.ask(message(seed)) for seed in range(3))
        device.wait_for(3)
        device.launches[0].complete()
        device.launches[1].complete(fa.LaunchError("no", kernel_name="k"))
        device.launches[2].complete()
        assert first.result(PATIENCE).out.shape == third.result(PATIENCE).out.shape
        with pytest.raises(fa.LaunchError, match="no"):
            second.result(PATIENCE)
        device.refuse = SystemExit("even this")
        with pytest.raises(SystemExit):
            actor.ask(message()).result(PATIENCE)
        device.refuse = None
        last = actor.ask(message())
        device.wait_for(4)
        device.launches[3].complete()
        assert last.result(PATIENCE).out is not None


def test_cancel_works_until_the_launch(device: HeldDevice):
    with start(device, max_in_flight=1) as actor:
        first, waiting = actor.ask(message()), actor.ask(message(1))
        device.wait_for(1)
        assert not first.cancel()
        assert waiting.cancel()
        device.launches[0].complete()
        assert first.result(PATIENCE).out is not None
        with pytest.raises(CancelledError):
            waiting.result(PATIENCE)
    assert len(device.launches) == 1


def test_those_who_wait_for_a_cancelled_reply_are_told(device: HeldDevice):
    with start(device, max_in_flight=1) as actor:
        replies = [actor.ask(message(seed)) for seed in range(3)]
        device.wait_for(1)
        assert replies[1].cancel()
        device.launches[0].complete()
        device.wait_for(2)
        device.complete_all()
        done, not_done = wait(replies, PATIENCE)
        assert (len(done), len(not_done)) == (3, 0)


def test_inputs_live_until_the_device_is_done_even_when_nobody_waits_any_more(device: HeldDevice):
    actor = start(device)
    sent = message()
    inputs = weakref.ref(sent.request.q)
    reply = actor.ask(sent)
    del sent
    device.wait_for(1)
    expire(actor, reply)
    with pytest.raises(fa.RequestTimeoutError):
        reply.result(PATIENCE)
    gc.collect()
    assert inputs() is not None
    device.launches.pop().complete()
    actor.stop()
    gc.collect()
    assert inputs() is None


def test_nothing_of_a_request_lives_after_its_reply(device: HeldDevice):
    with start(device) as actor:
        sent = message()
        inputs = weakref.ref(sent.request.q)
        reply = actor.ask(sent)
        del sent
        device.wait_for(1)
        device.launches.pop().complete()
        reply.result(PATIENCE)
        until(lambda: gc.collect() is not None and inputs() is None, "the end of the inputs")


def test_stop_drains(device: HeldDevice):
    actor = start(device, max_in_flight=1)
    replies = [actor.ask(message(seed)) for seed in range(3)]
    device.wait_for(1)
    stopping = threading.Thread(target=actor.stop)
    stopping.start()
    for count in (1, 2, 3):
        device.wait_for(count)
        device.launches[-1].complete()
    stopping.join(PATIENCE)
    assert [reply.result(0).out.shape for reply in replies] == [(1, 2, 2, 8)] * 3
    assert actor.unanswered == 0
    assert not actor.is_alive
    actor.stop()


def test_stop_without_drain_fails_what_waits_and_answers_what_is_in_flight(device: HeldDevice):
    actor = start(device, max_in_flight=1)
    replies = [actor.ask(message(seed)) for seed in range(4)]
    device.wait_for(1)
    stopping = threading.Thread(target=actor.stop, kwargs={"drain": False})
    stopping.start()
    time.sleep(0.02)
    device.launches[0].complete()
    stopping.join(PATIENCE)
    assert replies[0].result(0).out is not None
    for reply in replies[1:]:
        with pytest.raises(fa.ActorStoppedError):
            reply.result(0)
    assert len(device.launches) == 1


def test_stop_with_a_timeout_fails_what_a_hung_device_keeps(device: HeldDevice):
    actor = start(device, max_in_flight=1)
    replies = [actor.ask(message(seed)) for seed in range(3)]
    device.wait_for(1)
    actor.stop(timeout=0.05)
    for reply in replies:
        with pytest.raises(fa.ActorStoppedError):
            reply.result(0)
    assert actor.unanswered == 0


def test_who_waits_in_a_stop_is_released_by_a_shorter_one(device: HeldDevice):
    actor = start(device)
    reply = actor.ask(message())
    device.wait_for(1)
    patient = threading.Thread(target=actor.stop, daemon=True)
    patient.start()
    until(lambda: not actor.is_alive)
    time.sleep(0.02)  # the actor's thread waits for the device now
    actor.stop(timeout=0.01)
    assert isinstance(reply.exception(0), fa.ActorStoppedError)
    patient.join(PATIENCE)
    assert not patient.is_alive()


def test_a_callback_may_stop_the_actor_and_send_to_it(device: HeldDevice):
    actor = start(device, mailbox_limit=1)
    refused: list[BaseException] = []
    done = threading.Event()

    def callback(_: object) -> None:
        try:
            for seed in range(100):
                actor.ask(message(seed))  # would wait for itself for ever, if it waited
        except fa.MailboxFullError as error:
            refused.append(error)
        actor.stop(drain=False)
        done.set()

    actor.ask(message()).add_done_callback(callback)
    device.wait_for(1)
    device.launches[0].complete()
    assert done.wait(PATIENCE)
    device.complete_all()
    actor.stop(timeout=PATIENCE)
    assert refused
    assert actor.unanswered == 0


def test_await_never_blocks_the_event_loop(device: HeldDevice):
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.002)

    async def complete() -> None:
        while True:
            await asyncio.sleep(0.001)
            device.complete_all()

    async def main() -> list[fa.Output]:
        async with start(device, max_in_flight=1, mailbox_limit=2) as actor:
            ticking = asyncio.create_task(tick())
            completing = asyncio.create_task(complete())
            with pytest.raises(fa.MailboxFullError):  # noqa: PT012 - ask() in a loop refuses where it would have to wait
                crowd = [actor.ask(message(99)) for _ in range(6)]
                assert not crowd
            outputs = await asyncio.gather(*(actor.ask_async(message(seed)) for seed in range(12)))
            outputs.append(await actor.ask(message(12)))
            completing.cancel()
            ticking.cancel()
            device.complete_all()
            return list(outputs)

    threads = threading.active_count()
    outputs = asyncio.run(main())
    assert ticks > 3
    for seed, output in enumerate(outputs):
        np.testing.assert_array_equal(output.out, expected(message(seed)))
    assert threading.active_count() <= threads


def test_cancelling_a_task_cancels_its_request(device: HeldDevice):
    async def main() -> None:
        async with start(device, max_in_flight=1, mailbox_limit=1) as actor:
            first = asyncio.create_task(actor.ask_async(message()))
            await asyncio.to_thread(device.wait_for, 1)
            others = [asyncio.create_task(actor.ask_async(message(seed))) for seed in range(1, 5)]
            await asyncio.sleep(0.02)
            for task in others:
                task.cancel()
            results = await asyncio.gather(*others, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            late = asyncio.create_task(actor.ask_async(message(5), timeout=0.03))
            with pytest.raises(fa.RequestTimeoutError):
                await late
            device.launches[0].complete()
            assert (await first).out is not None

    asyncio.run(main())
    assert len(device.launches) == 1


def test_tell_writes_into_out_and_logs_what_goes_wrong(device: HeldDevice, caplog: pytest.LogCaptureFixture):
    sent = message()
    out = np.full_like(sent.request.q, np.nan)
    request = fa.Fa2FwdRequest(sent.request.q, sent.request.k, sent.request.v, mask=sent.request.mask, out=out)
    with caplog.at_level(logging.ERROR), start(device) as actor:
        actor.tell(FlashAttnMsg.Forward(request))
        actor.tell(message(1))
        device.wait_for(2)
        device.launches[0].complete()
        device.launches[1].complete(OSError("gone"))
    np.testing.assert_array_equal(out, expected(sent))
    assert ["gone" in record.message for record in caplog.records] == [True]


def test_a_block_that_raises_stops_without_draining(device: HeldDevice):
    with pytest.raises(ZeroDivisionError), start(device, max_in_flight=1) as actor:  # noqa: PT012
        replies = [actor.ask(message(seed)) for seed in range(3)]
        device.wait_for(1)
        device.launches[0].complete()
        replies[0].result(PATIENCE)
        device.wait_for(2)
        device.launches[1].complete()
        replies[1].result(PATIENCE)
        device.wait_for(3)
        device.launches[2].complete()
        raise ZeroDivisionError
    assert all(reply.done() for reply in replies)


def test_both_threads_are_attached_to_the_device(device: HeldDevice):
    with start(device, label="mine"):
        pass
    assert len(device.attached) == 2
    assert any("mine" in name for name in device.attached)


def test_a_device_that_cannot_be_attached_fails_every_request(device: HeldDevice, monkeypatch: pytest.MonkeyPatch):
    def attach() -> None:
        raise fa.NoDriverError("no driver in this thread")

    monkeypatch.setattr(device, "attach", attach)
    actor = start(device)
    with pytest.raises((fa.NoDriverError, fa.ActorStoppedError), match="no driver"):
        actor.ask(message()).result(PATIENCE)
    actor.stop(timeout=PATIENCE)


def test_the_reference_inner_gives_what_run_gives():
    with FlashAttnActor.start() as actor:
        for dtype in ("float32", "float16", "float64"):
            sent = message(3, dtype=dtype)
            output = actor.ask(sent).result(PATIENCE)
            direct = fa.run(sent.request)
            np.testing.assert_array_equal(output.out, direct.out)
            np.testing.assert_array_equal(output.lse, direct.lse)
        assert actor.ask(FlashAttnMsg.Forward(sent.request, lse=False)).result(PATIENCE).lse is None


def test_the_reference_inner_takes_packed_requests_and_gives_dropout_patterns():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 9, 2, 8)).astype(np.float32)
    options = fa.AttentionOptions(dropout_p=0.5, rng=np.array([1, 2]))
    request = fa.VarlenFwdRequest(q, k, v, cu_seqlens_q=fa.CumulativeSeqlens.from_lengths([4, 5]), options=options)
    direct = fa.run(request, dropout_mask=True)
    with FlashAttnActor.start() as actor:
        output = actor.ask(FlashAttnMsg.Forward(request, dropout_mask=True)).result(PATIENCE)
    np.testing.assert_array_equal(output.out, direct.out)
    np.testing.assert_array_equal(output.dropout_mask, direct.dropout_mask)
