"""The planners of splits, fed with the SM counts of many GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.kernels.fa3_kvcache import wgmma_splits_for
from atomr_accel_flashattn.kernels.kvcache import KEYS_OF_SPLIT, splits_for

TILES = (1, 2, 3, 7, 16, 39, 40, 41, 100, 131, 132, 133, 160, 500)
KEYS = (0, 16, 255, 256, 512, 4096, 65536)


def problem_of(keys: int) -> Any:
    """A decode over a table of so many slots in pages of 16, or without pages for none."""
    q, k = (np.ones(shape, np.float16) for shape in ((1, 1, 8, 32), (2, 16, 1, 32)))
    return fa.PagedAttentionRequest(q, k, k, np.zeros((1, -(-keys // 16)), np.int32), np.zeros(1, np.int32), max_seqlen_k=keys).problem


@pytest.mark.parametrize("keys", KEYS)
def test_a_decode_fills_the_gpu_once_or_twice(keys: int):
    problem = problem_of(keys)
    most = min(64, max(1, keys // KEYS_OF_SPLIT))
    for multiprocessors in range(40, 161):
        for tiles in TILES:
            splits = splits_for(problem, tiles, multiprocessors)
            assert 1 <= splits <= most
            if tiles >= multiprocessors:
                assert splits == 1
            elif splits < most:
                assert multiprocessors < tiles * splits <= 2 * multiprocessors


@pytest.mark.parametrize("keys", KEYS)
def test_many_queries_take_no_more_steps_than_without_splits(keys: int):
    problem, block_n = problem_of(keys), 128
    steps = -(-keys // block_n)
    for multiprocessors in range(40, 161):
        for tiles in TILES:
            splits = wgmma_splits_for(problem, tiles, block_n, multiprocessors)
            assert 1 <= splits <= min(64, max(1, steps))
            assert -(-tiles * splits // multiprocessors) * -(-steps // splits) <= -(-tiles // multiprocessors) * steps


@pytest.mark.parametrize("multiprocessors", range(40, 161))
def test_the_caller_decides_and_nothing_is_never_split(multiprocessors: int):
    problem = problem_of(65536)
    for plan in (splits_for, lambda problem, tiles, count: wgmma_splits_for(problem, tiles, 128, count)):
        assert plan(problem, 1, multiprocessors) > 1
        assert plan(problem, 0, multiprocessors) == 1
        assert plan(replace(problem, batch_invariant=True), 1, multiprocessors) == 1
        for asked in (1, 5, 128):
            assert plan(replace(problem, num_splits=asked), 1, multiprocessors) == asked
