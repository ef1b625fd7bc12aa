"""Scores up to 2^38, where float32 steps by thousands: weights still add up to 1 (docs/semantics.md, Huge scores)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from atomr_accel_flashattn.types import DType

from .cases import Alibi, Case, build
from .check import Run
from .inputs import Inputs

__all__ = ["CONSTANT", "RANDOM", "check_constant", "check_random"]

_F16 = Case(dtype=DType.F16, head_dim=64, v_head_dim=64, heads=2, heads_kv=1, seqlen_q=70, seqlen_k=200)
_F16_WIDE = replace(_F16, head_dim=128, v_head_dim=128)
_BF16 = replace(_F16, dtype=DType.BF16)
CONSTANT: tuple[tuple[float, Case], ...] = (
    (12000.0, _F16),
    (12000.0, replace(_F16, right=0)),
    (12000.0, replace(_F16, alibi=Alibi.HEADS, right=0)),
    (12000.0, replace(_F16, left=40, right=0, sink_tokens=3, learned_sink=True)),
    (12000.0, replace(_F16, lengths_q=(70, 0, 30), lengths_k=(200, 7, 64), right=0)),
    (7000.0, _F16_WIDE),
    (60000.0, _F16_WIDE),
    (5000.0, replace(_F16, head_dim=256, v_head_dim=256)),
    (18048.0, _BF16),
    (16640.0, replace(_BF16, seqlen_q=64, seqlen_k=64)),
    (16640.0, replace(_BF16, head_dim=128, v_head_dim=128, right=0)),
)
RANDOM: tuple[tuple[float, Case], ...] = (
    (4000.0, _F16),
    (4000.0, replace(_F16_WIDE, right=0)),
    (4000.0, replace(_BF16, left=90, right=0)),
)


def check_constant(size: float, case: Case, run: Callable[[Inputs], Run]) -> None:
    """q = k = ``size`` and v = 1: o is 1, bit for bit, and the LSE the score plus the logarithm of how many keys are seen."""
    inputs = _with_ones(build(case))
    inputs.q[...] = inputs.k[...] = size
    found = run(inputs)
    assert found.lse is not None
    np.testing.assert_array_equal(found.out.astype(np.float64), 1)
    score = float(inputs.q.flat[0]) ** 2 * case.head_dim**0.5
    if case.alibi is Alibi.NONE:  # else at most the bias below, 200 slopes
        np.testing.assert_allclose(found.lse, score, rtol=1e-6)


def check_random(size: float, case: Case, run: Callable[[Inputs], Run]) -> None:
    """Any q and k of ``size``, v = 1: o is 1 to the precision of the weights, for every row."""
    inputs = _with_ones(build(case))
    inputs.q[...] = (np.clip(inputs.q.astype(np.float32), -4, 4) * size).astype(inputs.q.dtype)
    inputs.k[...] = (np.clip(inputs.k.astype(np.float32), -4, 4) * size).astype(inputs.k.dtype)
    np.testing.assert_allclose(run(inputs).out.astype(np.float64), 1, atol=2**-7)


def _with_ones(inputs: Inputs) -> Inputs:
    inputs.v[...] = 1
    return inputs
