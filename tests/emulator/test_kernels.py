"""The kernels' own source, run on the CPU thread by thread, against the float64 oracle. A GPU says the last word (tests/gpu)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.types import DType, SmArch
from tests.case_lists import emulated_cases, hazard_cases, head_dim_cases
from tests.cases import GPU_DTYPES, Alibi, Case, build
from tests.check import check_arrays, check_case
from tests.inputs import Inputs

from .build import compiler
from .running import check_orders, emulate

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

RAGGED = Case(seqlen_q=150, seqlen_k=333, heads=3, heads_kv=1, head_dim=128, v_head_dim=128, right=0)
EVERYTHING = Case(
    lengths_q=(70, 0, 140),
    lengths_k=(100, 5, 230),
    heads=3,
    heads_kv=1,
    head_dim=120,
    v_head_dim=104,
    left=50,
    right=10,
    sink_tokens=9,
    learned_sink=True,
    alibi=Alibi.BATCH,
    softcap=20.0,
    dropout_p=0.2,
)
TILES = (
    Tile(block_m=128, block_n=64, warps=4),
    Tile(block_m=128, block_n=64, warps=4, stages=2),
    Tile(block_m=64, block_n=32, warps=4, stages=3),
    Tile(block_m=64, block_n=64, warps=2, stages=2),
    Tile(block_m=128, block_n=96, warps=8),
    Tile(block_m=128, block_n=128, warps=4),
    Tile(block_m=64, block_n=64, warps=4),
    Tile(block_m=192, block_n=32, warps=6, stages=2),
    Tile(block_m=64, block_n=32, warps=4, stages=4),
    Tile(block_m=64, block_n=32, warps=4, persistent=True),
    Tile(block_m=64, block_n=32, warps=4, stages=3, persistent=True),
)
NO_DROPOUT_TILES = (Tile(block_m=128, block_n=48, warps=4), Tile(block_m=64, block_n=80, warps=4, stages=2))


@pytest.mark.parametrize("case", hazard_cases([DType.BF16]), ids=str)
def test_hazard(case: Case):
    check_case(case, emulate)


@pytest.mark.parametrize("case", emulated_cases(GPU_DTYPES), ids=str)
def test_every_pair_of_features(case: Case):
    check_case(case, lambda inputs: emulate(inputs, seed=1))


@pytest.mark.parametrize("case", head_dim_cases([DType.F16])[::3], ids=str)
def test_head_dim(case: Case):
    check_case(case, emulate)


@pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_89, SmArch.SM_100], ids=lambda arch: arch.value)
@pytest.mark.parametrize("case", [RAGGED, EVERYTHING], ids=["causal", "everything"])
def test_tiles_of_arch(case: Case, arch: SmArch):
    check_case(case, lambda inputs: emulate(inputs, arch=arch))


@pytest.mark.parametrize("change", [{"right": None}, {}, {"dropout_p": 0.2}], ids=["full", "causal", "dropout"])
@pytest.mark.parametrize("width", [64, 256])
def test_widths_whose_tile_depends_on_more(width: int, change: dict[str, Any]):
    check_case(replace(RAGGED, head_dim=width, v_head_dim=width, **change), emulate)


# Every tile with all features, and every third also with one: that is what a compiler has time for.
TILED = [*((EVERYTHING, tile) for tile in TILES), *((RAGGED, tile) for tile in TILES[::3] + NO_DROPOUT_TILES)]


def case_id(value: object) -> str:
    return "everything" if value is EVERYTHING else "causal" if value is RAGGED else str(value)


@pytest.mark.parametrize(("case", "tile"), TILED, ids=case_id)
def test_a_tile_is_right_and_its_bits_do_not_depend_on_the_order_of_threads(case: Case, tile: Tile):
    check_orders(case, range(3), tile=tile)


def test_a_learned_sink_of_minus_infinity_is_none_and_hides_no_nan():
    inputs: Inputs = build(replace(RAGGED, seqlen_q=120, seqlen_k=60, learned_sink=True))
    assert inputs.learned_sink is not None
    inputs.learned_sink[...] = -np.inf
    inputs.q[0, 100] = np.nan
    run = emulate(inputs)
    check_arrays("sink_of_minus_infinity", inputs, run)
    assert run.lse is not None
    assert np.isnan(run.lse[0, :, 100]).all()
    assert np.isneginf(run.lse[0, :, :60]).all()
