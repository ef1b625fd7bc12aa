"""The kernels over a cache of fp8 K and V, run on the CPU thread by thread, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.types import DType, ScaleUnit
from tests.cases import Alibi, Case
from tests.inputs import Layout

from .build import compiler
from .running_fp8_kvcache import Fp8, check_fp8
from .running_kvcache import Cached, diagonals

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

E4M3, E5M2 = DType.F8E4M3, DType.F8E5M2
TENSOR, HEAD, BLOCK, TOKEN = ScaleUnit.TENSOR, ScaleUnit.HEAD, ScaleUnit.BLOCK, ScaleUnit.TOKEN
DECODE: dict[str, Any] = {"lengths_q": (1, 1, 1), "lengths_k": (300, 1, 70), "heads": 8, "heads_kv": 2, "right": 0}
UNEQUAL: dict[str, Any] = {"lengths_q": (5, 0, 17), "lengths_k": (150, 20, 40), "heads": 6, "heads_kv": 2}
TYPES = [
    Fp8(),
    Fp8(k=E5M2, v=E5M2, out=DType.F32),
    Fp8(q=E4M3),
    Fp8(q=E4M3, k=E5M2, v=E4M3, out=DType.F16),
    Fp8(q=E5M2, v=E5M2, out=DType.F32),
]
UNITS = [(None, HEAD, HEAD), (None, TENSOR, BLOCK), (None, BLOCK, None), (None, TOKEN, TOKEN)]
WAYS = [
    Cached(),
    Cached(splits=3),
    Cached(block_size=7, seed=1),
    Cached(tile=Tile(block_m=32, block_n=16, warps=4, stages=2), splits=4),
    Cached(tile=Tile(block_m=64, block_n=32, warps=8, stages=1), seed=1),
    Cached(blocks=7, seed=1),
]
CONTIGUOUS = [Cached(block_size=None, splits=2, left_pad=5), Cached(blocks=5, block_size=None, seed=1)]
FEATURES: dict[str, dict[str, Any]] = {
    "decode": DECODE,
    "causal": UNEQUAL | {"right": 0},
    "window": UNEQUAL | {"left": 33, "right": 0},
    "sinks": UNEQUAL | {"left": 20, "right": 0, "sink_tokens": 40},
    "learned_sink": UNEQUAL | {"right": 0, "learned_sink": True},
    "softcap": UNEQUAL | {"softcap": 3.0, "right": 0},
    "everything": UNEQUAL | {"left": 30, "right": 2, "sink_tokens": 3, "learned_sink": True, "alibi": Alibi.HEADS, "softcap": 20.0},
    "padded": UNEQUAL | {"head_dim": 48, "v_head_dim": 16},
    "wide": DECODE | {"head_dim": 96, "v_head_dim": 192},
    "odd": UNEQUAL | {"layout": Layout.ODD},
    "negative": UNEQUAL | {"softmax_scale": -0.2},
}


@pytest.mark.parametrize(("types", "way", "number"), diagonals(TYPES, WAYS, 2), ids=str)
def test_types_over_pages(types: Fp8, way: Cached, number: int):
    units = UNITS[number // 2 % len(UNITS)]
    units = (HEAD, *units[1:]) if types.q else units
    dtype = (DType.BF16, DType.F16)[number // 2 % 2]
    check_fp8(Case(label="decode", dtype=dtype, **DECODE), Fp8(types.q, types.k, types.v, types.out, units), way)


PRODUCTS = [
    ({"head_dim": 32, "v_head_dim": 64}, Fp8(E4M3, E4M3, E4M3, units=(HEAD, HEAD, HEAD), products=True), WAYS[0]),
    ({"head_dim": 96, "v_head_dim": 32}, Fp8(E4M3, E5M2, E5M2, units=(BLOCK, TOKEN, TOKEN), products=True), WAYS[3]),
    ({"head_dim": 128, "v_head_dim": 128}, Fp8(E5M2, E4M3, E4M3, units=(HEAD, BLOCK, HEAD), products=True), WAYS[5]),
    ({"head_dim": 48, "v_head_dim": 48, "layout": Layout.ODD}, Fp8(E5M2, E5M2, E5M2, products=True), CONTIGUOUS[0]),
    ({"head_dim": 64, "v_head_dim": 64}, Fp8(E4M3, E5M2, E4M3, units=(HEAD, HEAD, BLOCK), products=True), replace(WAYS[4], plain=True)),
]


@pytest.mark.parametrize(("widths", "types", "way"), PRODUCTS, ids=str)
def test_products_of_8_bits(widths: dict[str, Any], types: Fp8, way: Cached):
    check_fp8(Case(label="products", dtype=DType.BF16, **UNEQUAL | {"right": 0} | widths), types, way)


@pytest.mark.parametrize(("q", "units"), [(None, UNITS[2]), (E4M3, UNITS[1]), (None, UNITS[3]), (E4M3, (None, HEAD, TOKEN))], ids=str)
def test_descales_may_be_zero_or_negative_and_far_apart(q: DType | None, units: tuple[ScaleUnit | None, ...]):
    case = Case(
        label="odd_descales", dtype=DType.BF16, **UNEQUAL | {"left": 330, "right": 0, "sink_tokens": 4, "lengths_k": (650, 20, 140)}
    )
    check_fp8(case, Fp8(q=q, units=((HEAD if q else None), *units[1:]), odd=True), Cached(splits=2, block_size=7))


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str):
    number = list(FEATURES).index(name)
    way = (WAYS + CONTIGUOUS)[number % 8]
    units = UNITS[number % (4 if way.block_size else 3)]
    types = Fp8(q=E4M3, units=(BLOCK, *units[1:])) if number % 2 else Fp8(units=units)
    check_fp8(Case(label=name, dtype=DType.BF16, **FEATURES[name]), types, way)
