"""The wgmma family over KV caches on the emulator: boxes of pages, splits, and what lies around the keys of a sequence."""

from __future__ import annotations

from typing import Any

import pytest

from atomr_accel_flashattn.kernels.spec import Family, Tile
from atomr_accel_flashattn.types import DType, KvLayout
from tests.cases import Alibi, Case, build
from tests.check import check_arrays, check_case

from .build import compiler
from .running_kvcache import Cached, diagonals

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

SMALL = Tile(block_m=64, block_n=32, warps=8, stages=2)
TWO = Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True, persistent=True)
THREE = Tile(block_m=192, block_n=80, warps=16, stages=2, ping_pong=True, persistent=True)


def way(**options: Any) -> Cached:
    return Cached(family=Family.FA3, **options)


# q of 5, 0 and 90 rows: more than a tile, an empty sequence, and fewer than a warpgroup
UNEQUAL: dict[str, Any] = {"lengths_q": (5, 0, 90), "lengths_k": (150, 20, 201), "heads": 4, "heads_kv": 2}
FEATURES: dict[str, dict[str, Any]] = {
    "causal": UNEQUAL | {"right": 0},
    "full": UNEQUAL,
    "window": UNEQUAL | {"left": 33, "right": 0},
    "sinks": UNEQUAL | {"left": 20, "right": 0, "sink_tokens": 40},
    "learned_sink": UNEQUAL | {"right": 0, "learned_sink": True},
    "alibi": UNEQUAL | {"right": 0, "alibi": Alibi.BATCH},
    "softcap": UNEQUAL | {"softcap": 30.0, "right": 0},
    "everything": UNEQUAL | {"left": 60, "right": 2, "sink_tokens": 3, "learned_sink": True, "alibi": Alibi.HEADS, "softcap": 20.0},
    "ratio": UNEQUAL | {"heads": 6, "heads_kv": 2, "right": 0},
    "padded": UNEQUAL | {"head_dim": 40, "v_head_dim": 24},
    "negative": UNEQUAL | {"softmax_scale": -0.2},
    "dense": {"lengths_q": (70, 70), "lengths_k": (130, 71), "heads": 2, "heads_kv": 1, "right": 0},
    "more queries than keys": {"lengths_q": (70, 9), "lengths_k": (40, 0), "heads": 2, "heads_kv": 2, "right": 0, "learned_sink": True},
}
WAYS = [
    way(tile=TWO, block_size=16),
    way(tile=TWO, block_size=16, splits=3),
    way(tile=TWO, block_size=8, splits=2, seed=1),
    way(tile=THREE, block_size=64, seed=1),
    way(tile=SMALL, block_size=128, splits=8, layout=KvLayout.HND),
    way(tile=SMALL, block_size=24, seed=3, layout=KvLayout.HND),
    way(tile=TWO, block_size=None, splits=4, left_pad=5),
    way(tile=THREE, block_size=None, seed=1),
    way(tile=TWO, splits=3, plain=True),
    way(tile=SMALL, splits=8, plain=True, seed=1),
    way(tile=THREE, splits=2, plain=True, seed=2),
]


@pytest.mark.parametrize(("name", "how", "number"), diagonals(FEATURES, WAYS, 3, whole={"sinks", "everything"}), ids=str)
def test_feature(name: str, how: Cached, number: int):
    check_case(Case(label=name.replace(" ", "_"), dtype=(DType.F16, DType.BF16)[number % 2], **FEATURES[name]), how)


HOLES = [
    way(tile=TWO, holes=(0, 3, 4, 5, 6, 12)),
    way(tile=TWO, splits=3, seed=1, holes=(2, 5)),
    way(tile=SMALL, block_size=24, seed=3, holes=(1,)),
    way(tile=THREE, block_size=64, seed=1, holes=(0, 2)),
]


@pytest.mark.parametrize("how", HOLES, ids=str)
@pytest.mark.parametrize("name", ["causal", "sinks", "learned_sink"])
def test_an_entry_outside_the_cache_is_no_keys(name: str, how: Cached):
    inputs = build(Case(label=name, dtype=DType.F16, **FEATURES[name]))
    check_arrays(f"{name} {how}", how.hide_holes(inputs), how(inputs))


@pytest.mark.parametrize("splits", [1, 3])
def test_bits_depend_neither_on_the_order_of_threads_and_copies_nor_on_pages(splits: int):
    case = Case(dtype=DType.BF16, heads=4, heads_kv=1, lengths_q=(40, 3), lengths_k=(333, 50), left=200, right=0, sink_tokens=3)
    inputs = build(case)
    runs = [way(tile=TWO, splits=splits, seed=seed, block_size=size)(inputs) for seed in range(3) for size in (16, 128, None)]
    runs.append(way(tile=TWO, splits=splits, plain=True)(inputs))
    for other in runs[1:]:
        assert other.out.tobytes() == runs[0].out.tobytes()
        assert other.lse is not None
        assert runs[0].lse is not None
        assert other.lse.tobytes() == runs[0].lse.tobytes()
