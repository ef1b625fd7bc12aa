"""The wgmma family over fp8 tensors on the emulator: 8-bit products, V transposed by producer warps, factors, O in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.types import DType
from tests.cases import Case, Values
from tests.check import Run
from tests.fp8 import check_fp8, lost_lse
from tests.fp8_accumulator import sums_of_tiles
from tests.fp8_cases import BLOCK_TYPES, E4M3_TYPES, FP8_FEATURES, FP8_KINDS, Fp8Types, fp8_call
from tests.oracle import LSE_TOLERANCE, oracle

from .build import compiler
from .running_fp8 import emulate_fp8

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

TWO = Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True, persistent=True)
E5M2_TYPES = Fp8Types(q=DType.F8E5M2, k=DType.F8E5M2, v=DType.F8E5M2)
TILES = (
    TWO,
    Tile(block_m=64, block_n=96, warps=8, stages=3),
    Tile(block_m=192, block_n=128, warps=16, stages=2, ping_pong=True, persistent=True),
    Tile(block_m=128, block_n=160, warps=12, stages=2, persistent=True),
    Tile(block_m=64, block_n=64, warps=8, stages=1),
)
SINGLE_LEVEL = {
    64: Tile(block_m=192, block_n=160, warps=16, stages=3, persistent=True),
    128: Tile(block_m=128, block_n=192, warps=12, stages=2, persistent=True),
    256: Tile(block_m=128, block_n=128, warps=12, stages=2, ping_pong=True, persistent=True),
}
ONE_STEP = Tile(block_m=64, block_n=32, warps=8, stages=1)


def check(case: Case, types: Fp8Types = E4M3_TYPES, **options: Any) -> Run:
    """A run on the emulator, compared with the oracle."""
    call = fp8_call(case, types)
    run = emulate_fp8(call, types.out, **options)
    check_fp8(f"{case} {types}", call, run, types.out, wgmma=True)
    return run


@pytest.mark.parametrize("name", FP8_FEATURES)
def test_feature(name: str):
    index = list(FP8_FEATURES).index(name)
    check(Case(label=name.replace(" ", "_"), **FP8_FEATURES[name]), FP8_KINDS[index % len(FP8_KINDS)], tile=TILES[index % 3])


@pytest.mark.parametrize("tile", [TILES[0], TILES[2], ONE_STEP], ids=str)
@pytest.mark.parametrize("name", ["full", "window", "everything", "ratio", "padded"])
def test_blocks_of_tokens_have_factors_of_their_own(name: str, tile: Tile):
    check(Case(label=name, **FP8_FEATURES[name]), BLOCK_TYPES, tile=tile)


@pytest.mark.parametrize("width", [64, 256])
def test_factors_of_blocks_with_the_tile_of_a_width_over_many_tiles(width: int):
    check(Case(seqlen_q=300, seqlen_k=2500, heads=2, heads_kv=1, head_dim=width, v_head_dim=width, right=0), BLOCK_TYPES)


def test_a_factor_of_zero_hides_a_block_and_one_of_k_makes_its_scores_equal():
    case = Case(seqlen_q=70, seqlen_k=500, heads=2, heads_kv=2)
    call = fp8_call(case, BLOCK_TYPES)
    for name, zero in (("k", 1), ("v", 2)):
        call.descales[f"{name}_descale"][:, :, zero] = 0
        getattr(call.meant, name)[:, 128 * zero : 128 * (zero + 1)] = 0
    check_fp8(str(case), call, emulate_fp8(call, BLOCK_TYPES.out), BLOCK_TYPES.out, wgmma=True)


@pytest.mark.parametrize("name", ["causal", "alibi", "everything"])
@pytest.mark.parametrize("factor", [0.0, -0.0, 1e-42])
def test_a_factor_of_zero_by_head_makes_scores_equal(name: str, factor: float):
    call = fp8_call(Case(label=name, **FP8_FEATURES[name]), E4M3_TYPES)
    call.descales["k_descale"][...] *= np.float32(factor)
    call.meant.k[...] *= factor
    check_fp8(f"{name} {factor}", call, emulate_fp8(call, E4M3_TYPES.out), E4M3_TYPES.out, wgmma=True)


@pytest.mark.parametrize("name", ["full", "softcap", "negative"])
def test_a_negative_factor_by_head_is_right_or_nan(name: str):
    """Raw scores are compared where nothing brings them to log2 units first: the largest would be the smallest."""
    call = fp8_call(Case(label=name, **FP8_FEATURES[name]), E4M3_TYPES)
    call.descales["q_descale"][...] *= -1
    call.meant.q[...] *= -1
    run = emulate_fp8(call, E4M3_TYPES.out)
    if name == "full":
        assert run.lse is not None
        assert np.isnan(run.out.astype(np.float32)).all()
        assert np.isnan(run.lse).all()
    else:
        check_fp8(name, call, run, E4M3_TYPES.out, wgmma=True)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_tile_is_right_and_its_bits_do_not_depend_on_the_order_of_threads_and_copies(tile: Tile):
    case = Case(lengths_q=(40, 150), lengths_k=(333, 170), heads=4, heads_kv=2, left=200, right=0, sink_tokens=3)
    runs = [check(case, Fp8Types(v=DType.F8E5M2), tile=tile, seed=seed) for seed in range(4)]
    for other in runs[1:]:
        assert other.out.tobytes() == runs[0].out.tobytes()


@pytest.mark.parametrize("types", [E4M3_TYPES, E5M2_TYPES], ids=str)
@pytest.mark.parametrize("width", [16, 64, 96, 128, 192, 256])
def test_head_dim_with_its_own_tile(width: int, types: Fp8Types):
    check(Case(seqlen_q=70, seqlen_k=450, heads=2, heads_kv=1, head_dim=width, v_head_dim=width, right=0), types)


@pytest.mark.parametrize("name", ["full", "sinks", "softcap", "ratio"])
@pytest.mark.parametrize("width", [16, 128, 192, 256])
def test_an_average_of_ones_in_e5m2_is_one(name: str, width: int):
    """O is divided by the sum of P as it was rounded, from columns of ones behind those of V."""
    call = fp8_call(Case(label=name, **FP8_FEATURES[name] | {"head_dim": width, "v_head_dim": width}), replace(E5M2_TYPES, unit=None))
    call.v[...] = 1
    np.testing.assert_allclose(emulate_fp8(call, DType.F32).out, 1, atol=1e-6)


def test_a_learned_sink_takes_of_an_average_of_ones_what_it_takes_of_the_exact_one():
    call = fp8_call(Case(label="sink", **FP8_FEATURES["learned_sink"]), replace(E5M2_TYPES, unit=None))
    call.v[...], call.meant.v[...] = 1, 1
    np.testing.assert_allclose(emulate_fp8(call, DType.F32).out, oracle(call.meant).out, atol=2e-3)


def test_a_total_in_float32_keeps_what_an_accumulator_of_14_bits_loses():
    call = fp8_call(Case(seqlen_q=64, seqlen_k=9000, heads=1, heads_kv=1), Fp8Types(unit=None))
    call.q[...] = 0
    call.v[...] = 1 + np.random.default_rng(0).integers(-3, 4, call.v.shape) / 8
    mean = call.v.astype(np.float64).mean(axis=1)
    out = {single: emulate_fp8(call, DType.F32, single_level=single, tile=TWO).out for single in (False, True)}
    error = {single: np.abs(each / mean[:, None] - 1).max() for single, each in out.items()}
    assert error[False] < 2e-3
    assert error[True] > 0.05
    for single, tiles in ((True, 0), (False, 1)):
        model = sums_of_tiles(call.v[0, :, 0].astype(np.float64), TWO.block_n, tiles) / (2.0**8 * 9000)
        np.testing.assert_allclose(out[single][0, 0, 0], model, rtol=1e-6)


def test_truncated_products_of_q_and_k_cost_rising_scores_what_the_model_says():
    case = Case(seqlen_q=64, seqlen_k=300, heads=1, heads_kv=1, head_dim=256, v_head_dim=256, values=Values.RISING)
    call = fp8_call(case, E4M3_TYPES)
    lse, exact = emulate_fp8(call, E4M3_TYPES.out).lse, oracle(call.meant).lse
    assert lse is not None
    lost = np.abs(lse - exact).max()
    assert lost > 10 * LSE_TOLERANCE
    assert lost_lse(call.meant, call.q, call.k, lse, exact) == pytest.approx(lost, abs=1e-4)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_o_in_the_accumulator(width: int):
    case = Case(seqlen_q=70, seqlen_k=450, heads=2, heads_kv=1, head_dim=width, v_head_dim=width, right=0)
    tile = Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True, persistent=True)
    check(case, tile=tile, single_level=True)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_scores_all_below_or_above_zero(shift: float):
    call = fp8_call(Case(seqlen_q=100, seqlen_k=500, heads=2, heads_kv=2, right=0), Fp8Types(unit=None))
    for x, sign in ((call.q, 1.0), (call.k, np.sign(shift))):
        x[...] = (np.abs(x.astype(np.float32)) * sign).astype(x.dtype)
    call.meant.q[...], call.meant.k[...] = call.q.astype(call.meant.q.dtype), call.k.astype(call.meant.k.dtype)
    check_fp8("signs", call, emulate_fp8(call, DType.F32), DType.F32, wgmma=True)


@pytest.mark.parametrize("single_level", [False, True])
def test_huge_scores(single_level: bool):
    """Beyond 2048 in log2 units exponents are differences to the reference: of all rows, or of one row of a warp beside ordinary ones."""
    types = replace(E5M2_TYPES, unit=None)
    same = fp8_call(Case(seqlen_q=70, seqlen_k=333, heads=2, heads_kv=1), types)
    same.q[...], same.k[...], same.v[...] = 49152, 49152, 1
    np.testing.assert_array_equal(emulate_fp8(same, DType.F32, tile=TWO, single_level=single_level).out, 1)
    mixed = fp8_call(Case(lengths_q=(40, 100), lengths_k=(150, 301), heads=4, heads_kv=2), types)
    mixed.q[3], mixed.k[::5], mixed.v[...] = 49152, 49152, 1
    for x in "qkv":
        getattr(mixed.meant, x)[...] = getattr(mixed, x).astype(getattr(mixed.meant, x).dtype)
    run = emulate_fp8(mixed, DType.F32, tile=TWO, single_level=single_level)
    np.testing.assert_allclose(run.out, oracle(mixed.meant).out, atol=0.03 if single_level else 1e-5)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("name", ["full", "window", "everything"])
def test_a_single_level_with_its_own_tile(name: str, width: int):
    """Without turns up to 128 columns; 128 keys and a lean producer with 256."""
    check(Case(label=name, **FP8_FEATURES[name] | {"head_dim": width, "v_head_dim": width}), single_level=True, tile=SINGLE_LEVEL[width])
