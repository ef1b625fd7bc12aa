"""fp8 calls for tests: inputs rounded to 8 bits with factors, the oracle on what they stand for, and the evaluation that bounds errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from atomr_accel_flashattn.types import DType, ScaleUnit

from .cases import Alibi, Case, Values, build
from .check import Run, _same_pattern, _within
from .inputs import NUMPY_DTYPE, Inputs
from .oracle import LSE_TOLERANCE, Precision, Tolerance, _softmax, oracle

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["FP8", "FP8_FEATURES", "FP8_KINDS", "Fp8Call", "Fp8Types", "check_fp8", "fp8_call", "place_aligned", "plain_fp8"]

FP8 = {DType.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn), DType.F8E5M2: np.dtype(ml_dtypes.float8_e5m2)}
_SCORE_ERROR = 2.0**-11  # relative: accumulators of 8-bit wgmma have 14 bits and truncate, up to eight times for a score
_OFFSET = 2.0**8  # of the largest P of a row, as kernels have it


@dataclass(frozen=True, slots=True)
class Fp8Types:
    """Of q, k, v and o, and what shares a factor."""

    q: DType = DType.F8E4M3
    k: DType = DType.F8E4M3
    v: DType = DType.F8E4M3
    out: DType = DType.BF16
    unit: ScaleUnit | None = ScaleUnit.HEAD

    def __str__(self) -> str:
        return "-".join([*(each.value for each in (self.q, self.k, self.v, self.out)), self.unit.value if self.unit else "unscaled"])


_UNEQUAL: dict[str, Any] = {"lengths_q": (5, 0, 140), "lengths_k": (150, 20, 301), "heads": 4, "heads_kv": 2}
FP8_FEATURES: dict[str, dict[str, Any]] = {
    "causal": _UNEQUAL | {"right": 0},
    "full": {"batch": 2, "seqlen_q": 150, "seqlen_k": 333, "heads": 2, "heads_kv": 1},
    "window": _UNEQUAL | {"left": 33, "right": 0},
    "sinks": _UNEQUAL | {"left": 20, "right": 0, "sink_tokens": 40},
    "learned_sink": _UNEQUAL | {"right": 0, "learned_sink": True},
    "alibi": _UNEQUAL | {"right": 0, "alibi": Alibi.BATCH},
    "softcap": _UNEQUAL | {"softcap": 30.0, "right": 0},
    "everything": _UNEQUAL | {"left": 60, "right": 2, "sink_tokens": 3, "learned_sink": True, "alibi": Alibi.HEADS, "softcap": 20.0},
    "ratio": _UNEQUAL | {"heads": 6, "heads_kv": 2, "right": 0},
    "padded": _UNEQUAL | {"head_dim": 48, "v_head_dim": 32},
    "negative": _UNEQUAL | {"softmax_scale": -0.2},
    "more queries than keys": {"lengths_q": (70, 9), "lengths_k": (40, 0), "heads": 2, "heads_kv": 2, "right": 0, "learned_sink": True},
    "unseen_nan": _UNEQUAL | {"left": 33, "right": 0, "values": Values.NAN_UNSEEN},
    "rising": _UNEQUAL | {"values": Values.RISING},
}
FP8_KINDS = (
    Fp8Types(),
    Fp8Types(DType.F8E4M3, DType.F8E5M2, DType.F8E5M2, DType.F16, ScaleUnit.TENSOR),
    Fp8Types(DType.F8E5M2, DType.F8E4M3, DType.F8E4M3, DType.F32, None),
    Fp8Types(DType.F8E5M2, DType.F8E5M2, DType.F8E4M3),
)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Call:
    """``inputs`` has 8-bit q, k and v; ``exact`` the float32 numbers that they stand for. Factors: float32 (), (B, Hkv), or None."""

    types: Fp8Types
    inputs: Inputs
    exact: Inputs
    q_descale: Array | None
    k_descale: Array | None
    v_descale: Array | None


def fp8_call(case: Case, types: Fp8Types) -> Fp8Call:
    """The call of a case, whose arrays are first divided by factors from 0.25 to 3 and rounded."""
    inputs = build(replace(case, dtype=DType.F32))
    random = np.random.default_rng(len(str(case)))
    shape = {None: None, ScaleUnit.TENSOR: (), ScaleUnit.HEAD: (inputs.batch, inputs.heads_kv)}[types.unit]
    factors = [None if shape is None else random.choice(np.array([0.25, 0.5, 3.0], np.float32), shape) for _ in range(3)]
    stored, exact = {}, {}
    for name, factor in zip("qkv", factors, strict=True):
        array = getattr(inputs, name)
        scale = _spread(factor, inputs, array)
        with np.errstate(all="ignore"):
            stored[name] = place_aligned((array / scale).astype(FP8[getattr(types, name)]))
        exact[name] = stored[name].astype(np.float32) * scale
    return Fp8Call(types, replace(inputs, **stored), replace(inputs, **exact), *(None if x is None else np.asarray(x) for x in factors))


def _spread(factor: Any, inputs: Inputs, array: Array) -> Array:
    """The factor of every row and head of an array, to be multiplied with it."""
    if factor is None or np.ndim(factor) == 0:
        return np.float32(1 if factor is None else factor)
    rows = np.repeat(np.asarray(factor), array.shape[-2] // inputs.heads_kv, axis=1)  # (B, heads)
    lengths = inputs.cu_seqlens_q if array is inputs.q else inputs.cu_seqlens_k
    if lengths is None:
        return rows[:, None, :, None]
    return np.repeat(rows, np.diff(lengths), axis=0)[:, :, None]


def place_aligned(array: Array) -> Array:
    """The same values with 16 bytes of NaN between heads, and rows and sequences apart."""
    *lead, tokens, heads, width = array.shape
    whole = np.full((*lead, tokens + 1, heads + 1, width + 16 + -width % 16), np.nan, array.dtype)
    view = whole[..., :tokens, :heads, :width]
    view[...] = array
    return view


def plain_fp8(call: Fp8Call) -> Array:
    """A plain evaluation in the types of the call: P, at most 2^8 in a row, is rounded to the type of v; o to its own."""
    inputs, kind = call.exact, NUMPY_DTYPE[call.types.out]
    single = np.dtype(np.float32)
    out = np.full(inputs.out_shape, np.nan, kind)
    with np.errstate(all="ignore"):
        for sequence in inputs.sequences():
            head, query = np.arange(inputs.heads), np.arange(len(sequence.q))
            made = _softmax(inputs, sequence, head, query, Precision(single, single))
            top = made.probability.max(axis=-1, keepdims=True, initial=0)
            scale = np.where(top > 0, _OFFSET / np.where(top > 0, top, 1), 0)
            rounded = (made.probability * scale).astype(FP8[call.types.v]).astype(single)
            o = np.where(top > 0, rounded @ made.v / np.where(scale > 0, scale, 1), 0)
            out[sequence.out_rows] = o.astype(kind).transpose(1, 0, 2)
    return out


def check_fp8(name: str, call: Fp8Call, run: Callable[[Fp8Call], Run]) -> Run:
    """Run a call and compare with the oracle on the numbers that its arrays stand for."""
    made, kind = run(call), NUMPY_DTYPE[call.types.out]
    exact = oracle(call.exact)
    tolerance = Tolerance.of_output(call.types.out, exact.out, [plain_fp8(call)])
    assert made.out.shape == call.exact.out_shape
    assert made.out.dtype == kind
    _same_pattern(f"{name}: out", made.out, exact.out.astype(kind))
    origin = f"2 x {tolerance.plain_error:.3e} (plain evaluation) + {tolerance.floor:.3e} (rounding floor)"
    _within(f"{name}: out", made.out, exact.out, tolerance.bound, origin)
    if made.lse is not None:
        _same_pattern(f"{name}: lse", made.lse, exact.lse)
        largest = float(np.abs(exact.lse[np.isfinite(exact.lse)]).max(initial=0))
        bound = LSE_TOLERANCE + _SCORE_ERROR * largest
        _within(f"{name}: lse", made.lse, exact.lse, bound, f"{LSE_TOLERANCE} + {_SCORE_ERROR:.1e} x {largest:.3g} (scores)")
    return made
