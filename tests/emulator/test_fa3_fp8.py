"""The wgmma family over fp8 tensors on the emulator: 8-bit products, V transposed by producer warps, factors, the float32 total of O."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.types import DType, ScaleUnit
from tests.cases import Alibi, Case, Values
from tests.fp8 import Fp8Types, check_fp8, fp8_call

from .build import compiler
from .running_fp8 import emulate_fp8

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

E4M3, E5M2 = DType.F8E4M3, DType.F8E5M2
TWO = Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True, persistent=True)
UNEQUAL: dict[str, Any] = {"lengths_q": (5, 0, 140), "lengths_k": (150, 20, 301), "heads": 4, "heads_kv": 2}
FEATURES: dict[str, dict[str, Any]] = {
    "causal": UNEQUAL | {"right": 0},
    "full": {"batch": 2, "seqlen_q": 150, "seqlen_k": 333, "heads": 2, "heads_kv": 1},
    "window": UNEQUAL | {"left": 33, "right": 0},
    "sinks": UNEQUAL | {"left": 20, "right": 0, "sink_tokens": 40},
    "learned_sink": UNEQUAL | {"right": 0, "learned_sink": True},
    "alibi": UNEQUAL | {"right": 0, "alibi": Alibi.BATCH},
    "softcap": UNEQUAL | {"softcap": 30.0, "right": 0},
    "everything": UNEQUAL | {"left": 60, "right": 2, "sink_tokens": 3, "learned_sink": True, "alibi": Alibi.HEADS, "softcap": 20.0},
    "ratio": UNEQUAL | {"heads": 6, "heads_kv": 2, "right": 0},
    "padded": UNEQUAL | {"head_dim": 48, "v_head_dim": 32},
    "negative": UNEQUAL | {"softmax_scale": -0.2},
    "more queries than keys": {"lengths_q": (70, 9), "lengths_k": (40, 0), "heads": 2, "heads_kv": 2, "right": 0, "learned_sink": True},
    "unseen_nan": UNEQUAL | {"left": 33, "right": 0, "values": Values.NAN_UNSEEN},
    "rising": UNEQUAL | {"values": Values.RISING},
}
TILES = (
    TWO,
    Tile(block_m=64, block_n=96, warps=8, stages=3),
    Tile(block_m=192, block_n=128, warps=16, stages=2, ping_pong=True, persistent=True),
    Tile(block_m=128, block_n=160, warps=12, stages=2, persistent=True),
    Tile(block_m=64, block_n=32, warps=8, stages=1),
)
KINDS = (
    Fp8Types(),
    Fp8Types(E4M3, E5M2, E5M2, DType.F16, ScaleUnit.TENSOR),
    Fp8Types(E5M2, E4M3, E4M3, DType.F32, None),
    Fp8Types(E5M2, E5M2, E4M3),
)


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str):
    index = list(FEATURES).index(name)
    case, types = Case(label=name.replace(" ", "_"), **FEATURES[name]), KINDS[index % len(KINDS)]
    check_fp8(f"{case} {types}", fp8_call(case, types), lambda call: emulate_fp8(call, tile=TILES[index % 3]))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_tile_is_right_and_its_bits_do_not_depend_on_the_order_of_threads_and_copies(tile: Tile):
    case = Case(lengths_q=(40, 150), lengths_k=(333, 170), heads=4, heads_kv=2, left=200, right=0, sink_tokens=3)
    call = fp8_call(case, Fp8Types(v=E5M2))
    runs = [check_fp8(str(case), call, partial(emulate_fp8, tile=tile, seed=seed)) for seed in range(4)]
    for other in runs[1:]:
        assert other.out.tobytes() == runs[0].out.tobytes()


@pytest.mark.parametrize("width", [16, 64, 96, 128, 192, 256])
def test_head_dim_with_its_own_tile(width: int):
    case = Case(seqlen_q=70, seqlen_k=450, heads=2, heads_kv=1, head_dim=width, v_head_dim=width, right=0)
    check_fp8(str(case), fp8_call(case, Fp8Types()), emulate_fp8)


def test_a_total_in_float32_keeps_what_an_accumulator_of_14_bits_loses():
    case = Case(seqlen_q=64, seqlen_k=9000, heads=1, heads_kv=1)
    call = fp8_call(case, Fp8Types(out=DType.F32, unit=None))
    random = np.random.default_rng(0)
    call.inputs.q[...] = 0
    call.exact.q[...] = 0
    call.inputs.v[...] = 1 + random.integers(-3, 4, call.inputs.v.shape) / 8
    call.exact.v[...] = call.inputs.v.astype(np.float32)
    mean = call.exact.v.mean(axis=1, dtype=np.float64)
    error = {single: np.abs(emulate_fp8(call, single_level=single).out / mean[:, None] - 1).max() for single in (False, True)}
    assert error[False] < 2e-3
    assert error[True] > 3 * error[False]
