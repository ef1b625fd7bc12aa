"""fp8 on the CPU backend, through requests and functional calls, against the oracle on what the arrays mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import DType, Fp8Options, ScaleUnit
from tests.cases import Alibi, Case, Values, build
from tests.check import Run
from tests.fp8 import Quantised, check_fp8, quantised
from tests.pairwise import covering_rows

E4M3, E5M2, TENSOR, HEAD, BLOCK = DType.F8E4M3, DType.F8E5M2, ScaleUnit.TENSOR, ScaleUnit.HEAD, ScaleUnit.BLOCK
DENSE = {"batch": 2, "seqlen_q": 150, "seqlen_k": 300}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "more queries than keys": {"batch": 1, "seqlen_q": 200, "seqlen_k": 140},
    "packed": {"lengths_q": (70, 1, 0, 130), "lengths_k": (270, 33, 5, 130)},
}
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"right": 0},
    "window and sinks": {"left": 40, "right": 0, "sink_tokens": 3},
    "both sides": {"left": 20, "right": 9},
    "learned sink": {"learned_sink": True, "right": 0},
    "alibi": {"alibi": Alibi.BATCH, "right": 0},
    "softcap": {"softcap": 3.0},
    "negative scale": {"softmax_scale": -0.2},
    "huge": {"values": Values.HUGE},
    "rising": {"values": Values.RISING},
    "unseen NaN": {"values": Values.NAN_UNSEEN, "left": 20, "right": 0},
}
AXES: dict[str, tuple[Any, ...]] = {
    "shape": tuple(SHAPES),
    "feature": tuple(FEATURES),
    "q": (E4M3, E5M2, DType.BF16, DType.F16),
    "k": (E4M3, E5M2),
    "v": (E4M3, E5M2),
    "q_unit": (None, TENSOR, HEAD, BLOCK),
    "k_unit": (None, TENSOR, HEAD, BLOCK),
    "v_unit": (None, TENSOR, HEAD, BLOCK),
    "out": (None, DType.F16, DType.F32),
    "heads_kv": (2, 1, 4),
    "head_dim": ((32, 32), (16, 48), (64, 32)),
}


def request_of(call: Quantised, **more: Any) -> Any:
    """A dense or a packed request, of no family."""
    inputs = call.meant
    given = {
        "mask": fa.MaskKind(inputs.left, inputs.right),
        "bias": fa.PositionBias(inputs.alibi_slopes),
        "sink_tokens": inputs.sink_tokens,
        "options": fa.AttentionOptions(softmax_scale=inputs.softmax_scale, softcap=inputs.softcap, learned_sink=inputs.learned_sink),
    } | more
    if inputs.cu_seqlens_q is None:
        return fa.DenseFwdRequest(call.q, call.k, call.v, **given)
    offsets = {f"cu_seqlens_{name}": fa.CumulativeSeqlens(getattr(inputs, f"cu_seqlens_{name}"), 300) for name in "qk"}
    return fa.VarlenFwdRequest(call.q, call.k, call.v, **offsets, **given)


def widened(descales: dict[str, Any]) -> dict[str, Any]:
    """With more blocks than the longest sequence has, NaN in those that no token lies in."""

    def wide(x: Any) -> Any:
        return x if x.ndim < 3 else np.pad(x, ((0, 0), (0, 0), (0, 3 - x.shape[2])), constant_values=np.nan)

    return {name: wide(x) for name, x in descales.items()}


def call_of(row: dict[str, Any]) -> tuple[Quantised, DType]:
    head_dim, v_head_dim = row["head_dim"]
    sizes = {"heads": 4, "heads_kv": row["heads_kv"], "head_dim": head_dim, "v_head_dim": v_head_dim, "dtype": DType.F32}
    inputs = build(Case(**sizes, **SHAPES[row["shape"]], **FEATURES[row["feature"]]))
    q_unit = row["q_unit"] if row["q"] in {E4M3, E5M2} else None
    out = row["out"] or (DType.BF16 if row["q"] in {E4M3, E5M2} else row["q"])
    return quantised(inputs, (row["q"], row["k"], row["v"]), (q_unit, row["k_unit"], row["v_unit"])), out


ROWS = covering_rows(AXES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(getattr(x, "value", x)) for x in row.values()))
def test_what_the_arrays_mean_is_what_is_computed(row: dict[str, Any]) -> None:
    call, out = call_of(row)
    descales = widened(call.descales) if row["shape"] == "packed" else call.descales
    made = fa.run(request_of(call, fp8=Fp8Options(**descales, out_dtype=row["out"])))
    check_fp8("request", call, Run(made.out, made.lse), out)
