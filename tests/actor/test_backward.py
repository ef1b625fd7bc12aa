"""Backward messages: answered with gradients, in the order of all messages, by every inner."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from concurrent.futures import CancelledError
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnInner, FlashAttnMsg, FlashAttnProps, SmArch
from atomr_accel_flashattn.kernels.spec import Family
from atomr_accel_flashattn.runtime import staleness
from tests.actor.calls import backward, check_gradients, expire, message, sent, sent_backward, start
from tests.fakes.arrays import FakeArray
from tests.fakes.driver import FakeDriver
from tests.fakes.gpu import FakeGpu
from tests.fakes.inner import HeldDevice
from tests.fakes.waiting import PATIENCE, until

THREE = ["bwd_preprocess", "fa2_bwd", "bwd_postprocess"]


class Own:
    """A backward request of the caller's, which may want another family."""

    def __init__(self, request: fa.Fa2BwdRequest, family: Family | None = None) -> None:
        self.request = request
        self.problem, self.gradient_arrays = request.problem, request.gradient_arrays
        self.family = family

    def dispatch_key(self, arch: SmArch | None = None) -> fa.DispatchKey:
        key = self.request.dispatch_key(arch)
        return key if self.family is None else replace(key, extras=replace(key.extras, family=self.family))


def check_equal(answer: fa.Gradients, asked: FlashAttnMsg.Backward) -> None:
    direct = fa.run(asked.request)
    assert isinstance(answer, fa.Gradients)
    for each in fields(direct):
        np.testing.assert_array_equal(getattr(answer, each.name), getattr(direct, each.name))


def launched(gpu: FakeGpu) -> list[str]:
    return [spec.HEADER for spec, *_ in gpu.launches]


def test_answers_are_those_of_run():
    sink = fa.AttentionOptions(learned_sink=np.ones(2, np.float32))
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 9, 2, 8)).astype(np.float32)
    packed = fa.VarlenBwdRequest(q, k, v, dout=dout, cu_seqlens_q=fa.CumulativeSeqlens.from_lengths([4, 5]), recompute=True)
    asked = [backward(0), backward(1, options=sink), backward(2, deterministic=True), FlashAttnMsg.Backward(packed)]
    with FlashAttnActor.start(FlashAttnProps(device="cpu")) as actor:
        for each, reply in zip(asked, [actor.ask(each) for each in asked], strict=True):
            check_equal(reply.result(PATIENCE), each)
        check_equal(asyncio.run(actor.ask_async(asked[1])), asked[1])


def test_gradients_go_into_the_callers_arrays_told_or_asked(caplog: pytest.LogCaptureFixture):
    direct = fa.run(backward().request)
    arrays = {name: np.full_like(getattr(direct, name), np.nan) for name in ("dq", "dk", "dv")}
    asked = backward(**arrays)
    with FlashAttnActor.start(FlashAttnProps(device="cpu")) as actor:
        answer = actor.ask(asked).result(PATIENCE)
        for name, array in arrays.items():
            assert getattr(answer, name) is array
            array[...] = np.nan
        actor.tell(asked)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, getattr(direct, name))
    with FlashAttnActor.start(FlashAttnProps(device="cpu"), FlashAttnInner.mock()) as actor, caplog.at_level(logging.ERROR):
        actor.tell(asked)
    assert "a request that was told failed" in caplog.text


def test_both_kinds_are_launched_and_answered_in_the_order_in_which_they_came(device: HeldDevice):
    asked: list[Any] = [backward(seed) if seed % 2 else message(seed) for seed in range(6)]
    answered: list[int] = []
    with start(device, max_in_flight=2) as actor:
        replies = [actor.ask(each) for each in asked]
        for number, reply in enumerate(replies):
            reply.add_done_callback(lambda _, number=number: answered.append(number))
        for count in range(1, 7):
            device.wait_for(count)
            device.launches[count - 1].complete()
        for each, reply in zip(asked, replies, strict=True):
            assert isinstance(reply.result(PATIENCE), fa.Gradients if isinstance(each, FlashAttnMsg.Backward) else fa.Output)
    assert [launch.job.message for launch in device.launches] == asked
    assert answered == [*range(6)]


def test_a_timeout_and_a_cancel_before_the_launch(device: HeldDevice):
    with start(device, max_in_flight=1) as actor:
        first, late, cancelled, last = (actor.ask(backward(seed)) for seed in range(4))
        device.wait_for(1)
        expire(actor, late)
        with pytest.raises(fa.RequestTimeoutError):
            late.result(PATIENCE)
        assert cancelled.cancel()
        assert not first.cancel()
        device.launches[0].complete()
        device.wait_for(2)
        device.complete_all()
        with pytest.raises(CancelledError):
            cancelled.result(PATIENCE)
        check_equal(first.result(PATIENCE), backward(0))
        check_equal(last.result(PATIENCE), backward(3))
    assert len(device.launches) == 2


@pytest.mark.parametrize("name", ["k", "out", "lse", "dout", "dq"])
def test_an_array_that_changes_before_the_answer_fails_its_own_request(device: HeldDevice, name: str):
    template = backward().request
    given = {each: getattr(template, each).copy() for each in ("q", "k", "v", "out", "dout", "lse")}
    given["dq"] = np.empty_like(given["q"])
    asked = FlashAttnMsg.Backward(fa.Fa2BwdRequest(**given))
    with start(device, max_in_flight=2) as actor:
        reply, other = actor.ask(asked), actor.ask(backward())
        device.wait_for(2)
        device.launches[0].computes = False  # the device has read its inputs
        given[name].resize((1,), refcheck=False)
        device.complete_all()
        with pytest.raises(fa.StaleArrayError, match=f"^{name}: its memory changed between ask and reply"):
            reply.result(PATIENCE)
        check_equal(other.result(PATIENCE), backward())
        with pytest.raises(fa.StaleArrayError, match=f"^{name}: its memory changed since the request was made"):
            actor.ask(asked)


def test_a_request_for_another_device_and_an_actor_that_has_stopped(gpu: FakeGpu):
    actor = FlashAttnActor.start(FlashAttnProps(device="cpu"))
    with pytest.raises(fa.DeviceMismatchError, match="got a request on cuda:0 for an actor on cpu"):
        actor.ask(sent_backward())
    actor.stop()
    with pytest.raises(fa.ActorStoppedError):
        actor.ask(backward())
    assert not gpu.launches


def test_the_mock_names_the_kernel_that_would_have_run():
    with FlashAttnActor.start(FlashAttnProps(device="cpu"), FlashAttnInner.mock(arch=SmArch.SM_90)) as actor:
        host = backward().request
        half = {name: getattr(host, name).astype(np.float16) for name in ("q", "k", "v", "dout")}
        asked = FlashAttnMsg.Backward(fa.Fa2BwdRequest(**half, recompute=True))
        with pytest.raises(fa.MockAnswerError) as caught:
            actor.ask(asked).result(PATIENCE)
        assert caught.value.kernel_name == fa.lookup(asked.request.dispatch_key(SmArch.SM_90)).kernel_name
        assert caught.value.kernel_name.startswith("fa2_bwd")
        with pytest.raises(fa.ArchUnsupportedError, match="f32"):
            actor.ask(backward()).result(PATIENCE)


def test_what_no_kernel_does_is_told_in_its_own_reply_and_allocates_nothing(gpu: FakeGpu):
    refused = FlashAttnMsg.Backward(Own(sent_backward().request, family=Family.FA3))
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        replies = [actor.ask(sent_backward()), actor.ask(refused), actor.ask(sent_backward())]
        with pytest.raises(fa.FeatureNotBuiltError) as caught:
            replies[1].result(PATIENCE)
        assert caught.value.feature == "fa3_backward"
        for reply in replies[::2]:
            check_gradients(reply.result(PATIENCE), sent_backward())
    assert len(gpu.workspaces) == 2


@pytest.mark.parametrize("recompute", [False, True])
def test_kernels_go_to_the_actors_stream_behind_the_callers(gpu: FakeGpu, cuda: FakeDriver, recompute: bool):
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        asked = sent_backward(recompute=recompute)
        check_gradients(actor.ask(asked).result(PATIENCE), asked)
    whats = [entry[0] for entry in cuda.log if entry[0] in {"record", "wait", "launch"}]
    assert whats == ["record", "wait", *["launch"] * (4 if recompute else 3), "record"]
    assert launched(gpu)[-3:] == THREE
    assert {stream for *_, stream in gpu.launches} == {500}
    assert gpu.workspaces[0][1] is False, "the actor keeps it until the device is done"
    assert not gpu.used_on
    assert cuda.live_events == 0


def test_a_repeated_backward_is_launched_in_the_callers_thread(gpu: FakeGpu, cuda: FakeDriver):
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        actor.ask(sent_backward()).result(PATIENCE)
        until(lambda: not actor._engine._busy, "an actor's thread that has nothing to do")
        before = len(cuda.launchers)
        for seed in range(1, 4):
            asked = sent_backward(seed)
            check_gradients(actor.ask(asked).result(PATIENCE), asked)
        assert set(cuda.launchers[before:]) == {"MainThread"}
        assert gpu.repeated == [False] * 3 + [True] * 9
        given = {f"d{name}": FakeArray(np.zeros((1, 4, 2, 16), np.float16)).info() for name in "qkv"}
        asked = sent_backward(5, **given)
        answer = actor.ask(asked).result(PATIENCE)
        for name, info in given.items():
            assert getattr(answer, name) is info, "what the caller gave"
        check_gradients(fa.Gradients(*(info.source for info in given.values())), asked)


def test_both_kinds_are_in_flight_on_one_stream(gpu: FakeGpu, cuda: FakeDriver):
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0", max_in_flight=4)) as actor:
        cuda.hold()
        asked: list[Any] = [sent_backward(seed) if seed % 2 else sent(seed) for seed in range(4)]
        replies = [actor.ask(each) for each in asked]
        until(lambda: len(gpu.launches) == 8, "the launches of both kinds")
        assert not any(reply.done() for reply in replies)
        cuda.complete()
        for each, reply in zip(asked, replies, strict=True):
            answer = reply.result(PATIENCE)
            if isinstance(each, FlashAttnMsg.Backward):
                check_gradients(answer, each)


def test_the_workspace_lives_until_the_device_is_done_and_no_longer(gpu: FakeGpu, cuda: FakeDriver):
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        cuda.hold()
        reply = actor.ask(sent_backward(), timeout=3600)
        until(lambda: len(gpu.launches) == 3, "three launches")
        (ticket,) = actor._mailbox.all_unsettled()
        workspace = weakref.ref(ticket.job.outputs.workspace.source)
        inputs = weakref.ref(ticket.job.request.q.source)
        expire(actor, reply)
        with pytest.raises(fa.RequestTimeoutError):
            reply.result(PATIENCE)
        del ticket, reply
        gc.collect()
        assert workspace() is not None, "kernels still write there"
        cuda.complete()
        until(lambda: gc.collect() is not None and workspace() is None and inputs() is None, "the end of the arrays")


def test_a_launch_that_fails_halfway_is_answered_when_the_first_kernel_has_run(
    gpu: FakeGpu, cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch
):
    on_launch, refused = gpu.on_launch, {1}  # launches, by how many were made before

    monkeypatch.setattr(gpu, "on_launch", lambda *arguments: 701 if len(gpu.launches) in refused else on_launch(*arguments))
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        cuda.hold()
        reply = actor.ask(sent_backward())
        until(lambda: any(entry[0] == "synchronize" for entry in cuda.log), "a wait for the first kernel")
        assert not reply.done()
        cuda.complete()
        assert isinstance(reply.exception(PATIENCE), fa.LaunchError)
        assert launched(gpu) == THREE[:1]
        refused.clear()
        check_gradients(actor.ask(sent_backward()).result(PATIENCE), sent_backward())
        del reply  # its error has the event in its traceback
        gc.collect()
    assert cuda.live_events == 0


def test_a_gpu_array_that_changed_in_flight(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(staleness._readers, FakeArray, lambda array: (array.array.ctypes.data, array.array.shape))
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        cuda.hold()
        asked = sent_backward()
        reply = actor.ask(asked)
        until(lambda: len(cuda.launchers) == 3)
        asked.request.dout.source.array = asked.request.dout.source.array.copy()
        cuda.complete()
        with pytest.raises(fa.StaleArrayError, match="dout: its memory changed between ask and reply"):
            reply.result(PATIENCE)


def test_a_lost_device_fails_what_is_in_flight(cuda: FakeDriver):
    actor = FlashAttnActor.start(FlashAttnProps(device="cuda:0"))
    cuda.hold()
    reply = actor.ask(sent_backward())
    until(lambda: len(cuda.launchers) == 3)
    cuda.sticky = True
    cuda.complete()
    with pytest.raises(fa.DeviceLostError):
        reply.result(PATIENCE)
    actor.stop(timeout=PATIENCE)


def test_a_request_of_the_callers_own_class():
    own = Own(backward().request)
    assert isinstance(own, fa.FaBwdDispatch)
    with FlashAttnActor.start(FlashAttnProps(device="cpu")) as actor:
        check_equal(actor.ask(FlashAttnMsg.Backward(own)).result(PATIENCE), backward())
