"""A request on a cache after an array of it was resized, and its memory, which grows as the keys do."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa

NAMES = ("k_cache", "v_cache", "cache_seqlens", "k", "v", "block_table", "rotary_cos", "rotary_sin")


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("q", (2, 1, 2, 8)), ("k", (2, 1, 1, 8)), ("v", (2, 1, 1, 8)))
    }
    made |= {name: rng.standard_normal((6, 4, 1, 8)).astype(np.float32) for name in ("k_cache", "v_cache")}
    made |= {"cache_seqlens": np.array([3, 5], np.int32), "block_table": np.array([[0, 1], [3, 5]], np.int32)}
    return made | {name: np.ones((8, 4), np.float32) for name in ("rotary_cos", "rotary_sin")}


@pytest.mark.parametrize("name", NAMES)
def test_every_array_is_looked_at_and_told_by_its_name(name: str):
    given = arrays()
    request = fa.CachedFwdRequest(**given)
    given[name].resize((1, *given[name].shape), refcheck=False)
    shown = {"k_cache": "k", "v_cache": "v", "k": "k_new", "v": "v_new"}.get(name, name)
    with pytest.raises(fa.StaleArrayError, match=f"^{shown}: its memory changed"):
        fa.run(request)


def test_copies_and_pickles_write_to_caches_of_their_own():
    request = fa.CachedFwdRequest(**arrays())
    before = request.k_cache.copy()
    others = [copy.deepcopy(request), pickle.loads(pickle.dumps(request))]  # noqa: S301 - our own bytes
    made = [fa.run(each).out for each in others]
    np.testing.assert_array_equal(request.k_cache, before)
    for other, out in zip(others, made, strict=True):
        assert (other.k_cache != before).any()
        np.testing.assert_array_equal(out, fa.run(request).out)


def test_memory_is_linear_in_the_length():
    peaks = []
    for length in (2048, 4096, 8192):
        pages = np.zeros((length // 16, 16, 1, 64), np.float32)
        table, lengths = np.arange(length // 16, dtype=np.int32)[None], np.array([length], np.int32)
        q = np.zeros((1, 64, 1, 64), np.float32)
        request = fa.PagedAttentionRequest(q, pages, pages, table, lengths, mask=fa.MaskKind.causal())
        tracemalloc.start()
        fa.run(request)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 2.5 * (peaks[1] - peaks[0]), peaks
    assert peaks[2] - peaks[1] < 4096 * 64 * 4 * 6, peaks
