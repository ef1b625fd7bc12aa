"""fp8 calls of the kernels' tests: types, features, and arrays that TMA can read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.types import DType, ScaleUnit

from .cases import Alibi, Case, Values, build
from .fp8 import Quantised, quantised

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BLOCK_TYPES", "E4M3_TYPES", "FP8_FEATURES", "FP8_KINDS", "Fp8Types", "fp8_call"]


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


E4M3_TYPES = Fp8Types()
BLOCK_TYPES = Fp8Types(k=DType.F8E5M2, unit=ScaleUnit.BLOCK)
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


def fp8_call(case: Case, types: Fp8Types) -> Quantised:
    """The call of a case over random descales; 16 bytes of NaN between its heads, and a row of them between sequences."""
    units = (types.unit if types.q.is_fp8 else None, types.unit, types.unit)
    call = quantised(build(replace(case, dtype=DType.F32)), (types.q, types.k, types.v), units)
    return replace(call, **{name: _aligned(getattr(call, name)) for name in "qkv"})


def _aligned(array: Array) -> Array:
    *lead, tokens, heads, width = array.shape
    whole = np.full((*lead, tokens + 1, heads + 1, width + 16), np.nan, array.dtype)
    view = whole[..., :tokens, :heads, :width]
    view[...] = array
    return view
