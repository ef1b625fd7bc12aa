"""The wgmma family on the emulator: TMA, mbarrier pipelines, asynchronous products, the persistent scheduler."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest

from atomr_accel_flashattn.dispatch import key_of_problem
from atomr_accel_flashattn.kernels.spec import Family, Tile
from atomr_accel_flashattn.types import DType, SmArch
from tests.case_lists import emulated_cases, hazard_cases, head_dim_cases
from tests.cases import GPU_DTYPES, Case, build
from tests.check import check_case
from tests.inputs import Layout
from tests.reference.running import problem_of

from .build import compiler
from .running import check_orders, emulate
from .test_kernels import EVERYTHING, RAGGED, case_id

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
    Tile(block_m=192, block_n=64, warps=16, stages=4, ping_pong=True),
    Tile(block_m=128, block_n=64, warps=12, stages=1, ping_pong=True, persistent=True),
    Tile(block_m=256, block_n=32, warps=20, stages=2, ping_pong=True, persistent=True),
    Tile(block_m=128, block_n=160, warps=12, stages=2, persistent=True),
    Tile(block_m=64, block_n=32, warps=8, stages=4),
)
# Query heads that share K and V are rows of one tile, in kernels of their own.
PACKED = (
    Case(label="two_heads", heads=4, heads_kv=2, seqlen_q=75, seqlen_k=150, right=0),
    Case(label="window", heads=8, heads_kv=1, seqlen_q=37, seqlen_k=90, left=20, right=0, sink_tokens=5),
    Case(label="a_query_a_warpgroup", heads=64, heads_kv=1, seqlen_q=5, seqlen_k=70, right=0),
    Case(label="empty_sequence", heads=16, heads_kv=2, lengths_q=(9, 0, 21), lengths_k=(30, 8, 21), right=0, learned_sink=True),
    Case(label="more_queries_than_keys", heads=4, heads_kv=1, seqlen_q=70, seqlen_k=20, right=0, learned_sink=True),
    Case(label="no_bounds", heads=8, heads_kv=2, seqlen_q=21, seqlen_k=333, batch=2, layout=Layout.HEADS_FIRST),
    Case(label="padded", heads=2, heads_kv=1, seqlen_q=70, seqlen_k=80, head_dim=40, v_head_dim=24, left=9, right=3, softcap=5.0),
)
PACKED_TILES = (
    Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True, persistent=True),
    Tile(block_m=192, block_n=32, warps=16, stages=2, ping_pong=True, persistent=True),
    Tile(block_m=64, block_n=32, warps=8, stages=3),
)
NO_DROPOUT_TILES = (Tile(block_m=128, block_n=80, warps=12, stages=2), Tile(block_m=128, block_n=176, warps=12, stages=2))
# Every tile with all features, and every second also with one.
TILED = [*((EVERYTHING, tile) for tile in TILES), *((RAGGED, tile) for tile in TILES[1::2] + NO_DROPOUT_TILES)]


def _aligned(cases: list[Case]) -> list[Case]:
    """Odd strides take another load path than TMA."""
    return [case for case in cases if case.layout is not Layout.ODD]


def _tile(case: Case) -> Tile:
    """Two stages fit beside the rest at every head dim."""
    wide = max(case.head_dim, case.v_head_dim) > 128
    return replace(PLAIN, block_n=64 if wide else 128, persistent=True)


@pytest.mark.parametrize("case", _aligned(hazard_cases([DType.BF16])), ids=str)
def test_hazard(case: Case):
    check_case(case, lambda inputs: emulate(inputs, tile=_tile(case), family=Family.FA3))


@pytest.mark.parametrize("case", emulated_cases(GPU_DTYPES, [layout for layout in Layout if layout is not Layout.ODD]), ids=str)
def test_every_pair_of_features(case: Case):
    check_case(case, lambda inputs: emulate(inputs, tile=_tile(case), family=Family.FA3, seed=1))


@pytest.mark.parametrize("case", head_dim_cases([DType.F16])[::5], ids=str)
def test_head_dim(case: Case):
    check_case(case, lambda inputs: emulate(inputs, tile=_tile(case), family=Family.FA3))


@pytest.mark.parametrize(("case", "tile"), TILED, ids=case_id)
def test_a_tile_is_right_and_its_bits_do_not_depend_on_the_order_of_threads_and_copies(case: Case, tile: Tile):
    check_orders(case, range(4), tile=tile, family=Family.FA3)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_bits_of_a_sequence_do_not_depend_on_the_next_one_or_on_keys_that_it_does_not_see(softcap: float):
    inputs = build(Case(dtype=DType.F16, lengths_q=(700, 60), lengths_k=(700, 60), heads=4, heads_kv=4, left=300, right=0, softcap=softcap))
    q, k = inputs.q.copy(), inputs.k.copy()
    q[700:] *= 30
    k[700:] *= 30
    k[:100] *= 30  # query 400 and later ones see none of them
    first, other = (emulate(each, family=Family.FA3) for each in (inputs, replace(inputs, q=q, k=k)))
    assert first.lse is not None
    assert other.lse is not None
    assert first.out[400:700].tobytes() == other.out[400:700].tobytes()
    assert first.lse[:, 400:700].tobytes() == other.lse[:, 400:700].tobytes()


@pytest.mark.parametrize(("case", "tile"), list(zip(PACKED, cycle(PACKED_TILES), strict=False)), ids=str)
def test_heads_that_share_keys_are_rows_of_one_tile_and_bits_do_not_depend_on_order(case: Case, tile: Tile):
    assert key_of_problem(problem_of(build(case)), SmArch.SM_90A).packs_heads
    check_orders(case, range(4), tile=tile, family=Family.FA3)


@pytest.mark.parametrize("family", [Family.FA2, Family.FA3], ids=lambda family: family.value)
def test_a_nan_reaches_no_block_of_rows_that_does_not_see_its_key(family: Family):
    case = Case(dtype=DType.BF16, heads=1, heads_kv=1, seqlen_q=384, seqlen_k=384, head_dim=64, v_head_dim=64, right=0)
    inputs = build(case)
    inputs.v[0, 200] = np.nan
    out = emulate(inputs, tile=TILES[3] if family is Family.FA3 else None, family=family).out
    assert not np.isnan(out[0, :128].astype(np.float32)).any()
    assert np.isnan(out[0, 200:].astype(np.float32)).all()
