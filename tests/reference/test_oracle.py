"""The oracle and the check themselves: hand-worked values, and faults that must be found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from atomr_accel_flashattn.types import DType
from tests.case_lists import (
    EMULATED_WIDTHS,
    FEATURE_AXES,
    emulated_cases,
    hazard_cases,
    head_dim_cases,
    large_cases,
    pairwise_cases,
)
from tests.cases import ALL_DTYPES, GPU_DTYPES, Alibi, Case, Values, build
from tests.check import Run, check_arrays, check_case
from tests.inputs import NUMPY_DTYPE, Inputs, Layout, Poisoned, place, storage_of
from tests.oracle import _seen_by_any, _visible, oracle, same_dtype, sample_rows

from .running import run_reference


def _inputs(q: list[float], k: list[float], v: list[float], **options: object) -> Inputs:
    """One head of width 1."""
    arrays = (np.array(values, np.float64).reshape(1, -1, 1, 1) for values in (q, k, v))
    return Inputs(DType.F32, *arrays, **{"softmax_scale": 1.0, **options})


def test_two_keys_by_hand() -> None:
    result = oracle(_inputs([1.0], [0.0, math.log(3)], [4.0, 8.0]))
    assert result.out.item() == pytest.approx((1 * 4 + 3 * 8) / 4)
    assert result.lse.item() == pytest.approx(math.log(4))


def test_causal_is_aligned_to_the_end_by_hand() -> None:
    result = oracle(_inputs([0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 5.0, 10.0], right=0))
    assert result.out.ravel().tolist() == pytest.approx([4.0, 6.0])


def test_row_without_keys_by_hand() -> None:
    case = _inputs([0.0, 0.0], [0.0], [7.0], right=0)
    result = oracle(case)
    assert result.out.ravel().tolist() == [0.0, 7.0]
    assert result.lse.ravel().tolist() == [-math.inf, 0.0]


def test_window_and_sink_token_by_hand() -> None:
    result = oracle(_inputs([0.0], [0.0] * 5, [1.0, 2.0, 4.0, 8.0, 16.0], left=1, right=0, sink_tokens=1))
    assert result.out.item() == pytest.approx((1 + 8 + 16) / 3)


def test_softcap_alibi_and_learned_sink_by_hand() -> None:
    slopes, sink = np.array([0.5], np.float32), np.array([0.25], np.float32)
    result = oracle(_inputs([1.0], [1.0, 2.0], [1.0, 0.0], softcap=2.0, softmax_scale=-3.0, alibi_slopes=slopes, learned_sink=sink))
    first, second = math.exp(2 * math.tanh(-1.5) - 0.5), math.exp(2 * math.tanh(-3.0))
    total = first + second + math.exp(0.25)
    assert result.out.item() == pytest.approx(first / total)
    assert result.lse.item() == pytest.approx(math.log(total))


def test_learned_sink_alone_is_the_lse_of_a_row_without_keys() -> None:
    result = oracle(_inputs([1.0, 1.0], [1.0], [1.0], right=0, learned_sink=np.array([0.75], np.float32)))
    assert result.lse.ravel()[0] == 0.75
    assert result.out.ravel()[0] == 0


def test_gqa_heads_read_their_kv_head() -> None:
    inputs = build(Case(dtype=DType.F32, heads=6, heads_kv=2, seqlen_q=3, seqlen_k=1))
    np.testing.assert_allclose(oracle(inputs).out[0, 0], inputs.v[0, 0][[0, 0, 0, 1, 1, 1]], rtol=1e-7)


def test_seen_by_any_equals_asking_every_query() -> None:
    sizes, bounds = (0, 1, 4, 9), (None, 0, 2, 20)
    for seqlen_q, seqlen_k, left, right, sinks in itertools.product(sizes, sizes, bounds, bounds, (0, 1, 3)):
        inputs = _inputs([0.0], [0.0], [0.0], left=left, right=right, sink_tokens=0 if left is None else sinks)
        p = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
        seen = _visible(inputs, p, np.arange(seqlen_k)).any(axis=0)
        np.testing.assert_array_equal(_seen_by_any(inputs, seqlen_q, seqlen_k), seen)


@pytest.mark.parametrize("case", pairwise_cases([DType.BF16])[::6], ids=str)
def test_sampled_rows_equal_the_whole_evaluation(case: Case) -> None:
    inputs = build(case)
    rows = sample_rows(inputs)
    assert len(rows.query) == 64
    whole, part = oracle(inputs), oracle(inputs, rows)
    for n, (index, head, query) in enumerate(zip(*rows, strict=True)):
        sequence = inputs.sequence(int(index))
        np.testing.assert_allclose(part.out[n], whole.out[sequence.out_rows][query, head], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(part.lse[n], whole.lse[sequence.lse_rows][head, query], rtol=1e-9)
    run = run_reference(inputs)
    check_arrays(str(case), inputs, run, rows)


def test_sampled_rows_include_both_ends() -> None:
    rows = sample_rows(build(Case(lengths_q=(0, 9, 5, 0), lengths_k=(1, 9, 5, 2))))
    picked = set(zip(rows.sequence.tolist(), rows.query.tolist(), strict=True))
    assert {(1, 0), (1, 8), (2, 0), (2, 4)} <= picked


def test_same_dtype_rounds_to_the_type() -> None:
    inputs = build(Case(dtype=DType.BF16))
    (plain,) = same_dtype(inputs)
    assert plain.out.dtype == ml_dtypes.bfloat16
    assert 0 < np.abs(plain.out.astype(np.float64) - oracle(inputs).out).max() < 0.05


FAULT_CASE = Case(batch=2, seqlen_q=30, seqlen_k=20, right=0, dropout_p=0.2)  # rows 0 to 9 see no key


def _with(array: Any, index: tuple[int, ...], value: Any) -> Any:
    """A copy with one element replaced."""
    copy = array.copy()
    copy[index] = value
    return copy


FAULTS: dict[str, tuple[Callable[[Run], Run], str]] = {
    "nan in out": (
        lambda run: run._replace(out=_with(run.out, (1, 2, 1, 3), np.nan)),
        r"out: NaN in 1 elements, expected in 0.*\(1, 2, 1, 3\)",
    ),
    "inf in out": (lambda run: run._replace(out=_with(run.out, (0, 0, 0, 0), np.inf)), r"out: \+inf in 1 elements.*\(0, 0, 0, 0\)"),
    "wrong out": (
        lambda run: run._replace(out=_with(run.out, (1, 5, 0, 7), 0.05)),
        r"out: worst element \(1, 5, 0, 7\): got 0\.0499.*oracle 0\.0.*rounding floor",
    ),
    "wrong lse": (lambda run: run._replace(lse=_with(run.lse, (0, 1, 15), 9)), r"lse: worst element \(0, 1, 15\): got 9.0"),
    "finite lse": (
        lambda run: run._replace(lse=_with(run.lse, (0, 1, 0), 0)),
        r"lse: -inf in 39 elements, expected in 40.*\(0, 1, 0\)",
    ),
    "wrong keep": (
        lambda run: run._replace(keep=_with(run.keep, (1, 1, 3, 4), not run.keep[1, 1, 3, 4])),
        r"keep differs in 1 of .*\(1, 1, 3, 4\)",
    ),
    "shape of out": (lambda run: run._replace(out=run.out[:, :-1]), "out has shape"),
    "type of out": (lambda run: run._replace(out=run.out.astype(np.float32)), "out has type float32, expected float16"),
    "shape of lse": (lambda run: run._replace(lse=run.lse.swapaxes(1, 2)), "lse has shape"),
    "type of lse": (lambda run: run._replace(lse=run.lse.astype(np.float64)), "lse has type"),
    "shape of keep": (lambda run: run._replace(keep=run.keep[0]), "keep has shape"),
    "type of keep": (lambda run: run._replace(keep=run.keep.astype(np.uint8)), "keep has type"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault: str) -> None:
    spoil, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        check_case(FAULT_CASE, lambda inputs: spoil(run_reference(inputs)))


def test_check_finds_faults_in_sampled_rows() -> None:
    inputs = build(FAULT_CASE)
    rows = sample_rows(inputs)
    index, head, query = (int(column[10]) for column in rows)
    run = run_reference(inputs)
    run.out[index, query, head, 0] += 1
    with pytest.raises(AssertionError, match=r"out: worst element \(\d+, 0\)"):
        check_arrays("sampled", inputs, run, rows)
    keep = run_reference(inputs).keep.copy()
    keep[index, head, query, 3] ^= True
    with pytest.raises(AssertionError, match="keep"):
        check_arrays("sampled", inputs, Run(run_reference(inputs).out, None, keep), rows)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"right": 0}, {"right": 1}),
        ({"left": 8, "right": 0}, {"left": 9}),
        ({"left": 8, "right": 0, "sink_tokens": 2}, {"sink_tokens": 1}),
        ({"softcap": 5.0}, {"softcap": 0.0}),
        ({"alibi": Alibi.HEADS}, {"alibi_slopes": None}),
        ({"learned_sink": True}, {"learned_sink": None}),
        ({"softmax_scale": 0.1}, {"softmax_scale": 0.103}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=lambda dtype: dtype.value)
def test_check_finds_a_feature_that_is_off_by_one(dtype: DType, options: dict[str, Any], change: dict[str, Any]) -> None:
    case = Case(dtype=dtype, seqlen_q=40, seqlen_k=50, **options)
    with pytest.raises(AssertionError, match="out: worst element"):
        check_case(case, lambda inputs: Run(run_reference(replace(inputs, **change)).out))


@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.value)
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (7, 4, 16)], ids=str)
def test_placed_arrays_are_views_into_poison(layout: Layout, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    if layout is Layout.SHARED_KV:
        array[:] = array[:1]
        array[:, :] = array[:, :1]
    view = place(array, layout)
    np.testing.assert_array_equal(view, array)
    assert view.strides[-1] == array.itemsize
    storage, offset, strides = storage_of(view)
    again = np.lib.stride_tricks.as_strided(storage[offset:], shape, tuple(step * array.itemsize for step in strides))
    np.testing.assert_array_equal(again, array)
    assert np.isnan(storage).any()


def test_poisoned_output_finds_writes_outside() -> None:
    out = Poisoned.empty((2, 3, 2, 8), NUMPY_DTYPE[DType.BF16])
    out.view[...] = 1
    out.check()
    out.storage[storage_of(out.view)[1] - 1] = 0
    with pytest.raises(AssertionError, match="1 elements outside the output"):
        out.check()


def test_nan_unseen_poisons_only_what_nobody_sees() -> None:
    inputs = build(Case(values=Values.NAN_UNSEEN, seqlen_q=4, seqlen_k=20, left=3, right=0, sink_tokens=2))
    assert np.flatnonzero(np.isnan(inputs.k[0, :, 0, 0])).tolist() == list(range(2, 13))


def test_case_names_are_unique_and_inputs_repeat() -> None:
    cases = [case for make in (hazard_cases, head_dim_cases, pairwise_cases, large_cases) for case in make(ALL_DTYPES)]
    assert len({str(case) for case in cases}) == len(cases)
    first, second = build(cases[5]), build(cases[5])
    np.testing.assert_array_equal(first.q, second.q)


@pytest.mark.parametrize(("cases", "widths"), [(pairwise_cases, FEATURE_AXES["width"]), (emulated_cases, EMULATED_WIDTHS)])
def test_pairwise_cases_cover_every_pair_in_few_rows(cases: Callable[..., list[Case]], widths: tuple[dict[str, int], ...]) -> None:
    found = cases(GPU_DTYPES)
    axes = {**FEATURE_AXES, "width": widths}
    options = {name: [tuple(value.items()) for value in values] for name, values in axes.items()}
    defaults = Case()

    def has(case: Case, axis: str, value: tuple[tuple[str, object], ...]) -> bool:
        names = {name for each in options[axis] for name, _ in each}
        wanted = {name: getattr(defaults, name) for name in names} | dict(value)
        return all(getattr(case, name) == each for name, each in wanted.items())

    for (a, xs), (b, ys) in itertools.combinations(options.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert any(has(case, a, x) and has(case, b, y) for case in found), f"{a} {x} never meets {b} {y}"
    assert len(found) < 120
