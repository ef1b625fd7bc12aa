"""The pool above a Ray made of Python: whatever Ray refuses, and whoever is interrupted, everybody is answered and no worker is left."""

from __future__ import annotations

import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnMsg, FlashAttnPool, Overflow
from atomr_accel_flashattn.actor.ray.wire import WireRequest
from tests.actor.calls import expire, message
from tests.actor.fake_ray import FakeRay, FakeWorker, RayError, RayTaskError, start_pool
from tests.fakes.waiting import PATIENCE, until

Start = Callable[..., FlashAttnPool]


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, ray: FakeRay) -> Start:
    return lambda *workers, **options: start_pool(monkeypatch, ray, *workers, **options)


def called(worker: FakeWorker, count: int = 1) -> None:
    until(lambda: len(worker.calls) == count)


def refuse() -> None:
    raise ValueError("no more of these")


def leave(_: object) -> None:
    raise SystemExit


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_worker_that_cannot_be_replaced_leaves_its_requests_to_the_others(ray: FakeRay, start: Start):
    pool = start(2)
    replies = [pool.ask(message(seed)) for seed in range(2)]
    for worker in ray.workers:
        called(worker)
    ray.start_worker = refuse
    ray.workers[0].calls[0].set_exception(RayError("dead"))
    called(ray.workers[1], 2)
    assert ray.killed == ray.workers[:1]
    ray.workers[1].answer(0)
    ray.workers[1].answer(1)
    assert all(reply.result(PATIENCE).out is not None for reply in replies)
    pool.stop(timeout=PATIENCE)


def test_the_last_worker_that_cannot_be_replaced_fails_all(ray: FakeRay, start: Start):
    pool = start(window=1)
    replies = [pool.ask(message(seed)) for seed in range(3)]
    called(ray.workers[0])
    ray.start_worker = refuse
    ray.workers[0].calls[0].set_exception(RayError("dead"))
    for reply in replies:
        assert isinstance(reply.exception(PATIENCE), fa.WorkerLostError)
    with pytest.raises(fa.ActorStoppedError, match="all workers are lost"):
        pool.ask(message())
    pool.stop(timeout=PATIENCE)


def test_a_worker_that_cannot_say_its_answer_is_not_lost(ray: FakeRay, start: Start):
    pool = start()
    failing, other = pool.ask(message()), pool.ask(message())
    called(ray.workers[0], 2)
    ray.workers[0].calls[0].set_exception(RayTaskError("not to be pickled"))
    ray.workers[0].answer(1)
    assert isinstance(failing.exception(PATIENCE), RayTaskError)
    assert other.result(PATIENCE).out is not None
    assert ray.killed == []
    pool.stop(timeout=PATIENCE)


def test_a_request_whose_time_is_over_is_not_sent_again(ray: FakeRay, start: Start):
    pool = start(2)
    late = pool.ask(message())
    until(lambda: any(worker.calls for worker in ray.workers), "the call of a worker")
    (worker,) = [worker for worker in ray.workers if worker.calls]
    expire(pool, late)
    assert isinstance(late.exception(PATIENCE), fa.RequestTimeoutError)
    worker.calls[0].set_exception(RayError("dead"))
    until(lambda: pool.unanswered == 0)
    assert sum(len(worker.calls) for worker in ray.workers) == 1
    pool.stop(timeout=PATIENCE)


def test_a_call_that_ray_refuses_is_the_answer_to_its_request(ray: FakeRay, start: Start):
    pool = start()
    ray.workers[0].run.remote = lambda *_: refuse()
    assert isinstance(pool.ask(message()).exception(PATIENCE), ValueError)
    assert pool.loads == {1: 0}
    pool.stop(timeout=PATIENCE)


@pytest.mark.parametrize("where", ["start_worker", "wait"])
def test_a_start_that_is_interrupted_leaves_no_worker_and_no_thread(ray: FakeRay, start: Start, where: str):
    setattr(ray, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(2)
    assert ray.killed == ray.workers
    until(lambda: "fake-pool" not in {thread.name for thread in threading.enumerate()})


def test_a_worker_that_cannot_be_ended_does_not_keep_the_others(ray: FakeRay, start: Start, monkeypatch: pytest.MonkeyPatch):
    pool = start(2)
    kill = ray.kill
    monkeypatch.setattr(ray, "kill", lambda worker: kill(worker) or refuse())
    pool.stop(timeout=PATIENCE)
    assert ray.killed == ray.workers


def test_who_waits_in_a_stop_is_released_by_a_shorter_one(ray: FakeRay, start: Start):
    pool = start()
    reply = pool.ask(message())
    called(ray.workers[0])
    patient = threading.Thread(target=pool.stop, daemon=True)
    patient.start()
    until(lambda: not pool.is_alive)
    pool.stop(timeout=0.01)
    assert isinstance(reply.exception(PATIENCE), fa.ActorStoppedError)
    patient.join(PATIENCE)
    assert not patient.is_alive()


def test_a_callback_that_exits_in_a_stop_keeps_nobody_from_being_answered(ray: FakeRay, start: Start):
    pool = start(window=1)
    replies = [pool.ask(message(seed)) for seed in range(3)]
    called(ray.workers[0])
    replies[1].add_done_callback(leave)
    stopping = threading.Thread(target=pool.stop, kwargs={"drain": False})
    stopping.start()
    assert [type(reply.exception(PATIENCE)) for reply in replies[1:]] == [fa.ActorStoppedError] * 2
    ray.workers[0].answer()
    stopping.join(PATIENCE)
    assert replies[0].exception(0) is None


def test_who_gave_up_queueing_is_not_kept(ray: FakeRay, start: Start):
    pool = start(window=1, props={"mailbox_limit": 1})
    kept = [pool.ask(message())]
    called(ray.workers[0])
    kept.append(pool.ask(message()))
    request = message()
    array = weakref.ref(request.request.q)
    with pytest.raises(fa.RequestTimeoutError, match="no place in the mailbox"):
        pool.ask(request, timeout=0.01, overflow=Overflow.WAIT)
    del request
    gc.collect()
    assert array() is None
    assert pool.waiting == 1
    pool.stop(timeout=0.01)


def test_a_callback_may_stop_the_pool(ray: FakeRay, start: Start):
    pool = start()
    stopped = threading.Event()
    reply = pool.ask(message())
    reply.add_done_callback(lambda _: (pool.stop(), stopped.set()))
    called(ray.workers[0])
    ray.workers[0].answer()
    assert stopped.wait(PATIENCE)
    pool.stop(timeout=PATIENCE)
    assert ray.killed == ray.workers


@pytest.mark.parametrize(
    "bad", [{"workers": 0}, {"window": 0}, {"retries": -1}, {"replacements": 1.5}, {"props": {"device": "cuda:0", "stream": 1}}]
)
def test_options_that_are_not_allowed(ray: FakeRay, start: Start, bad: dict[str, Any]):
    with pytest.raises(fa.PropsError, match="got"):
        start(**bad)


def test_without_ray_there_is_a_named_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(fa.RayMissingError, match="pip install") as caught:
        FlashAttnPool.start(1)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("request_of", [fa.DenseFwdRequest, fa.Fa2FwdRequest, fa.Fa3FwdRequest, fa.VarlenFwdRequest])
def test_a_request_is_the_same_after_its_way_over_the_wire(request_of: type[fa.DenseFwdRequest]):
    packed = request_of is fa.VarlenFwdRequest
    q = np.arange(64, dtype=np.float16).reshape((4, 2, 8) if packed else (1, 4, 2, 8))
    given: dict[str, Any] = {"mask": fa.MaskKind.causal(), "options": fa.AttentionOptions(softcap=2.0, dropout_p=0.5, rng=np.array([1, 2]))}
    if packed:
        given["cu_seqlens_q"] = fa.CumulativeSeqlens.from_lengths([1, 3])
    if request_of is fa.Fa3FwdRequest:
        given["persistent"] = fa.PersistentMode.Persistent(7)
    sent = request_of(q, q, q, **given)
    wire, arrays = pickle.loads(pickle.dumps(WireRequest.pack(FlashAttnMsg.Forward(sent, lse=False, dropout_mask=True))))  # noqa: S301 - our own bytes
    came = wire.unpack(tuple(arrays), fa.Device("cpu", 0))
    assert (came.lse, came.dropout_mask) == (False, True)
    assert type(came.request) is request_of
    assert getattr(came.request, "persistent", None) == getattr(sent, "persistent", None)
    direct, output = (fa.run(each, dropout_mask=True) for each in (sent, came.request))
    np.testing.assert_array_equal(output.out, direct.out)
    np.testing.assert_array_equal(output.dropout_mask, direct.dropout_mask)


@pytest.mark.parametrize("request_of", [fa.Fa3FwdFp8Request, fa.Fa2FwdRequest, fa.VarlenFwdRequest])
@pytest.mark.parametrize(
    "descale", [None, np.asarray(0.5, np.float32), np.broadcast_to(np.float32(2), (1, 2))], ids=["none", "tensor", "head"]
)
def test_fp8_is_the_same_after_its_way_over_the_wire(request_of: type[fa.DenseFwdRequest], descale: Any):
    packed = request_of is fa.VarlenFwdRequest
    rng = np.random.default_rng(0)
    kinds = (ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
    arrays = [rng.standard_normal((4, 2, 16) if packed else (1, 4, 2, 16)).astype(kind) for kind in kinds]
    given: dict[str, Any] = {"cu_seqlens_q": fa.CumulativeSeqlens.from_lengths([4])} if packed else {}
    sent = request_of(
        *arrays, fp8=fa.Fp8Options(k_descale=descale, v_descale=descale, out_dtype=fa.DType.F32, single_level=packed), **given
    )
    wire, bits = pickle.loads(pickle.dumps(WireRequest.pack(FlashAttnMsg.Forward(sent, lse=False))))  # noqa: S301 - our own bytes
    assert {array.dtype.name for array in bits} <= {"uint8", "float32", "int32"}
    came = wire.unpack(tuple(bits), fa.Device("cpu", 0)).request
    assert type(came) is request_of
    assert came.problem.descales.q is None
    assert came.problem.single_level is packed
    np.testing.assert_array_equal(fa.run(came).out, fa.run(sent).out)
