"""The backward of the CPU backend against the oracle, and the calls that are known to hurt users of other libraries."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from atomr_accel_flashattn.problem import BackwardProblem
from atomr_accel_flashattn.reference.backward import backward
from atomr_accel_flashattn.types import DType
from tests.case_lists import hazard_cases, head_dim_cases, pairwise_cases
from tests.cases import ALL_DTYPES, Alibi, Case, Values, build
from tests.check import check_gradients
from tests.inputs import Inputs, Layout
from tests.oracle import Gradients, Upstream, keep_threshold, oracle_gradients
from tests.strategies import random_cases
from tests.upstream import build_upstream

from .running import backward_problem_of, run_backward, run_reference

DTYPES = [DType.F16, DType.BF16, DType.F32]


@pytest.mark.parametrize("case", hazard_cases(DTYPES), ids=str)
def test_hazard(case: Case) -> None:
    check_gradients(case, run_backward)


@pytest.mark.parametrize("case", pairwise_cases(ALL_DTYPES), ids=str)
def test_pairwise(case: Case) -> None:
    check_gradients(case, run_backward)


@pytest.mark.parametrize("case", head_dim_cases([DType.BF16])[::3], ids=str)
def test_head_dim(case: Case) -> None:
    check_gradients(case, run_backward)


@given(random_cases(DTYPES, max_length=80))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random(case: Case) -> None:
    check_gradients(case, run_backward)


@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.value)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradient_layout(layout: Layout, packed: bool) -> None:
    sizes: dict[str, Any] = {"lengths_q": (40, 3), "lengths_k": (40, 3)} if packed else {"batch": 2, "seqlen_q": 40}
    check_gradients(Case(heads=4, **sizes), lambda inputs, upstream: run_backward(inputs, upstream, layout))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.value)
def test_recomputed_forward(dtype: DType) -> None:
    case = Case(dtype=dtype, seqlen_q=70, seqlen_k=50, heads=4, dropout_p=0.2, learned_sink=True, right=0)
    check_gradients(case, lambda inputs, upstream: run_backward(inputs, upstream, recompute=True))
    inputs = build(case)
    upstream = build_upstream(case, inputs)
    for given_forward, made in zip(run_backward(inputs, upstream), run_backward(inputs, upstream, recompute=True), strict=True):
        np.testing.assert_array_equal(given_forward, made)


def test_more_tiles_than_one_in_every_direction() -> None:
    for case in (
        Case(dtype=DType.F32, heads=3, heads_kv=1, seqlen_q=300, seqlen_k=1000, dropout_p=0.2, right=0),
        Case(heads=2, seqlen_q=700, seqlen_k=600, left=100, right=3, sink_tokens=300, alibi=Alibi.HEADS, learned_sink=True),
        Case(dtype=DType.BF16, heads=40, heads_kv=1, seqlen_q=50, seqlen_k=520, softcap=9.0, dropout_p=0.5, right=0),
    ):
        check_gradients(case, run_backward)


def _gradients(inputs: Inputs, seed: int = 0, *, dlse: bool = True) -> Gradients:
    random = np.random.default_rng(seed)
    dout = random.standard_normal(inputs.out_shape).astype(inputs.q.dtype)
    return run_backward(inputs, Upstream(dout, random.standard_normal(inputs.lse_shape).astype(np.float32) if dlse else None))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sequences_without_queries_give_their_keys_zeros(head_dim: int) -> None:
    q_ends, k_ends = (0, 0, 1208, 2048, 2048), (0, 2538, 4280, 5120, 8192)
    if head_dim > 64:  # a quarter of the lengths; time
        q_ends, k_ends = (tuple(end // 4 for end in ends) for ends in (q_ends, k_ends))
    lengths: dict[str, Any] = {"lengths_q": tuple(np.diff(q_ends).tolist()), "lengths_k": tuple(np.diff(k_ends).tolist())}
    made = _gradients(build(Case(heads=4, heads_kv=1, head_dim=head_dim, v_head_dim=head_dim, **lengths)))
    for gradient in (made.dk, made.dv):
        assert not gradient[: k_ends[1]].any()
        assert not gradient[k_ends[3] :].any()
        assert gradient[k_ends[1] : k_ends[3]].any(axis=(1, 2)).all()
    assert made.dq.any(axis=-1).all()


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 5), (2, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("learned_sink", [False, True])
def test_empty_calls_give_zeros(sizes: tuple[int, int, int], learned_sink: bool) -> None:
    batch, seqlen_q, seqlen_k = sizes
    inputs = build(Case(dtype=DType.F32, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, learned_sink=learned_sink))
    made = _gradients(inputs, dlse=False)
    assert not any(gradient.any() for gradient in made if gradient is not None)


def test_without_keys_the_sink_gets_the_gradient_of_the_lse() -> None:
    inputs = build(Case(dtype=DType.F32, batch=2, seqlen_q=5, seqlen_k=0, learned_sink=True))
    dlse = np.random.default_rng(0).standard_normal(inputs.lse_shape).astype(np.float32)
    made = run_backward(inputs, Upstream(np.full(inputs.out_shape, np.nan, np.float32), dlse))
    np.testing.assert_allclose(made.dsink, dlse.sum(axis=(0, 2)), rtol=1e-6)


def test_rows_without_a_key_give_dq_exactly_zero() -> None:
    lengths = (76, 34, 146)
    case = Case(lengths_q=lengths, lengths_k=(1, 1, 1), head_dim=32, v_head_dim=32, right=0)
    inputs = build(case)
    inputs = replace(inputs, q=inputs.q * 3, k=inputs.k * 3, v=inputs.v * 3)
    made = _gradients(inputs)
    last = np.cumsum(lengths) - 1
    assert not np.delete(made.dq, last, axis=0).any()
    assert all(np.isfinite(gradient).all() for gradient in made[:3])
    assert made.dv.any(axis=-1).all()


@pytest.mark.parametrize(("heads", "heads_kv"), [(6, 2), (12, 4), (7, 1), (10, 2)])
def test_a_group_gets_the_sum_of_what_its_heads_would_get(heads: int, heads_kv: int) -> None:
    ratio = heads // heads_kv
    inputs = build(Case(dtype=DType.F32, heads=heads, heads_kv=heads_kv, seqlen_q=40, seqlen_k=60, right=0, learned_sink=True))
    alone = _gradients(replace(inputs, k=inputs.k.repeat(ratio, 2), v=inputs.v.repeat(ratio, 2)))
    grouped = _gradients(inputs)
    np.testing.assert_allclose(grouped.dq, alone.dq, rtol=1e-4, atol=1e-6)
    for one, many in ((grouped.dk, alone.dk), (grouped.dv, alone.dv)):
        np.testing.assert_allclose(one, many.reshape(*one.shape[:2], heads_kv, ratio, -1).sum(axis=3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_spare_rows_are_not_read_and_get_zeros(recompute: bool) -> None:
    case = Case(dtype=DType.F32, lengths_q=(30, 0, 21), lengths_k=(25, 4, 21), right=0, learned_sink=True, dropout_p=0.1)
    inputs = build(case)
    upstream = build_upstream(case, inputs)
    expected = run_backward(inputs, upstream)

    def longer(array: Any, axis: int = 0) -> Any:
        widths = [(0, 64 if each == axis else 0) for each in range(array.ndim)]
        return np.pad(array, widths, constant_values=np.nan)

    spare = replace(inputs, q=longer(inputs.q), k=longer(inputs.k), v=longer(inputs.v))
    dlse = None if upstream.dlse is None else longer(upstream.dlse, axis=1)
    made = run_backward(spare, Upstream(longer(upstream.dout), dlse), recompute=recompute)
    for got, want in zip(made[:3], expected[:3], strict=True):
        assert not got[len(want) :].any()
        np.testing.assert_array_equal(got[: len(want)], want)
    np.testing.assert_array_equal(made.dsink, expected.dsink)


SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "varlen": {"lengths_q": (40, 0, 9), "lengths_k": (33, 5, 20)},
    "window": {"left": 12, "right": 3},
    "gqa": {"heads": 6, "heads_kv": 2},
}


@pytest.mark.parametrize("softcap", [1.0, 15.0, 50.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_softcap(softcap: float, shape: str) -> None:
    scale = 0.5 if softcap == 1.0 else 3.0  # scores on either side of the cap
    case = Case(dtype=DType.F32, softcap=softcap, softmax_scale=scale, **SHAPES[shape])
    check_gradients(case, run_backward)
    inputs = build(case)
    one, other = _gradients(inputs), _gradients(replace(inputs, softcap=softcap * 1.01))
    assert np.abs(one.dq - other.dq).max() > 1e-4


@pytest.mark.parametrize("window", [(None, None), (0, 0), (7, 8), (127, 0), (500, 500), (0, None), (None, 0), (7, None), (1, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_window(window: tuple[int | None, int | None], causal: bool) -> None:
    left, right = window
    check_gradients(Case(dtype=DType.F32, seqlen_q=150, seqlen_k=170, left=left, right=0 if causal else right), run_backward)


def test_an_identity_as_v_reads_the_pattern_that_dv_uses() -> None:
    case = Case(dtype=DType.F32, heads=3, heads_kv=3, seqlen_q=40, seqlen_k=64, dropout_p=0.3, right=5)
    inputs = build(case)
    inputs.v[...] = np.eye(64)[:, None]
    dropped = run_reference(inputs).out  # (B, Sq, H, Sk): probabilities of the forward, after dropout
    assert 0.5 < (dropped > 0).mean() / (1 - 0.5 * (keep_threshold(0.3) / 256)) < 1.5
    dout = np.random.default_rng(0).standard_normal(inputs.out_shape).astype(np.float32)
    made = run_backward(inputs, Upstream(dout))
    np.testing.assert_allclose(made.dv, np.einsum("bihj,bihd->bjhd", dropped, dout), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("kind", ["outlier_channels", "correlated_tokens"])
def test_direction_of_gradients_of_unkind_data(dtype: DType, kind: str) -> None:
    """Tokens half of which is common to all. With more in common, what o was rounded by moves dQ along that common part."""
    inputs = build(Case(dtype=dtype, batch=3, seqlen_q=90, seqlen_k=90, right=0))
    random = np.random.default_rng(0)
    if kind == "outlier_channels":
        for array in (inputs.q, inputs.k):
            array[..., random.choice(64, 2)] *= 50
    else:
        for array in (inputs.q, inputs.k, inputs.v):
            array[...] = (array.astype(np.float32) + random.standard_normal(64)).astype(array.dtype)
    upstream = Upstream(random.standard_normal(inputs.out_shape).astype(inputs.q.dtype))
    exact, made = oracle_gradients(inputs, upstream), run_backward(inputs, upstream)
    for entry in range(3):
        for got, want in zip(made[:3], exact[:3], strict=True):
            one, other = got[entry].astype(np.float64).ravel(), want[entry].ravel()
            assert one @ other > 0.9999 * np.linalg.norm(one) * np.linalg.norm(other)


def test_nan_in_what_a_row_without_keys_holds_stays_there() -> None:
    inputs = build(Case(dtype=DType.F32, seqlen_q=30, seqlen_k=20, right=0, values=Values.NORMAL))
    dout = np.ones(inputs.out_shape, np.float32)
    expected = run_backward(inputs, Upstream(dout))
    inputs.q[:, :10] = dout[:, :10] = np.nan
    for got, want in zip(run_backward(inputs, Upstream(dout))[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_overflows_in_a_key_stays_out_of_the_rows_that_it_is_hidden_from() -> None:
    inputs = build(Case(dtype=DType.F32, right=0))
    dout = np.full(inputs.out_shape, 10, np.float32)
    expected = run_backward(inputs, Upstream(dout)).dq
    inputs.v[0, 40] = 3e38
    got = run_backward(inputs, Upstream(dout)).dq
    np.testing.assert_array_equal(got[0, :40], expected[0, :40])
    assert not np.isfinite(got[0, 40:]).all()


def test_a_row_whose_scores_are_all_minus_infinity_is_one_without_keys() -> None:
    inputs = build(Case(dtype=DType.F32, seqlen_q=5, seqlen_k=9))
    dout = np.ones(inputs.out_shape, np.float32)
    inputs.k[..., 0] = -1e30
    inputs.q[..., 0] = 0
    inputs.q[0, 3, :, 0], dout[0, 3] = 1e30, np.nan
    assert np.isneginf(run_reference(inputs).lse[0, :, 3]).all()
    made = run_backward(inputs, Upstream(dout, np.ones(inputs.lse_shape, np.float32)))
    assert not made.dq[0, 3].any()
    assert all(np.isfinite(gradient).all() for gradient in made[:3])


@pytest.mark.parametrize("dtype", [DType.F32, DType.F64], ids=lambda dtype: dtype.value)
def test_o_and_lse_of_more_keys_than_these(dtype: DType) -> None:
    """What ring attention does: each part of the keys with o and LSE of all of them; the parts of dQ add up."""
    inputs = build(Case(dtype=dtype, seqlen_q=30, seqlen_k=50))
    random = np.random.default_rng(0)
    upstream = Upstream(random.standard_normal(inputs.out_shape).astype(inputs.q.dtype))
    whole = backward_problem_of(inputs, upstream)
    expected, dq = run_backward(inputs, upstream), 0.0
    for keys in (slice(0, 20), slice(20, 50)):
        part = replace(inputs, k=inputs.k[:, keys], v=inputs.v[:, keys])
        problem = replace(backward_problem_of(part, upstream), out=whole.out, lse=whole.lse)
        made = [np.full(array.shape, np.nan, array.dtype) for array in (part.q, part.k, part.v)]
        backward(problem, *made, None)
        dq += made[0]
        np.testing.assert_allclose(made[1], expected.dk[:, keys], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(made[2], expected.dv[:, keys], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dq, expected.dq, rtol=1e-4, atol=1e-6)


def _peak_bytes(problem: BackwardProblem) -> int:
    """Most memory that the backend holds at once beyond inputs and outputs."""
    made = [np.empty(each.shape, np.float32) for each in (problem.forward.q, problem.forward.k, problem.forward.v)]
    tracemalloc.start()
    try:
        backward(problem, *made, None)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_linear_in_the_length(recompute: bool) -> None:
    lengths, peaks = (1024, 2048, 4096), []
    for n in lengths:
        inputs = build(Case(dtype=DType.F32, heads=1, heads_kv=1, seqlen_q=n, seqlen_k=n, right=0))
        upstream = Upstream(np.ones(inputs.out_shape, np.float32))
        peaks.append(_peak_bytes(backward_problem_of(inputs, upstream, recompute=recompute)))
    per_key = 4 * 64 * 4 + (64 * 4 + 4) * recompute  # K, V, dK, dV of a head; o and LSE
    assert peaks[2] - peaks[1] < 1.5 * per_key * (lengths[2] - lengths[1]), f"peaks {peaks} bytes at lengths {lengths}"
