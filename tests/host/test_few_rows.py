"""Shapes whose work leaves SMs or warps idle: how plain K and V are then split, and which tile few rows behind many keys take."""

from __future__ import annotations

from dataclasses import replace

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.dispatch import key_of_problem
from atomr_accel_flashattn.kernels.attention import AttentionSpec
from atomr_accel_flashattn.kernels.fa3_kvcache import wgmma_splits_for
from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.problem import AttentionProblem
from atomr_accel_flashattn.tiles.tables import wgmma_cache_tile_for
from tests.fakes.gpu import FakeGpu

from .test_head_splits import H200, problem

FEW = Tile(block_m=128, block_n=64, warps=12, stages=2)
FEW_ON_CACHE = Tile(block_m=128, block_n=96, warps=12, stages=2, ping_pong=True)


def splits(known: AttentionProblem, tiles: int, block_n: int = 80) -> int:
    return wgmma_splits_for(known, tiles, block_n, H200)


def test_more_tiles_than_sms_are_split_where_the_last_wave_is_nearly_empty():
    """512 queries of 64 / 8 heads on 64k keys are 171 tiles of 192 rows, two waves of 132."""
    assert splits(problem(1, 512, 65536, 64, 8), 171) == 3
    assert splits(problem(1, 512, 65536, 8, 1), 22) == 6
    assert splits(problem(2, 8192, 8192, 16, 16), 1376) == 1
    assert splits(problem(64, 16, 4096, 32, 8), 512, 128) == 1


def test_parts_are_never_larger_than_keys_and_values():
    few_keys = problem(1, 4096, 512, 8, 1)
    assert splits(few_keys, 22) == 1
    assert splits(replace(few_keys, num_splits=3), 22) == 3


@pytest.mark.parametrize(
    ("known", "few"),
    [
        (problem(64, 16, 4096, 32, 8), True),  # 64 rows a KV head
        (problem(64, 17, 4096, 32, 8), False),
        (problem(64, 16, 1023, 32, 8), False),
        (problem(64, 64, 4096, 8, 8), True),
        (problem(0, 0, 4096, 8, 8), False),
    ],
    ids=["packed", "a row more", "few keys", "one head", "no rows"],
)
def test_few_rows_behind_many_keys_have_a_tile_of_their_own(known: AttentionProblem, few: bool, monkeypatch: pytest.MonkeyPatch):
    FakeGpu().install(monkeypatch)
    key = key_of_problem(known, fa.SmArch.SM_90A)
    spec = fa.lookup(key)
    assert key.extras.few_rows == few
    assert isinstance(spec, AttentionSpec)
    assert (replace(spec.tile, persistent=False) == FEW) == few


def test_few_rows_on_a_cache_have_another():
    assert wgmma_cache_tile_for(128, 128, short_q=True, few_rows=True) == FEW_ON_CACHE
    assert wgmma_cache_tile_for(128, 128, short_q=True) != FEW_ON_CACHE
    assert wgmma_cache_tile_for(64, 64, few_rows=True) == wgmma_cache_tile_for(64, 64)
