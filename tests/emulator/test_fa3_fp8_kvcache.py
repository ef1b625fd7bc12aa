"""The wgmma family over caches of fp8 K and V on the emulator: boxes of pages that are transposed, splits, factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atomr_accel_flashattn.kernels.spec import Family, Tile
from atomr_accel_flashattn.types import DType, KvLayout, ScaleUnit
from tests.cases import Case

from .build import compiler
from .running_fp8_kvcache import Fp8, average_of_ones, check_fp8
from .running_kvcache import Cached, diagonals
from .test_fa3_kvcache import FEATURES

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

E4M3, E5M2 = DType.F8E4M3, DType.F8E5M2
HEAD, BLOCK = ScaleUnit.HEAD, ScaleUnit.BLOCK
SMALL = Tile(block_m=64, block_n=64, warps=8, stages=2)
TWO = Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True, persistent=True)
THREE = Tile(block_m=192, block_n=128, warps=16, stages=2, ping_pong=True, persistent=True)
TYPES = [
    Fp8(q=E4M3, units=(HEAD, HEAD, HEAD)),
    Fp8(q=E4M3, k=E5M2, v=E5M2, out=DType.F32, units=(BLOCK, BLOCK, BLOCK)),
    Fp8(q=E5M2, out=DType.F16, units=(None, BLOCK, HEAD)),
    Fp8(q=E4M3, v=E5M2, units=(HEAD, None, HEAD)),
]


def way(**options: Any) -> Cached:
    return Cached(family=Family.FA3, **options)


WAYS = [
    way(tile=TWO, block_size=16),
    way(tile=TWO, block_size=16, splits=3),
    way(tile=THREE, block_size=64, seed=1),
    way(tile=SMALL, block_size=24, seed=3, layout=KvLayout.HND),
    way(tile=TWO, block_size=None, splits=4, left_pad=5),
]


@pytest.mark.parametrize(("name", "how", "number"), diagonals(FEATURES, WAYS, 2), ids=str)
def test_feature(name: str, how: Cached, number: int):
    sizes = {"head_dim": 48, "v_head_dim": 32} if name == "padded" else {}
    check_fp8(Case(label=name.replace(" ", "_"), dtype=DType.BF16, **FEATURES[name] | sizes), TYPES[number // 2 % len(TYPES)], how)


HOLES = [way(tile=TWO, splits=3, holes=(0, 3, 4, 5, 12)), way(tile=THREE, block_size=64, seed=1, holes=(0, 2))]


@pytest.mark.parametrize("name", ["full", "window", "sinks", "ratio"])
@pytest.mark.parametrize("how", HOLES, ids=str)
def test_an_entry_outside_the_cache_is_no_keys(how: Cached, name: str):
    check_fp8(Case(label=name, dtype=DType.BF16, **FEATURES[name]), TYPES[3], how)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_an_average_of_ones_in_e5m2_is_one_whatever_parts_it_has(how: Cached):
    case = Case(dtype=DType.BF16, **FEATURES["causal"])
    out = average_of_ones(case, Fp8(q=E5M2, k=E5M2, v=E5M2, out=DType.F32), how)
    np.testing.assert_allclose(out[out != 0], 1, atol=1e-6)
    assert (out != 0).mean() > 0.9
