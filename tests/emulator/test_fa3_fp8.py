"""The wgmma family over fp8 tensors on the emulator: 8-bit products, V transposed by producer warps, factors, the float32 total of O."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.types import DType
from tests.cases import Case
from tests.fp8 import FP8_FEATURES, FP8_KINDS, Fp8Types, check_fp8, fp8_call

from .build import compiler
from .running_fp8 import emulate_fp8

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

TWO = Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True, persistent=True)
TILES = (
    TWO,
    Tile(block_m=64, block_n=96, warps=8, stages=3),
    Tile(block_m=192, block_n=128, warps=16, stages=2, ping_pong=True, persistent=True),
    Tile(block_m=128, block_n=160, warps=12, stages=2, persistent=True),
    Tile(block_m=64, block_n=32, warps=8, stages=1),
)


@pytest.mark.parametrize("name", FP8_FEATURES)
def test_feature(name: str):
    index = list(FP8_FEATURES).index(name)
    case, types = Case(label=name.replace(" ", "_"), **FP8_FEATURES[name]), FP8_KINDS[index % len(FP8_KINDS)]
    check_fp8(f"{case} {types}", fp8_call(case, types), lambda call: emulate_fp8(call, tile=TILES[index % 3]))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_tile_is_right_and_its_bits_do_not_depend_on_the_order_of_threads_and_copies(tile: Tile):
    case = Case(lengths_q=(40, 150), lengths_k=(333, 170), heads=4, heads_kv=2, left=200, right=0, sink_tokens=3)
    call = fp8_call(case, Fp8Types(v=DType.F8E5M2))
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
