"""merge_states: two halves of the keys make the whole, and an empty state changes no bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.types import DType
from tests.cases import ALL_DTYPES, Case, build
from tests.check import Run, check_arrays
from tests.inputs import NUMPY_DTYPE

PARTS = (100, 50, 0, 177, 3)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_parts_of_the_keys_make_the_whole(dtype: Any, packed: bool):
    keys = sum(PARTS)
    sizes = {"lengths_q": (5,), "lengths_k": (keys,)} if packed else {"seqlen_q": 5, "seqlen_k": keys}
    inputs = build(Case(dtype=dtype, heads=4, heads_kv=2, **sizes))
    ends = np.cumsum([0, *PARTS])
    state: Any = None
    for start, end in pairwise(ends):
        k, v = (x[start:end] if packed else x[:, start:end] for x in (inputs.k, inputs.v))
        if packed:
            offsets = [np.array([0, n], np.int32) for n in (5, end - start)]
            made = fa.flash_attn_varlen_func(inputs.q, k, v, *offsets, 5, max(int(end - start), 0), return_attn_probs=True)[:2]
        else:
            made = fa.flash_attn_func(inputs.q, k, v, return_attn_probs=True)[:2]
        state = made if state is None else fa.merge_states(*state, *made)
    if dtype is DType.F32:
        check_arrays("merged", inputs, Run(*state))
        return
    whole = fa.flash_attn_func(*(x[None] if packed else x for x in (inputs.q, inputs.k, inputs.v)), return_attn_probs=True)
    # o in 16 bits is rounded by each merge, and weights are those of LSEs in float32
    atol = 1e-6 if dtype is DType.F64 else 2e-2
    np.testing.assert_allclose(state[0].astype(np.float32).reshape(whole[0].shape), whole[0].astype(np.float32), atol=atol)
    np.testing.assert_allclose(state[1].reshape(whole[1].shape), whole[1], atol=1e-3)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.value)
def test_an_empty_state_merges_to_the_other_bitwise(dtype: Any):
    rng = np.random.default_rng(0)
    o = rng.standard_normal((2, 3, 4, 8)).astype(NUMPY_DTYPE[dtype])
    o[0, 0, 0, :3] = -0.0, np.inf, np.nan
    lse = rng.standard_normal((2, 4, 3)).astype(np.float32) * 1e4
    lse[1, 1] = -np.inf
    nothing, none = np.zeros_like(o), np.full_like(lse, -np.inf)
    for made in (fa.merge_states(o, lse, nothing, none), fa.merge_states(nothing, none, o, lse)):
        empty = np.isneginf(lse).transpose(0, 2, 1)
        assert made[0][~empty].tobytes() == o[~empty].tobytes()
        assert made[1].tobytes() == lse.tobytes()
    both = fa.merge_states(nothing, none, nothing, none)
    assert both[0].tobytes() == nothing.tobytes()
    assert np.isneginf(both[1]).all()


def test_huge_lses_stay_finite():
    o, lse = np.ones((1, 1, 1, 8), np.float32), np.full((1, 1, 1), 3e38, np.float32)
    out, merged = fa.merge_states(o, lse, 3 * o, lse)
    np.testing.assert_array_equal(out, 2 * o)
    assert np.isfinite(merged).all()


O, LSE = np.zeros((2, 3, 4, 8), np.float16), np.zeros((2, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((O, LSE, O[:1], LSE), fa.ShapeError, r"o2: got shape \(1, 3, 4, 8\) with \(2, 3, 4, 8\) in o1"),
        ((O, LSE.transpose(0, 2, 1), O, LSE), fa.ShapeError, r"lse1: got shape \(2, 3, 4\); allowed is \(2, 4, 3\)"),
        ((O, LSE, O, LSE.astype(np.float64)), fa.DTypeError, "lse2: got type float64; allowed is float32"),
        ((O, LSE, O.astype(np.float32), LSE), fa.DTypeError, "o2: got float32 with float16 in o1"),
        ((O.astype(np.int32), LSE, O.astype(np.int32), LSE), fa.DTypeError, "o2: got int32"),
        ((O[0, 0], LSE[0], O[0, 0], LSE[0]), fa.ShapeError, "o2: got shape"),
        (([0.0], LSE, O, LSE), fa.ArrayTypeError, "o1: got"),
    ],
    ids=str,
)
def test_refusals(given: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        fa.merge_states(*given)
