"""A sticky CUDA error: every future fails with one clear cause, and the actor stops."""

from __future__ import annotations

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnProps
from tests.actor.calls import message
from tests.fakes.inner import HeldDevice
from tests.fakes.waiting import PATIENCE

LOST = fa.DeviceLostError("running the kernel failed", kernel_name="k", cuda_error="CUDA_ERROR_ILLEGAL_ADDRESS")


@pytest.mark.parametrize("where", ["launch", "completion"])
def test_a_lost_device_fails_every_future_and_stops_the_actor(where: str):
    device = HeldDevice()
    actor = FlashAttnActor.start(FlashAttnProps(device="cpu", max_in_flight=2), device)
    replies = [actor.ask(message(seed)) for seed in range(6)]
    device.wait_for(2)
    if where == "launch":
        device.refuse = LOST
        device.launches[0].complete()
        failed = replies[1:]
    else:
        device.launches[0].complete(LOST)
        failed = replies
    causes = []
    for reply in failed:
        with pytest.raises(fa.DeviceLostError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
            reply.result(PATIENCE)
        causes.append(caught.value)
    assert len(set(map(str, causes))) == 1
    assert len(set(map(id, causes))) == len(causes), "each future has an exception of its own"
    assert all(cause is LOST or cause.__cause__ is LOST for cause in causes)
    device.complete_all()
    actor.stop(timeout=PATIENCE)
    assert actor.unanswered == 0
    with pytest.raises(fa.ActorStoppedError, match="only a new process") as late:
        actor.ask(message())
    assert late.value.__cause__ is LOST


def test_a_caller_who_waits_for_a_place_is_told_that_the_device_is_lost():
    import threading

    device = HeldDevice()
    actor = FlashAttnActor.start(FlashAttnProps(device="cpu", max_in_flight=1, mailbox_limit=1), device)
    first = actor.ask(message())
    device.wait_for(1)
    outcomes: list[BaseException | None] = []

    def send() -> None:
        try:
            outcomes.append(actor.ask(message(1)).exception(PATIENCE))
        except fa.ActorStoppedError as error:
            outcomes.append(error)

    senders = [threading.Thread(target=send) for _ in range(5)]
    for sender in senders:
        sender.start()
    device.launches[0].complete(LOST)
    for sender in senders:
        sender.join(PATIENCE)
    assert isinstance(first.exception(0), fa.DeviceLostError)
    assert len(outcomes) == 5
    assert all(isinstance(outcome, (fa.DeviceLostError, fa.ActorStoppedError)) for outcome in outcomes)
    actor.stop(timeout=PATIENCE)
