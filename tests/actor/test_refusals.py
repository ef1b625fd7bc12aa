"""Bad input: each its own error, and nothing lost."""

from __future__ import annotations

import asyncio

import numpy as np
import pykka
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnInner, FlashAttnMsg, FlashAttnProps, SmArch
from atomr_accel_flashattn.types import Device
from tests.actor.calls import backward, message, paged
from tests.fakes.inner import HeldDevice
from tests.fakes.waiting import PATIENCE


@pytest.mark.parametrize(
    ("props", "says"),
    [
        ({"max_in_flight": 0}, "max_in_flight: got 0; allowed is an integer in 1..1000"),
        ({"max_in_flight": True}, "max_in_flight: got True"),
        ({"max_in_flight": 2.0}, "max_in_flight: got 2.0"),
        ({"mailbox_limit": 0}, "mailbox_limit: got 0"),
        ({"overflow": "wait"}, "overflow: got 'wait'"),
        ({"label": 5}, "label: got 5"),
        ({"device": "tpu"}, "device: got 'tpu'; allowed are 'cpu', 'cuda'"),
        ({"device": "cuda:x"}, "device: got 'cuda:x'"),
        ({"device": "cpu", "stream": 7}, "stream: got 7 with device cpu"),
    ],
)
def test_props_that_are_not_allowed(props: dict[str, object], says: str):
    with pytest.raises(fa.PropsError, match=says) as caught:
        FlashAttnProps(**props)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


NAMED = [("cpu", ("cpu", 0)), ("cuda", ("cuda", 0)), ("cuda:3", ("cuda", 3)), (Device("cuda", 1), ("cuda", 1))]


@pytest.mark.parametrize(("given", "device"), NAMED)
def test_devices_by_name(given: Device | str, device: tuple[str, int]):
    assert FlashAttnProps(device=given).place == device


def test_no_props_at_all_and_props_that_are_none():
    with pytest.raises(fa.PropsError, match="props: got dict"):
        FlashAttnActor.start({"max_in_flight": 3})  # type: ignore[arg-type]
    with pytest.raises(fa.DeviceMismatchError, match="inner: got one for cpu with device cuda:1"):
        FlashAttnActor.start(FlashAttnProps(device="cuda:1"), FlashAttnInner.reference())


@pytest.mark.skipif(fa.FlashAttnProps().place.kind == "cuda", reason="there is a driver")
def test_the_real_inner_without_a_driver_is_refused_at_start():
    with pytest.raises((fa.NoDriverError, fa.DriverTooOldError)):
        FlashAttnActor.start(FlashAttnProps(device="cuda"))


@pytest.mark.parametrize("unknown", [None, 3, "stop", {"request": 1}, message().request, FlashAttnMsg()])
def test_an_unknown_message(unknown: object):
    with FlashAttnActor.start() as actor:
        with pytest.raises(fa.UnknownMessageError, match=f"message: got {type(unknown).__qualname__}") as caught:
            actor.ask(unknown)  # type: ignore[arg-type]
        with pytest.raises(fa.UnknownMessageError):
            actor.tell(unknown)  # type: ignore[arg-type]
        assert isinstance(caught.value, TypeError)
        assert actor.ask(message()).result(PATIENCE).out is not None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (FlashAttnMsg.Forward(3), "a Forward with int; allowed is a DenseFwdRequest, .* or ChunkedPrefillRequest$"),
        (FlashAttnMsg.Forward(fa.Fa2FwdRequest), "a Forward with type"),
        (FlashAttnMsg.Forward(backward().request), "a Forward with Fa2BwdRequest.*; send it as FlashAttnMsg.Backward$"),
        (FlashAttnMsg.Backward(3), "a Backward with int; allowed is a DenseBwdRequest, Fa2BwdRequest or VarlenBwdRequest$"),
        (FlashAttnMsg.Backward(message().request), "a Backward with Fa2FwdRequest.*; send it as FlashAttnMsg.Forward$"),
    ],
    ids=["forward of a number", "forward of a class", "forward of a backward", "backward of a number", "backward of a forward"],
)
def test_a_message_with_a_request_of_another_kind(wrong: FlashAttnMsg.Forward | FlashAttnMsg.Backward, says: str):
    with FlashAttnActor.start() as actor:
        with pytest.raises(fa.UnknownMessageError, match=f"message: got {says}"):
            actor.ask(wrong)
        assert actor.unanswered == 0


def test_a_request_for_another_device():
    inner = FlashAttnInner.mock(Device("cuda", 1), arch=SmArch.SM_90)
    with FlashAttnActor.start(FlashAttnProps(device="cuda:1"), inner) as actor:
        with pytest.raises(fa.DeviceMismatchError, match="got a request on cpu for an actor on cuda:1"):
            actor.ask(message())
        assert actor.unanswered == 0


def test_an_actor_that_has_stopped():
    actor = FlashAttnActor.start()
    actor.stop()
    for call in (actor.ask, actor.tell):
        with pytest.raises(fa.ActorStoppedError, match="has stopped"):
            call(message())
    actor.stop()
    assert repr(actor) == "FlashAttnHandle('flash-attn', cpu, stopped, 0 unanswered)"


def test_an_actor_that_pykka_stopped_behind_our_back():
    device = HeldDevice()
    actor = FlashAttnActor.start(FlashAttnProps(device="cpu", max_in_flight=1), device)
    replies = [actor.ask(message(seed)) for seed in range(3)]
    device.wait_for(1)
    device.launches[0].complete()
    pykka.ActorRegistry.stop_all(block=False)
    for count in (2, 3):
        device.wait_for(count)
        device.complete_all()
    assert [reply.result(PATIENCE).out is not None for reply in replies] == [True] * 3
    actor.stop(timeout=PATIENCE)
    with pytest.raises(fa.ActorStoppedError):
        actor.ask(message())


def test_a_broadcast_that_is_no_message_is_left_alone():
    with FlashAttnActor.start() as actor:
        pykka.ActorRegistry.broadcast("hello")
        assert actor.ask(message()).result(PATIENCE).out is not None


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "1", 1j, np.float32(PATIENCE)])
def test_a_timeout_that_is_none(timeout: float):
    with FlashAttnActor.start() as actor, pytest.raises(fa.PropsError, match="timeout: got"):
        actor.ask(message(), timeout=timeout)


def test_an_overflow_that_is_none():
    with FlashAttnActor.start() as actor:
        with pytest.raises(fa.PropsError, match=r"overflow: got 'wait'; allowed are Overflow.WAIT, Overflow.REFUSE"):
            actor.ask(message(), overflow="wait")  # type: ignore[arg-type]
        with pytest.raises(fa.PropsError, match="overflow: got 'refuse'"):
            asyncio.run(actor.ask_async(message(), overflow="refuse"))  # type: ignore[arg-type]
        assert actor.unanswered == 0


def test_requests_on_a_cache_are_answered_and_others_are_no_paged_ones():
    request = paged()
    expected = fa.run(request)
    with FlashAttnActor.start(FlashAttnProps(device="cpu"), FlashAttnInner.reference()) as actor:
        for sent in (FlashAttnMsg.PagedForward(request), FlashAttnMsg.Forward(request)):
            made = actor.ask(sent).result(PATIENCE)
            np.testing.assert_array_equal(made.out, expected.out)
            np.testing.assert_array_equal(made.lse, expected.lse)
        assert actor.ask(FlashAttnMsg.PagedForward(request, lse=False)).result(PATIENCE).lse is None
        q, lengths = np.zeros((2, 1, 2, 8), np.float32), np.array([3, 3], np.int32)
        contiguous = fa.CachedFwdRequest(q, np.zeros((2, 4, 2, 8), np.float32), np.zeros((2, 4, 2, 8), np.float32), lengths)
        for other in (message().request, contiguous):
            with pytest.raises(fa.UnknownMessageError, match=r"allowed is a PagedAttentionRequest; send it as FlashAttnMsg.Forward"):
                actor.ask(FlashAttnMsg.PagedForward(other))
        assert actor.ask(FlashAttnMsg.Forward(contiguous)).result(PATIENCE).out.shape == q.shape


@pytest.mark.parametrize("flags", [{"lse": "x"}, {"lse": None}, {"dropout_mask": "no"}, {"lse": 2}])
def test_flags_of_a_message_that_are_none(flags: dict[str, object]):
    for kind in (FlashAttnMsg.Forward, FlashAttnMsg.PagedForward):
        if "dropout_mask" in flags and kind is FlashAttnMsg.PagedForward:
            continue
        with pytest.raises(fa.UnsupportedArgumentError, match=r"(lse|dropout_mask): got .*; allowed are True and False"):
            kind(message().request, **flags)  # type: ignore[arg-type]


def test_what_is_not_built_is_refused_by_name_in_its_own_reply():
    inner = FlashAttnInner.mock(arch=fa.SmArch.SM_90A)
    with FlashAttnActor.start(FlashAttnProps(device="cpu"), inner) as actor:
        q = np.zeros((1, 2, 2, 8), np.float16)
        asked = actor.ask(FlashAttnMsg.Forward(fa.Fa3FwdRequest(q, q, q, options=fa.AttentionOptions(batch_invariant=True))))
        with pytest.raises(fa.FeatureNotBuiltError) as caught:
            asked.result(PATIENCE)
        assert caught.value.feature == "fa3_batch_invariant"


def test_the_mock_answers_with_the_kernel_that_would_have_run():
    with FlashAttnActor.start(FlashAttnProps(device="cpu"), FlashAttnInner.mock(arch=SmArch.SM_90)) as actor:
        sent = message(dtype="float16")
        with pytest.raises(fa.MockAnswerError, match="computes nothing") as caught:
            actor.ask(sent).result(PATIENCE)
        key = sent.request.dispatch_key(SmArch.SM_90)
        spec = fa.lookup(key)
        assert caught.value.kernel_name == spec.kernel_name
        with pytest.raises(fa.ArchUnsupportedError, match="f32"):
            actor.ask(message(dtype="float32")).result(PATIENCE)


def numpy_resize(array: np.ndarray) -> None:
    array.resize((64,), refcheck=False)


def held_back(sent: FlashAttnMsg.Forward, spoil: object, *, in_flight: bool) -> None:
    """Spoil an array of a request that waits, or that is in flight."""
    device = HeldDevice()
    with FlashAttnActor.start(FlashAttnProps(device="cpu", max_in_flight=1), device) as actor:
        before = actor.ask(message(7))
        device.wait_for(1)
        if in_flight:
            device.launches[0].complete()
        reply = actor.ask(sent)
        if in_flight:
            device.wait_for(2)
            device.launches[1].computes = False  # the device has read its inputs
        spoil()  # type: ignore[operator]
        device.complete_all()
        with pytest.raises(fa.StaleArrayError, match=r"its memory changed between ask and reply.*keep them as they are"):
            reply.result(PATIENCE)
        assert before.result(PATIENCE).out is not None
        after = actor.ask(message(8))
        device.wait_for(3 if in_flight else 2)
        device.complete_all()
        assert after.result(PATIENCE).out is not None


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_numpy_array_resized_early(name: str, in_flight: bool):
    sent = message()
    arrays = {each: getattr(sent.request, each).copy() for each in "qkv"}
    request = fa.Fa2FwdRequest(**arrays)
    held_back(FlashAttnMsg.Forward(request), lambda: numpy_resize(arrays[name]), in_flight=in_flight)


@pytest.mark.torch
@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("how", ["freed", "resized", "shrunk"])
def test_a_torch_tensor_freed_or_resized_early(how: str, in_flight: bool):
    import torch

    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    request = fa.Fa2FwdRequest(q, k, v)
    spoil = {
        "freed": lambda: k.untyped_storage().resize_(0),
        "resized": lambda: k.resize_(1, 8, 2, 8),
        "shrunk": lambda: k.untyped_storage().resize_(64),
    }[how]
    held_back(FlashAttnMsg.Forward(request), spoil, in_flight=in_flight)


@pytest.mark.torch
def test_an_array_that_changed_since_its_request_was_made_is_not_accepted():
    import torch

    q = torch.randn(1, 4, 2, 8)
    request = fa.Fa2FwdRequest(q, q.clone(), q.clone())
    q.untyped_storage().resize_(0)
    with FlashAttnActor.start(FlashAttnProps(device="cpu")) as actor:
        with pytest.raises(fa.StaleArrayError, match="q: its memory changed since the request was made"):
            actor.ask(FlashAttnMsg.Forward(request))
        assert actor.unanswered == 0
