"""Equal huge scores over keys that are split: the merge of the parts keeps the mean."""

from __future__ import annotations

import numpy as np
import pytest

from atomr_accel_flashattn.kernels.spec import Family, Tile
from tests.cases import Case, build

from .build import compiler
from .running_kvcache import Cached

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

WGMMA = Tile(block_m=64, block_n=32, warps=8, stages=2)
WAYS = [Cached(splits=3), Cached(blocks=7), Cached(family=Family.FA3, tile=WGMMA, splits=3)]


@pytest.mark.parametrize("log2_size", [17, 20, 24])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_parts_of_equal_huge_scores_make_their_mean(way: Cached, log2_size: int):
    inputs = build(Case(lengths_q=(1, 1), lengths_k=(150, 70), heads=4, heads_kv=2))
    scale = float(inputs.softmax_scale or inputs.q.shape[-1] ** -0.5)
    inputs.q[...] = inputs.k[...] = (2.0**log2_size / (scale * inputs.q.shape[-1])) ** 0.5
    made = way(inputs)
    for index, sequence in enumerate(inputs.sequences()):
        mean = np.repeat(sequence.v.astype(np.float64).mean(0), 2, axis=0)
        np.testing.assert_allclose(made.out[index].reshape(mean.shape).astype(np.float64), mean, rtol=2e-3, atol=2e-4)
