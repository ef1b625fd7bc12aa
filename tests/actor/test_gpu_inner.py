"""The real inner on a fake GPU: which stream waits for what, what is repeated, what is given back, what a lost GPU does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnInner, FlashAttnMsg, FlashAttnProps
from atomr_accel_flashattn.actor.gpu import CudaEvents, GpuInner, StreamEvent
from atomr_accel_flashattn.runtime import staleness
from tests.actor.calls import expected, sent
from tests.fakes.arrays import FakeArray
from tests.fakes.driver import FakeDriver
from tests.fakes.gpu import FakeGpu
from tests.fakes.waiting import PATIENCE, until

if TYPE_CHECKING:
    from atomr_accel_flashattn.actor import Job

NAMES = ("q", "k", "v", "alibi_slopes", "learned_sink", "cu_seqlens_q", "cu_seqlens_k", "rng", "out")


QUESTIONS = {"query", "synchronize"}  # by the caller who waits, or by the completion thread for him


def enqueued(cuda: FakeDriver) -> list[tuple[Any, ...]]:
    """What was asked of streams, in order."""
    return [entry for entry in cuda.log if entry[0] not in {"push", "context", *QUESTIONS}]


def kinds(cuda: FakeDriver) -> list[str]:
    return [entry[0] for entry in enqueued(cuda)]


def test_a_launch_waits_for_the_callers_stream_and_the_reply_for_the_launch(cuda: FakeDriver):
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        message = sent(lse=True)
        output = actor.ask(message).result(PATIENCE)
    host = expected(message)
    np.testing.assert_array_equal(output.out.array, host.out)
    np.testing.assert_array_equal(output.lse.array, host.lse)
    assert kinds(cuda) == ["stream", "record", "wait", "launch", "record", "destroy"]
    _, record, wait, launch, done, _ = enqueued(cuda)
    assert record[2] == 1, "the caller's stream: the legacy default one, for arrays of a library without streams"
    assert wait == ("wait", record[1], 500)
    assert launch[1] == done[2] == 500
    assert {entry[1] for entry in cuda.log if entry[0] in QUESTIONS} == {done[1]}
    assert cuda.live_events == 0
    assert cuda.log.count(("context", 90)) == 2


def test_on_the_callers_own_stream_there_is_nothing_to_wait_for(cuda: FakeDriver):
    for stream in (0, 1):
        with FlashAttnActor.start(FlashAttnProps(device="cuda:0", stream=stream)) as actor:
            actor.ask(sent(seqlen=4 + stream)).result(PATIENCE)  # repeats none
        assert kinds(cuda) == ["launch", "record"]
        cuda.log.clear()


def test_events_of_requests_that_were_never_launched_are_used_again(cuda: FakeDriver):
    inner = FlashAttnInner.gpu()
    for _ in range(50):
        inner.accept(sent())
    assert cuda.live_events <= 2
    inner.close()
    assert cuda.live_events == 0


def test_a_request_for_another_gpu(cuda: FakeDriver):
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor, pytest.raises(fa.DeviceMismatchError, match="cuda:1"):
        actor.ask(sent(index=1))


def test_a_sticky_error_fails_all_and_stops_the_actor(cuda: FakeDriver):
    actor = FlashAttnActor.start(FlashAttnProps(device="cuda:0"))
    actor.ask(sent()).result(PATIENCE)
    cuda.sticky = True
    for seqlen in range(5, 8):  # repeat none
        try:
            reply = actor.ask(sent(seqlen=seqlen))
        except fa.ActorStoppedError as error:
            assert isinstance(error.__cause__, fa.DeviceLostError)  # noqa: PT017 - whether the next one still gets in is a race
        else:
            with pytest.raises(fa.DeviceLostError) as lost:
                reply.result(PATIENCE)
            assert lost.value.cuda_error == "CUDA_ERROR_ILLEGAL_ADDRESS"
    actor.stop(timeout=PATIENCE)
    with pytest.raises(fa.ActorStoppedError, match="device was lost"):
        actor.ask(sent())


def test_events_that_wait_are_those_that_were_recorded_last(cuda: FakeDriver):
    events = CudaEvents(3)
    first = events.take(7, in_context=False)
    events.give_back(first)
    assert events.take(0, in_context=False) == first
    assert cuda.log == [("push", 3), ("record", first, 7), ("push", 3), ("record", first, 0)]


def test_a_caller_whom_a_stop_overtakes_records_no_destroyed_event_and_leaves_none(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch):
    prepare = GpuInner.prepare
    actor = FlashAttnActor.start(FlashAttnProps(device="cuda:0"))
    actor.ask(sent()).result(PATIENCE)  # leaves events to be used again

    def overtaken(inner: GpuInner, message: FlashAttnMsg.Forward) -> Job:
        actor.stop()
        return prepare(inner, message)

    monkeypatch.setattr(GpuInner, "prepare", overtaken)
    with pytest.raises(fa.ActorStoppedError):
        actor.ask(sent(seqlen=5))  # repeats none
    assert kinds(cuda)[-2:] == ["destroy", "record"]
    assert cuda.live_events == 0


def test_an_event_that_comes_back_after_the_end_is_destroyed(cuda: FakeDriver):
    events = CudaEvents(0)
    late = events.take(7, in_context=False)
    events.close()
    assert cuda.alive == {late}, "somebody may still ask about it"
    events.give_back(late)
    assert cuda.live_events == 0


def test_an_event_that_could_not_be_recorded_is_used_again(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch):
    events = CudaEvents(0)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "cuEventRecord", lambda *_: (1,))
        with pytest.raises(fa.LaunchError, match="cuEventRecord failed: error 1"):
            events.take(7, in_context=False)
    events.take(7, in_context=False)
    assert cuda.live_events == 1


def test_the_event_that_a_launch_waits_for_becomes_that_of_its_end(cuda: FakeDriver):
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        actor.ask(sent()).result(PATIENCE)
        (_, ready, theirs), (_, waited, _), (_, ended, ours) = (entry for entry in cuda.log if entry[0] in {"record", "wait"})
    assert ready == waited == ended
    assert (theirs, ours) == (1, 500)


def test_a_launch_that_fails_after_its_wait_leaves_an_event_to_wait_for_again(gpu: FakeGpu, cuda: FakeDriver):
    inner = GpuInner(0)
    job = inner.accept(sent())
    gpu.status = 701
    with pytest.raises(fa.LaunchError):
        inner.launch(job)
    gpu.status = 0
    launch = inner.launch(job)
    assert [entry[0] for entry in cuda.log if entry[0] in {"wait", "launch"}] == ["wait", "wait", "launch"]
    assert job.ready is None
    assert launch.poll()
    del launch
    inner.close()
    assert cuda.live_events == 0


def test_an_event_of_a_default_stream_is_recorded_in_the_context_of_its_device(cuda: FakeDriver):
    inner = GpuInner(0)
    cuda.current = 70
    cuda.log.clear()
    inner.accept(sent())
    assert [entry[0] for entry in cuda.log] == ["push", "push", "record"]


@pytest.mark.parametrize(("call", "answer"), [("cuCtxGetCurrent", (201, 0)), ("cuStreamWaitEvent", (201,)), ("cuEventQuery", (201,))])
def test_an_error_of_the_driver_is_told_by_the_call_that_met_it(
    cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch, call: str, answer: tuple[int, ...]
):
    event = StreamEvent(CudaEvents(0), 7)
    monkeypatch.setattr(cuda, call, lambda *_: answer)
    asked = {
        "cuCtxGetCurrent": event._events.current_context,
        "cuStreamWaitEvent": lambda: event.make_wait(500),
        "cuEventQuery": event.poll,
    }
    with pytest.raises(fa.LaunchError, match="failed: error 201"):
        asked[call]()


def test_a_gpu_array_that_changed_in_flight_fails_its_own_request(cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(staleness._readers, FakeArray, lambda array: (array.array.ctypes.data, array.array.shape))
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        cuda.hold()
        moved, kept = sent(1, seqlen=4), sent(2, seqlen=5)  # neither repeats the other
        replies = [actor.ask(moved), actor.ask(kept)]
        until(lambda: len(cuda.launchers) == 2)
        moved.request.k.source.array = moved.request.k.source.array.copy()
        cuda.complete()
        with pytest.raises(fa.StaleArrayError, match="k: its memory changed between ask and reply"):
            replies[0].result(PATIENCE)
        assert replies[1].result(PATIENCE).out is not None
        with pytest.raises(fa.StaleArrayError, match="k: its memory changed since the request was made"):
            actor.ask(moved)


@pytest.mark.parametrize("name", NAMES)
def test_every_gpu_array_is_looked_at_and_told_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(staleness._readers, FakeArray, lambda array: (array.array.ctypes.data, array.array.shape))
    infos = {each: FakeArray(np.zeros(4, np.float32)).info() for each in NAMES}
    problem = SimpleNamespace(cache=None, descales=None, **infos, dropout=SimpleNamespace(rng=infos["rng"]))
    request: Any = SimpleNamespace(problem=problem, out_array=infos["out"])
    fingerprint = staleness.Fingerprint.of(request)
    fingerprint.check()
    infos[name].source.array = infos[name].source.array.copy()
    with pytest.raises(fa.StaleArrayError, match=f"^{name}: its memory changed between ask and reply"):
        fingerprint.check()
    with pytest.raises(fa.StaleArrayError, match=f"^{name}: its memory changed since the request was made"):
        staleness.Fingerprint.of(request)


def test_a_stream_that_every_thread_has_its_own_of_is_refused(cuda: FakeDriver):
    with pytest.raises(fa.PropsError, match="stream: got the per-thread default stream"):
        FlashAttnActor.start(FlashAttnProps(device="cuda:0", stream=2))
    assert cuda.live_events == 0
