"""The wgmma family on the emulator: tensor copies, mbarrier rings, asynchronous products, the persistent scheduler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from atomr_accel_flashattn.jit.spec import Family, Tile
from atomr_accel_flashattn.types import DType
from tests.case_lists import hazard_cases, head_dim_cases, pairwise_cases
from tests.cases import GPU_DTYPES, Case, build
from tests.check import check_case
from tests.inputs import Inputs, Layout

from .build import compiler
from .running import emulate
from .test_kernels import EVERYTHING, RAGGED

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

PLAIN = Tile(block_m=128, block_n=128, warps=12, stages=2)
TILES = (
    PLAIN,
    replace(PLAIN, persistent=True),
    Tile(block_m=64, block_n=96, warps=8, stages=3),
    Tile(block_m=192, block_n=64, warps=16, stages=2, persistent=True),
    Tile(block_m=192, block_n=64, warps=16, stages=2, ping_pong=True, persistent=True),
    Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True),
    Tile(block_m=256, block_n=64, warps=20, stages=4, ping_pong=True),
    Tile(block_m=128, block_n=64, warps=12, stages=1, ping_pong=True, persistent=True),
    Tile(block_m=256, block_n=32, warps=20, stages=2, ping_pong=True, persistent=True),
    Tile(block_m=128, block_n=160, warps=12, stages=2, persistent=True),
    Tile(block_m=64, block_n=32, warps=8, stages=4),
)
NO_DROPOUT_TILES = (Tile(block_m=128, block_n=80, warps=12, stages=2), Tile(block_m=128, block_n=176, warps=12, stages=2))


def _aligned(cases: list[Case]) -> list[Case]:
    """Odd strides take another load path than tensor copies."""
    return [case for case in cases if case.layout is not Layout.ODD]


def _tile(case: Case) -> Tile:
    """Two stages fit beside the rest at every head dim."""
    wide = max(case.head_dim, case.v_head_dim) > 128
    return replace(PLAIN, block_n=64 if wide else 128, persistent=True)


@pytest.mark.parametrize("case", _aligned(hazard_cases([DType.BF16])), ids=str)
def test_hazard(case: Case):
    check_case(case, lambda inputs: emulate(inputs, tile=_tile(case), family=Family.FA3))


@pytest.mark.parametrize("case", _aligned(pairwise_cases(GPU_DTYPES)), ids=str)
def test_every_pair_of_features(case: Case):
    check_case(case, lambda inputs: emulate(inputs, tile=_tile(case), family=Family.FA3, seed=1))


@pytest.mark.parametrize("case", head_dim_cases([DType.F16])[::5], ids=str)
def test_head_dim(case: Case):
    check_case(case, lambda inputs: emulate(inputs, tile=_tile(case), family=Family.FA3))


@pytest.mark.parametrize("tile", TILES + NO_DROPOUT_TILES, ids=str)
def test_tile(tile: Tile):
    check_case(RAGGED, lambda inputs: emulate(inputs, tile=tile, family=Family.FA3, seed=1))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tile_with_every_feature(tile: Tile):
    check_case(EVERYTHING, lambda inputs: emulate(inputs, tile=tile, family=Family.FA3))


@pytest.mark.parametrize("tile", TILES[:9], ids=str)
@pytest.mark.parametrize("case", [RAGGED, EVERYTHING], ids=["causal", "everything"])
def test_bits_do_not_depend_on_the_order_of_threads_and_copies(case: Case, tile: Tile):
    inputs: Inputs = build(case)
    first = emulate(inputs, tile=tile, family=Family.FA3)
    for seed in range(1, 12):
        other = emulate(inputs, tile=tile, family=Family.FA3, seed=seed)
        assert np.array_equal(first.out.view(np.uint16), other.out.view(np.uint16)), f"seed {seed} gives other bits"


@pytest.mark.parametrize("family", [Family.FA2, Family.FA3], ids=lambda family: family.value)
def test_a_nan_reaches_no_block_of_rows_that_does_not_see_its_key(family: Family):
    case = Case(dtype=DType.BF16, heads=1, heads_kv=1, seqlen_q=384, seqlen_k=384, head_dim=64, v_head_dim=64, right=0)
    inputs = build(case)
    inputs.v[0, 200] = np.nan
    out = emulate(inputs, tile=TILES[3] if family is Family.FA3 else None, family=family).out
    assert not np.isnan(out[0, :128].astype(np.float32)).any()
    assert np.isnan(out[0, 200:].astype(np.float32)).all()
