"""Streams, graphs, threads and reruns: the same bits whoever asks, whenever, and in the order the framework's stream says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.runtime.execute import run  # noqa: E402 - after the skip
from tests.cases import GPU_DTYPES, Alibi, Case, build  # noqa: E402
from tests.check import Run, check_arrays  # noqa: E402
from tests.gpu.harness import DEVICE, download, execute, functional_call, make_call, make_request, synchronize, upload  # noqa: E402
from tests.inputs import Layout  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs are CUDA's")

CAUSAL = Case(heads=8, heads_kv=2, batch=2, seqlen_q=300, seqlen_k=340, head_dim=128, v_head_dim=128, right=0)
CASES = (
    CAUSAL,
    replace(CAUSAL, dropout_p=0.2, learned_sink=True, head_dim=64, v_head_dim=64),
    replace(CAUSAL, lengths_q=(130, 0, 257), lengths_k=(130, 60, 300), alibi=Alibi.HEADS),
    replace(CAUSAL, left=50, sink_tokens=4, softcap=20.0, head_dim=72, v_head_dim=72),
)


def bits(tensor: Any) -> bytes:
    return download(tensor).tobytes()


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rerun_gives_the_same_bits(case: Case, dtype: Any) -> None:
    request = make_request(build(case.with_dtype(dtype)))
    first = run(request)
    expected = bits(first.out), bits(first.lse)
    for _ in range(20):
        again = run(request)
        assert (bits(again.out), bits(again.lse)) == expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_does_not_depend_on_the_other_sequences_of_its_batch(case: Case) -> None:
    if case.is_varlen or case.dropout_p:
        pytest.skip("dense and without a pattern that depends on the batch index")
    inputs = build(case)
    both = run(make_request(inputs)).out
    alone = run(make_request(replace(inputs, q=inputs.q[1:], k=inputs.k[1:], v=inputs.v[1:]))).out
    assert bits(both[1]) == bits(alone[0])


@needs_cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_replay_reads_new_inputs(case: Case) -> None:
    inputs = build(case)
    call = make_call(inputs)
    execute(call)  # compiles and loads: a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call.request, dropout_mask=True)
    fresh = build(replace(case, label="other values"))
    for name in ("q", "k", "v"):
        getattr(call.request, name).copy_(upload(getattr(fresh, name)))
    if fresh.rng is not None:
        call.request.options.rng.copy_(upload(fresh.rng))
    call.out.view.fill_(float("nan"))
    graph.replay()
    synchronize()
    keep = None if captured.dropout_mask is None else download(captured.dropout_mask)
    expected = replace(fresh, alibi_slopes=inputs.alibi_slopes, learned_sink=inputs.learned_sink)
    check_arrays(str(case), expected, Run(download(call.out.view), download(captured.lse), keep))


@needs_cuda
def test_work_is_ordered_by_the_current_stream() -> None:
    inputs = build(CAUSAL)
    request = make_request(inputs)
    expected = bits(run(request).out)
    right = request.q.clone()
    request.q.fill_(float("nan"))
    synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second in which a launch on another stream would read the NaN
        request.q.copy_(right)
        out = run(request).out
    side.synchronize()
    assert bits(out) == expected


@needs_cuda
def test_an_explicit_stream_wins_over_the_current_one() -> None:
    request = make_request(build(CAUSAL))
    expected = bits(run(request).out)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        right = request.q.clone()
        request.q.fill_(float("nan"))
        request.q.copy_(right)
    out = run(request, stream=side.cuda_stream).out
    side.synchronize()
    assert bits(out) == expected


def test_the_plan_cache_tells_calls_apart() -> None:
    cases = [
        *(CASES[0], CASES[2], CASES[3]),
        *(replace(CAUSAL, layout=layout) for layout in Layout),
        *(replace(CAUSAL, **change) for change in ({"right": None}, {"seqlen_q": 301}, {"heads_kv": 4}, {"softmax_scale": 0.2})),
        *(replace(CAUSAL, left=left, right=0) for left in (0, 50, 51)),
    ]
    cases = [case.with_dtype(dtype) for case in cases for dtype in GPU_DTYPES]
    calls = [functional_call(build(case)) for case in cases]
    expected = [bits(run(make_request(build(case))).out) for case in cases]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(cases)), 4))
    for index in order:
        assert bits(calls[index]()) == expected[index], f"{cases[index]} got another call's plan"


def test_a_call_seen_before_reads_its_new_addresses() -> None:
    inputs = build(CAUSAL)
    first = functional_call(inputs)
    first()
    first()
    other = build(replace(CAUSAL, label="other values"))
    out = functional_call(other)()
    synchronize()
    check_arrays(str(CAUSAL), other, Run(download(out)))


@needs_cuda
def test_threads_on_their_own_streams_do_not_disturb_each_other() -> None:
    cases = [case.with_dtype(dtype) for case in CASES if not case.dropout_p for dtype in GPU_DTYPES]
    calls = [functional_call(build(case)) for case in cases]
    expected = [bits(call()) for call in calls]
    synchronize()

    def many(index: int) -> list[bytes]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        found = []
        with torch.cuda.stream(stream):
            for step in range(60):
                out = calls[(index + step) % len(calls)]()
                if step % 10 == 9:
                    stream.synchronize()
                    found.append(bits(out))
        return found

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(many, range(6)))
    for index, found in enumerate(results):
        wanted = [expected[(index + step) % len(calls)] for step in range(9, 60, 10)]
        assert found == wanted


@pytest.mark.parametrize("case", [case for case in CASES if case.dropout_p], ids=str)
def test_the_dropout_pattern_is_that_of_the_cpu_backend_bit_for_bit(case: Case) -> None:
    inputs = build(case)
    on_gpu, on_cpu = run(make_request(inputs), dropout_mask=True), run(make_request(inputs, "cpu"), dropout_mask=True)
    assert on_gpu.dropout_mask is not None
    assert np.array_equal(download(on_gpu.dropout_mask), download(on_cpu.dropout_mask))
