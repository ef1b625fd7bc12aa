"""The cache kernels' own source, run on the CPU thread by thread, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atomr_accel_flashattn.kernels.spec import Family, Tile
from atomr_accel_flashattn.types import DType
from tests.cases import Alibi, Case, build
from tests.check import check_case
from tests.inputs import Inputs, Layout

from .build import compiler
from .running_kvcache import Cached, diagonals

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

DECODE: dict[str, Any] = {"lengths_q": (1, 1, 1), "lengths_k": (150, 1, 70), "heads": 8, "heads_kv": 2, "right": 0}
UNEQUAL: dict[str, Any] = {"lengths_q": (5, 0, 17), "lengths_k": (150, 20, 40), "heads": 6, "heads_kv": 2}
WAYS = [
    Cached(),
    Cached(splits=3),
    Cached(block_size=None),
    Cached(block_size=None, splits=2, left_pad=5),
    Cached(block_size=7, seed=1),
    Cached(tile=Tile(block_m=32, block_n=16, warps=4, stages=2), splits=4),
    Cached(tile=Tile(block_m=64, block_n=32, warps=4, stages=1), seed=1),
    Cached(tile=Tile(block_m=64, block_n=16, warps=8, stages=3), block_size=64),
    Cached(blocks=1),
    Cached(blocks=7, block_size=None, left_pad=5, seed=1),
    Cached(blocks=40, tile=Tile(block_m=32, block_n=16, warps=4, stages=2), block_size=7, seed=2),
]
FEATURES: dict[str, dict[str, Any]] = {
    "decode": DECODE,
    "causal": UNEQUAL | {"right": 0},
    "full": UNEQUAL,
    "window": UNEQUAL | {"left": 33, "right": 0},
    "sinks": UNEQUAL | {"left": 20, "right": 0, "sink_tokens": 40},
    "learned_sink": UNEQUAL | {"right": 0, "learned_sink": True},
    "alibi": UNEQUAL | {"right": 0, "alibi": Alibi.BATCH},
    "softcap": UNEQUAL | {"softcap": 3.0, "right": 0},
    "everything": UNEQUAL | {"left": 30, "right": 2, "sink_tokens": 3, "learned_sink": True, "alibi": Alibi.HEADS, "softcap": 20.0},
    "mqa": UNEQUAL | {"heads": 5, "heads_kv": 1, "right": 0},
    "padded": UNEQUAL | {"head_dim": 40, "v_head_dim": 24},
    "odd": UNEQUAL | {"layout": Layout.ODD},
    "negative": UNEQUAL | {"softmax_scale": -0.2},
}


@pytest.mark.parametrize(("name", "way", "number"), diagonals(FEATURES, WAYS, 3, whole={"decode", "everything"}), ids=str)
def test_feature(name: str, way: Cached, number: int):
    check_case(Case(label=name, dtype=(DType.F16, DType.BF16)[number % 2], **FEATURES[name]), way)


class NoLength(Cached):
    """Lengths and padding whose difference is no int32: no sequence has a key."""

    def _hold(self, inputs: Inputs, random: np.random.Generator) -> dict[str, Any]:
        held = super()._hold(inputs, random)
        held["cache_lengths"][:], held["left_pad"][:] = -40, 2**31 - 1
        return held


WGMMA: dict[str, Any] = {"family": Family.FA3, "tile": Tile(block_m=64, block_n=32, warps=8, stages=2), "splits": 3}
CUT = [Cached(), Cached(splits=3), Cached(blocks=7), Cached(**WGMMA), Cached(**WGMMA, plain=True)]


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_length_that_overflows_with_its_padding_is_no_keys(blocks: int):
    check_case(Case(**DECODE | {"lengths_k": (0, 0, 0)}), NoLength(block_size=None, left_pad=5, blocks=blocks))


@pytest.mark.parametrize("way", CUT, ids=str)
def test_a_row_of_nan_is_nan_however_its_keys_are_cut(way: Cached):
    inputs = build(Case(**DECODE))
    inputs.q[0, 3] = np.nan
    made = way(inputs)
    for row in range(3):
        for head in range(8):
            nan = (row, head) == (0, 3)
            assert np.isnan(made.out[row, head].astype(np.float32)).all() == nan
            assert np.isnan(made.lse[head, row]) == nan


@pytest.mark.parametrize("way", CUT, ids=str)
def test_a_learned_sink_of_nan_is_seen_by_rows_without_keys(way: Cached):
    inputs = build(Case(**DECODE | {"lengths_k": (150, 0, 70), "learned_sink": True}))
    inputs.learned_sink[5] = np.nan
    made = way(inputs)
    assert np.isnan(made.lse[5]).all()
    assert np.isnan(made.out[:, 5].astype(np.float32)).all()
    others = np.arange(8) != 5
    assert np.isfinite(made.lse[others]).all()
