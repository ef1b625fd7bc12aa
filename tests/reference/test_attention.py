from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from atomr_accel_flashattn.reference import forward
from atomr_accel_flashattn.reference.fp8 import round_probabilities
from atomr_accel_flashattn.types import DType
from tests.case_lists import hazard_cases, head_dim_cases, large_cases, pairwise_cases
from tests.cases import ALL_DTYPES, Alibi, Case, build
from tests.check import check_case
from tests.inputs import NUMPY_DTYPE, Layout
from tests.strategies import random_cases

from .running import problem_of, run_reference


@pytest.mark.parametrize("case", hazard_cases(ALL_DTYPES), ids=str)
def test_hazard(case: Case) -> None:
    check_case(case, run_reference)


@pytest.mark.parametrize("case", head_dim_cases(ALL_DTYPES), ids=str)
def test_head_dim(case: Case) -> None:
    check_case(case, run_reference)


@pytest.mark.parametrize("case", pairwise_cases(ALL_DTYPES), ids=str)
def test_pairwise(case: Case) -> None:
    check_case(case, run_reference)


@pytest.mark.parametrize("case", large_cases([DType.BF16]), ids=str)
def test_large_on_sampled_rows(case: Case) -> None:
    check_case(case, run_reference)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.value)
def test_random(dtype: DType) -> None:
    examples = 10 if dtype is DType.F64 else 30  # the oracle of float64 is long double, without BLAS; hazards and pairs are tested above

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(random_cases([dtype]))
    def judge(case: Case) -> None:
        check_case(case, run_reference)

    judge()


@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.value)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_output_layout(layout: Layout, packed: bool) -> None:
    sizes = {"lengths_q": (40, 3), "lengths_k": (40, 3)} if packed else {"batch": 2, "seqlen_q": 40}
    check_case(Case(heads=4, **sizes), lambda inputs: run_reference(inputs, layout))


def test_more_tiles_than_one_in_every_direction() -> None:
    for case in (
        Case(dtype=DType.F64, heads=3, heads_kv=1, seqlen_q=300, seqlen_k=1000, dropout_p=0.2, right=0),
        Case(heads=2, seqlen_q=700, seqlen_k=600, left=100, right=3, sink_tokens=300, alibi=Alibi.HEADS, learned_sink=True),
        Case(dtype=DType.BF16, heads=40, heads_kv=1, seqlen_q=50, seqlen_k=520, softcap=9.0, dropout_p=0.5, right=0),
    ):
        check_case(case, run_reference)


def test_without_lse_and_pattern_the_output_is_the_same() -> None:
    inputs = build(Case(dropout_p=0.3, seqlen_q=50))
    out = np.full(inputs.out_shape, np.nan, NUMPY_DTYPE[inputs.dtype])
    forward(problem_of(inputs), out, None, None)
    np.testing.assert_array_equal(out, run_reference(inputs).out)


def test_lse_does_not_see_dropout() -> None:
    case = {"seqlen_q": 50, "seqlen_k": 70}
    with_dropout = build(Case(dropout_p=0.5, **case))
    without = build(Case(**case))
    without = replace(without, q=with_dropout.q, k=with_dropout.k)
    np.testing.assert_array_equal(run_reference(with_dropout).lse, run_reference(without).lse)


def test_dropout_is_unbiased() -> None:
    inputs = build(Case(dtype=DType.F32, heads=1, heads_kv=1, seqlen_q=512, seqlen_k=512, dropout_p=0.3, softmax_scale=0.0, v_head_dim=8))
    inputs.v[...] = 1
    mean, sigma = run_reference(inputs).out[..., 0].mean(), np.sqrt(0.3 / 0.7 / 512 / 512)
    assert abs(mean - 1) < 5 * sigma


def test_nan_in_a_key_that_a_query_sees_reaches_that_query() -> None:
    inputs = build(Case(dtype=DType.F32, right=0))
    inputs.k[0, 40] = np.nan
    out = run_reference(inputs).out
    assert np.isnan(out[0, 40:]).all()


def test_rounding_of_probabilities_equals_the_cast_for_every_float16_and_between() -> None:
    steps = np.arange(0x3C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # 0 to the last before 1
    halfway = (steps + np.append(steps[1:], np.float32(1))) / 2  # exact in float32: ties
    below, above = np.nextafter(halfway, np.float32(0)), np.nextafter(halfway, np.float32(2))
    values = np.concatenate([steps, halfway, below, above, [1, 1e-40, np.nan]])
    values = values.astype(np.float32)
    for dtype in (DType.F16, DType.BF16):
        kind = NUMPY_DTYPE[dtype]
        np.testing.assert_array_equal(round_probabilities(values.copy(), kind), values.astype(kind).astype(np.float32))


def _peak_bytes(case: Case) -> int:
    """Most memory that the backend holds at once beyond inputs and outputs."""
    inputs = build(case)
    problem = problem_of(inputs)
    out, lse = np.empty(inputs.out_shape, NUMPY_DTYPE[inputs.dtype]), np.empty(inputs.lse_shape, np.float32)
    tracemalloc.start()
    try:
        forward(problem, out, lse, None)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "options", [{"right": 0}, {"dropout_p": 0.1}, {"alibi": Alibi.HEADS, "softcap": 5.0}, {"left": 200, "right": 200}], ids=str
)
def test_memory_is_linear_in_the_length(options: dict[str, Any]) -> None:
    lengths = (1024, 2048, 4096)
    peaks = [_peak_bytes(Case(dtype=DType.F32, heads=1, heads_kv=1, seqlen_q=n, seqlen_k=n, **options)) for n in lengths]
    per_key = 2 * 64 * 4  # the float copy of K and V
    assert peaks[2] - peaks[1] < 1.5 * per_key * (lengths[2] - lengths[1]), f"peaks {peaks} bytes at lengths {lengths}"
    assert peaks[2] < 4096 * 4096  # a quarter of one float32 score matrix


def test_memory_does_not_grow_with_the_heads_that_share_a_kv_head() -> None:
    one, many = (_peak_bytes(Case(heads=heads, heads_kv=1, seqlen_q=1024, seqlen_k=1024)) for heads in (1, 16))
    assert many < 1.5 * one


def test_4k_causal_takes_seconds_of_a_processor() -> None:
    inputs = build(Case(dtype=DType.F32, heads=8, heads_kv=8, seqlen_q=4096, seqlen_k=4096, right=0))
    problem, out = problem_of(inputs), np.empty(inputs.out_shape, np.float32)
    start = time.process_time()
    forward(problem, out, None, None)
    assert time.process_time() - start < 30  # 0.7


def test_a_window_costs_its_width_not_the_length() -> None:
    window = {"dtype": DType.F32, "heads": 4, "heads_kv": 4, "seqlen_q": 8192, "seqlen_k": 8192, "right": 0}
    seconds = []
    for options in ({"left": 100}, {}):
        inputs = build(Case(**window, **options))
        problem, out = problem_of(inputs), np.empty(inputs.out_shape, np.float32)
        start = time.process_time()
        forward(problem, out, None, None)
        seconds.append(time.process_time() - start)
    assert seconds[0] < seconds[1] / 3  # 16 times fewer tiles
