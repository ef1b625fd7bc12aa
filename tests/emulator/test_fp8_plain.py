"""Dense and packed fp8 K and V by mma.sync, run on the CPU thread by thread, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest

from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.types import DType, ScaleUnit
from tests.cases import Alibi, Case, Values
from tests.inputs import Layout

from .build import compiler
from .running_fp8_kvcache import Fp8, check_fp8
from .running_kvcache import Cached

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

E4M3, E5M2 = DType.F8E4M3, DType.F8E5M2
TENSOR, HEAD, BLOCK = ScaleUnit.TENSOR, ScaleUnit.HEAD, ScaleUnit.BLOCK
WIDE = Tile(block_m=128, block_n=32, warps=8, stages=2)  # of many rows
GROUPS = Tile(block_m=32, block_n=32, warps=4, stages=2)
LENGTHS: dict[str, Any] = {"lengths_q": (5, 0, 140), "lengths_k": (150, 20, 301), "heads": 4, "heads_kv": 2, "right": 0}
CASES: dict[str, tuple[dict[str, Any], Fp8, Cached]] = {
    "dense": (
        {"batch": 2, "seqlen_q": 150, "seqlen_k": 300, "heads": 2, "heads_kv": 1},
        Fp8(q=E4M3, units=(BLOCK, BLOCK, BLOCK)),
        Cached(plain=True, tile=WIDE),
    ),
    "packed": (LENGTHS, Fp8(q=E5M2, k=E4M3, v=E5M2, out=DType.F32, units=(HEAD, TENSOR, BLOCK)), Cached(plain=True, tile=WIDE, seed=1)),
    "16 bits": (LENGTHS | {"left": 33}, Fp8(v=E5M2, units=(None, BLOCK, HEAD)), Cached(plain=True, tile=WIDE)),
    "split": (LENGTHS | {"learned_sink": True}, Fp8(q=E4M3, units=(HEAD, HEAD, BLOCK)), Cached(plain=True, tile=GROUPS, splits=3)),
    "everything": (
        LENGTHS | {"left": 60, "right": 2, "sink_tokens": 3, "learned_sink": True, "alibi": Alibi.HEADS, "softcap": 20.0},
        Fp8(k=E5M2, units=(None, HEAD, BLOCK)),
        Cached(plain=True, tile=GROUPS, seed=1),
    ),
    "odd": (
        LENGTHS | {"layout": Layout.ODD, "head_dim": 48, "v_head_dim": 32},
        Fp8(q=E4M3, units=(TENSOR, None, BLOCK)),
        Cached(plain=True, tile=GROUPS),
    ),
    "more queries than keys": (
        {"lengths_q": (70, 9), "lengths_k": (40, 0), "right": 0, "learned_sink": True, "heads": 3, "heads_kv": 1},
        Fp8(units=(None, HEAD, HEAD)),
        Cached(plain=True, tile=WIDE),
    ),
    "unseen NaN": (LENGTHS | {"left": 33, "values": Values.NAN_UNSEEN}, Fp8(q=E4M3), Cached(plain=True, tile=GROUPS, splits=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_keys_and_values(name: str):
    made, types, way = CASES[name]
    check_fp8(Case(label=name.replace(" ", "_"), dtype=DType.BF16, **made), types, way)
