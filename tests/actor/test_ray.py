"""The pool on a local Ray cluster without GPUs: two workers, one of them killed. One cluster for the whole file."""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnMsg, FlashAttnPool, FlashAttnProps, Overflow
from atomr_accel_flashattn.actor.ray import pool as pool_module
from atomr_accel_flashattn.actor.ray.wire import WireArray
from tests.actor.calls import backward, message, paged
from tests.fakes.waiting import until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'atomr-accel-flashattn[ray]'")

# Its warnings about its own future, and sockets and files that it closes when the interpreter ends.
pytestmark = [
    pytest.mark.timeout(90),
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "ResourceWarning", "DeprecationWarning")),
]

PATIENCE = 30.0
SLOW = 2500  # tokens that keep a worker busy for a good part of a second


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=128 << 20,
        runtime_env={"env_vars": {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[FlashAttnPool]:
    with FlashAttnPool.start(2, FlashAttnProps(device="cpu", label="pool")) as made:
        yield made


def kill_one(pool: FlashAttnPool) -> None:
    os.kill(min(pool.processes().items())[1], signal.SIGKILL)


def slow(seed: int = 0) -> FlashAttnMsg.Forward:
    return message(seed, seqlen_q=SLOW, seqlen_k=SLOW)


def check_equal(got: Any, expected: Any) -> None:
    """Up to rounding: BLAS sums in another order with another number of threads, and workers have one."""
    assert got.dtype == expected.dtype
    tolerance = 1e-2 if expected.dtype == ml_dtypes.bfloat16 else 1e-4
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance)


def test_answers_are_those_of_direct_calls(pool: FlashAttnPool):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 300, 2, 64)).astype(np.float32)  # 300 KB each: through the object store
    packed = rng.standard_normal((3, 9, 2, 8)).astype(np.float16)
    offsets = fa.CumulativeSeqlens.from_lengths([4, 5])
    options = fa.AttentionOptions(dropout_p=0.5, rng=np.array([1, 2]), softcap=2.0, learned_sink=np.ones(2, np.float32))
    requests = [
        message(1).request,
        fa.DenseFwdRequest(q, k, v),
        fa.Fa2FwdRequest(q, k, v, mask=fa.MaskKind.sliding_causal(20), sink_tokens=2, bias=fa.PositionBias.alibi(np.ones(2, np.float32))),
        fa.Fa2FwdRequest(*(array.astype(ml_dtypes.bfloat16) for array in (q, k, v)), options=options),
        fa.VarlenFwdRequest(*packed, cu_seqlens_q=offsets, mask=fa.MaskKind.causal()),
    ]
    replies = [pool.ask(FlashAttnMsg.Forward(request, dropout_mask=True)) for request in requests]
    for request, reply in zip(requests, replies, strict=True):
        direct, output = fa.run(request, dropout_mask=True), reply.result(PATIENCE)
        for name in ("out", "lse", "dropout_mask"):
            expected, got = getattr(direct, name), getattr(output, name)
            assert (got is None) == (expected is None)
            if expected is not None:
                check_equal(got, expected)


@pytest.mark.torch
def test_torch_tensors_come_back_as_torch_tensors(pool: FlashAttnPool):
    import torch

    q, k, v = (torch.randn(1, 6, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    out = torch.empty_like(q)
    direct = fa.run(fa.Fa2FwdRequest(q, k, v))
    output = pool.ask(FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, k, v))).result(PATIENCE)
    assert torch.equal(output.out, direct.out)
    assert torch.equal(output.lse, direct.lse)
    output = pool.ask(FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, k, v, out=out))).result(PATIENCE)
    assert output.out is out
    assert torch.equal(out, direct.out)


def test_gradients_are_those_of_direct_calls(pool: FlashAttnPool):
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 2, 300, 2, 64)).astype(np.float32)  # 300 KB each: through the object store
    options = fa.AttentionOptions(dropout_p=0.5, rng=np.array([1, 2]), softcap=2.0, learned_sink=np.ones(2, np.float32))
    band = {"mask": fa.MaskKind.sliding_causal(20), "sink_tokens": 2, "bias": fa.PositionBias.alibi(np.ones(2, np.float32))}
    half = [array.astype(ml_dtypes.bfloat16) for array in (q, k, v, dout)]
    packed = rng.standard_normal((4, 9, 2, 8)).astype(np.float16)
    offsets = fa.CumulativeSeqlens.from_lengths([4, 5])
    into = {f"d{name}": np.full_like(array, np.nan) for name, array in (("q", q), ("v", v))}
    dlse = rng.standard_normal((2, 2, 300)).astype(np.float32)
    requests = [
        backward(1).request,
        backward(2, deterministic=True).request,
        fa.DenseBwdRequest(q, k, v, dout=dout, dlse=dlse, recompute=True, **band, **into),
        fa.Fa2BwdRequest(*half[:3], dout=half[3], recompute=True, options=options),
        fa.VarlenBwdRequest(*packed[:3], dout=packed[3], recompute=True, cu_seqlens_q=offsets, mask=fa.MaskKind.causal()),
    ]
    answers = [reply.result(PATIENCE) for reply in [pool.ask(FlashAttnMsg.Backward(request)) for request in requests]]
    assert all(getattr(answers[2], name) is array for name, array in into.items())
    for request, answer in zip(requests, answers, strict=True):
        got = {name: None if (array := getattr(answer, name)) is None else array.copy() for name in ("dq", "dk", "dv", "dsink")}
        direct = fa.run(request)
        for name, array in got.items():
            assert (array is None) == (getattr(direct, name) is None)
            if array is not None:
                check_equal(array, getattr(direct, name))


def test_a_forward_and_its_backward_have_one_dropout_pattern(pool: FlashAttnPool):
    request = message(3).request
    arrays, options = (request.q, request.k, request.v), fa.AttentionOptions(dropout_p=0.5)
    done = pool.ask(FlashAttnMsg.Forward(fa.DenseFwdRequest(*arrays, options=options))).result(PATIENCE)
    asked = fa.DenseBwdRequest(*arrays, done.out, np.ones_like(done.out), done.lse, options=replace(options, rng=done.rng))
    check_equal(pool.ask(FlashAttnMsg.Backward(asked)).result(PATIENCE).dv, fa.run(asked).dv)


@pytest.mark.torch
def test_gradients_of_torch_tensors_come_back_as_torch_tensors(pool: FlashAttnPool):
    import torch

    q, k, v, dout = (torch.randn(1, 6, 2, 16, dtype=torch.bfloat16) for _ in range(4))
    dk = torch.empty_like(k)
    request = fa.Fa2BwdRequest(q, k, v, dout=dout, recompute=True, dk=dk)
    answer = pool.ask(FlashAttnMsg.Backward(request)).result(PATIENCE)
    assert answer.dk is dk
    made = [getattr(answer, name).clone() for name in ("dq", "dk", "dv")]
    direct = fa.run(request)
    for gradient, name in zip(made, ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(gradient, getattr(direct, name))


def test_what_is_sent_is_a_copy(pool: FlashAttnPool):
    sent = message(4)
    expected = fa.run(sent.request).out
    reply = pool.ask(sent)
    sent.request.q.fill(np.nan)
    np.testing.assert_array_equal(reply.result(PATIENCE).out, expected)


def test_a_request_that_is_wrong_fails_alone_with_its_own_error(pool: FlashAttnPool):
    with pytest.raises(fa.FeatureNotBuiltError) as caught:
        pool.ask(FlashAttnMsg.PagedForward(paged())).result(PATIENCE)
    assert caught.value.feature == "paged_over_ray"
    for kind, request in ((FlashAttnMsg.Backward, message().request), (FlashAttnMsg.Forward, backward().request)):
        with pytest.raises(fa.UnknownMessageError, match="; send it as FlashAttnMsg"):
            pool.ask(kind(request))
    with pytest.raises(fa.UnknownMessageError):
        pool.ask(3)  # type: ignore[arg-type]
    with pytest.raises(fa.UnknownMessageError):
        pool.ask(FlashAttnMsg.Forward("q"))
    sent = message()
    sent.request.q.resize((3,), refcheck=False)
    with pytest.raises(fa.StaleArrayError):
        pool.ask(sent)
    assert pool.ask(message()).result(PATIENCE).out is not None


def test_a_tensor_that_is_gone_when_the_answer_comes(pool: FlashAttnPool):
    sent = slow()
    out = np.empty_like(sent.request.q)
    request = fa.Fa2FwdRequest(sent.request.q, sent.request.k, sent.request.v, out=out)
    reply = pool.ask(FlashAttnMsg.Forward(request))
    out.resize((1,), refcheck=False)
    with pytest.raises(fa.StaleArrayError, match=r"^out:"):
        reply.result(PATIENCE)
    busy = [pool.ask(slow(seed)) for seed in range(2)]
    sent, dv = message(5), np.empty((1, 5, 1, 8), np.float32)
    request = fa.Fa2FwdRequest(sent.request.q, sent.request.k, sent.request.v, out=np.empty_like(sent.request.q))
    replies = [pool.ask(FlashAttnMsg.Forward(request)), pool.ask(backward(dv=dv))]
    sent.request.q.resize((1,), refcheck=False)  # it has been copied
    dv.resize((1,), refcheck=False)
    assert replies[0].result(PATIENCE).out is request.out
    with pytest.raises(fa.StaleArrayError, match=r"^dv:"):
        replies[1].result(PATIENCE)
    assert all(reply.result(PATIENCE) for reply in busy)


def test_requests_go_to_the_least_loaded_worker(pool: FlashAttnPool):
    replies = [pool.ask(slow(seed)) for seed in range(4)]
    until(lambda: sum(pool.loads.values()) == 4)
    assert sorted(pool.loads.values()) == [2, 2]
    small = [pool.ask(message(seed)) for seed in range(4)]
    assert all(reply.result(PATIENCE).out is not None for reply in replies + small)
    assert sorted(pool.loads.values()) == [0, 0]


def test_await(pool: FlashAttnPool):
    async def main() -> list[Any]:
        return [await pool.ask(message()), *await asyncio.gather(*(pool.ask_async(message(seed)) for seed in range(20)))]

    assert len(asyncio.run(main())) == 21


def test_a_lost_worker_loses_no_request_and_is_replaced():
    with FlashAttnPool.start(2, FlashAttnProps(device="cpu", label="loss"), window=4) as pool:
        sent = [message(seed) if seed % 3 else slow(seed) for seed in range(30)]
        replies = [pool.ask(each) for each in sent]
        before = set(pool.loads)
        kill_one(pool)
        for each, reply in zip(sent, replies, strict=True):
            check_equal(reply.result(PATIENCE).out, fa.run(each.request).out)
        assert len(pool.loads) == 2
        assert set(pool.loads) != before
        assert pool.unanswered == 0


def test_without_retries_the_requests_of_a_lost_worker_fail_by_name_and_only_those():
    with FlashAttnPool.start(2, FlashAttnProps(device="cpu", label="strict"), window=2, retries=0, replacements=0) as pool:
        replies = [pool.ask(slow(seed)) for seed in range(8)]
        kill_one(pool)
        errors = [reply.exception(PATIENCE) for reply in replies]
        lost = [error for error in errors if error is not None]
        assert 1 <= len(lost) <= 2
        assert all(isinstance(error, fa.WorkerLostError) for error in lost)
        assert len(pool.loads) == 1
        kill_one(pool)
        last = pool.ask(message())
        with pytest.raises(fa.WorkerLostError, match="lost"):
            last.result(PATIENCE)
        until(lambda: not pool.is_alive)
        with pytest.raises(fa.ActorStoppedError, match="all workers are lost"):
            pool.ask(message())


def test_cancel_timeout_back_pressure_and_stop():
    props = FlashAttnProps(device="cpu", label="small", mailbox_limit=2, overflow=Overflow.REFUSE)
    pool = FlashAttnPool.start(1, props, window=1)
    replies = [pool.ask(slow(0))]
    until(lambda: pool.waiting == 0)
    replies += [pool.ask(slow(seed)) for seed in (1, 2)]
    with pytest.raises(fa.MailboxFullError):
        pool.ask(message())
    assert replies[2].cancel()
    with pytest.raises(fa.RequestTimeoutError):
        pool.ask(message(), timeout=0.01, overflow=Overflow.WAIT).result(PATIENCE)
    stopping = threading.Thread(target=pool.stop)
    stopping.start()
    stopping.join(PATIENCE)
    assert [reply.cancelled() for reply in replies] == [False, False, True]
    assert all(reply.result(0).out is not None for reply in replies[:2])
    with pytest.raises(CancelledError):
        replies[2].result(0)
    with pytest.raises(fa.ActorStoppedError):
        pool.ask(message())


def test_a_worker_that_loses_its_gpu_is_replaced_and_its_request_sent_again(monkeypatch: pytest.MonkeyPatch):
    class FirstOneLosesItsGpu:
        def __init__(self, label: str, *_: object) -> None:
            self.first = label.endswith("-1")

        async def ready(self) -> int:
            return 0

        async def run(self, _: object, q: np.ndarray, *__: object) -> Any:
            return (
                fa.DeviceLostError("sticky", cuda_error="CUDA_ERROR_LAUNCH_FAILED")
                if self.first
                else [WireArray(q + 1, "float32"), None, None]
            )

    monkeypatch.setattr(pool_module, "Worker", FirstOneLosesItsGpu)
    with FlashAttnPool.start(1, FlashAttnProps(device="cpu", label="gpu")) as pool:
        sent = message()
        np.testing.assert_array_equal(pool.ask(sent).result(PATIENCE).out, sent.request.q + 1)
        assert list(pool.loads) == [2]


def test_the_example(capsys: pytest.CaptureFixture[str]):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "actor_pool.py"))
    example["a_pool"]()
    said = capsys.readouterr().out
    assert "32 answers to 32 requests" in said


def test_workers_that_cannot_start_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_module, "_START_SECONDS", 0.5)
    with pytest.raises(
        fa.WorkerLostError, match=r"did not start in 0.5 s; Ray has \d+ GPUs and .*a worker takes one and one core; start fewer"
    ):
        FlashAttnPool.start(1, FlashAttnProps(device="cuda:0"))
