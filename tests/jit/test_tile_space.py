from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup
from atomr_accel_flashattn.errors import DispatchError
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec
from atomr_accel_flashattn.kernels.fa2_fwd import Fa2ForwardSpec
from atomr_accel_flashattn.kernels.fa3_fp8 import Fa3Fp8ForwardSpec
from atomr_accel_flashattn.kernels.fa3_fwd import Fa3ForwardSpec
from atomr_accel_flashattn.kernels.forward import ForwardSpec
from atomr_accel_flashattn.kernels.spec import Family, Tile
from atomr_accel_flashattn.limits import HEAD_DIM_WIDTHS
from atomr_accel_flashattn.tiles.space import SCHEDULES, misfit, tiles_that_fit
from atomr_accel_flashattn.types import DType, ScaleUnit, SmArch

FA2_TILE = Tile(block_m=128, block_n=64, warps=4, min_blocks=2)
BWD_TILE = Tile(block_m=64, block_n=64, warps=4)
FA3_TILE = Tile(block_m=128, block_n=128, warps=12, stages=2)


def spec_of(arch: SmArch = SmArch.SM_90, head_dim: int = 128, **extras: Any) -> ForwardSpec:
    spec = lookup(DispatchKey(arch, DType.BF16, head_dim, extras=Extras(**extras)))
    assert isinstance(spec, ForwardSpec)
    return spec


def backward_spec(arch: SmArch = SmArch.SM_90, head_dim: int = 128, **extras: Any) -> Fa2BackwardSpec:
    spec = lookup(DispatchKey(arch, DType.BF16, head_dim, extras=Extras(direction="bwd", **extras)))
    assert isinstance(spec, Fa2BackwardSpec)
    return spec


def fa3_spec(head_dim: int = 128, **extras: Any) -> ForwardSpec:
    return spec_of(SmArch.SM_90A, head_dim, family=Family.FA3, **extras)


def fp8_spec(dtype: DType = DType.F8E4M3, head_dim: int = 128, **extras: Any) -> ForwardSpec:
    spec = lookup(DispatchKey(SmArch.SM_90A, dtype, head_dim, extras=Extras(**extras)))
    assert isinstance(spec, Fa3Fp8ForwardSpec)
    return spec


def test_every_field_of_a_tile_is_searched_in_some_family() -> None:
    searched = {name for kind in (Fa2ForwardSpec, Fa3ForwardSpec) for name in kind.AXES}
    assert searched == {field.name for field in fields(Tile)}
    assert set(SCHEDULES) < searched


@pytest.mark.parametrize("head_dim", HEAD_DIM_WIDTHS)
@pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_86, SmArch.SM_90, SmArch.SM_120], ids=lambda arch: arch.value)
def test_the_tables_of_the_mma_sync_family_are_among_the_candidates(arch: SmArch, head_dim: int) -> None:
    spec = spec_of(arch, head_dim, family=Family.FA2)
    assert spec.tile in set(tiles_that_fit(spec))


@pytest.mark.parametrize("head_dim", HEAD_DIM_WIDTHS)
@pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_86, SmArch.SM_90, SmArch.SM_120], ids=lambda arch: arch.value)
def test_the_tables_of_the_backward_are_among_the_candidates(arch: SmArch, head_dim: int) -> None:
    for v_head_dim in (32, head_dim):
        spec = backward_spec(arch, head_dim, v_head_dim=v_head_dim)
        candidates = list(tiles_that_fit(spec))
        assert spec.tile in candidates
        assert all(misfit(replace(spec, tile=tile)) == "" for tile in candidates)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIM_WIDTHS)
def test_the_table_of_the_wgmma_family_is_among_the_candidates(head_dim: int, dropout: bool) -> None:
    spec = fa3_spec(head_dim, dropout=dropout)
    candidates = set(tiles_that_fit(spec))
    assert spec.tile in candidates
    assert all(tile.block_n % 32 == 0 for tile in candidates if dropout)


@pytest.mark.parametrize("dtype", [DType.F8E4M3, DType.F8E5M2], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_the_table_of_fp8_is_among_the_candidates(head_dim: int, dtype: DType) -> None:
    spec = fp8_spec(dtype, head_dim)
    assert spec.tile in set(tiles_that_fit(spec))


def test_candidates_are_valid_kernels_that_fit_the_multiprocessor() -> None:
    for spec in (spec_of(), fa3_spec(64)):
        for tile in tiles_that_fit(spec):
            candidate = replace(spec, tile=tile)
            assert misfit(candidate) == ""
            assert candidate.shared_memory * tile.min_blocks <= spec.arch.shared_memory_per_sm


@pytest.mark.parametrize(
    ("spec", "tile", "reason"),
    [
        (spec_of(), replace(FA2_TILE, block_m=96), "block_m: got 96; allowed with 4 warps are multiples of 64"),
        (spec_of(), replace(FA2_TILE, block_n=40), "block_n: got 40; allowed are multiples of 16"),
        (spec_of(), replace(FA2_TILE, ping_pong=True), "fa2_fwd reads no ping_pong"),
        (spec_of(), replace(FA2_TILE, warps=0), "sizes are integers of at least 1"),
        (spec_of(), replace(FA2_TILE, stages=9), "it needs 327680 bytes of shared memory; allowed are 232448 on sm_90"),
        (spec_of(dropout=True), replace(FA2_TILE, block_n=48), "allowed are multiples of 32 with dropout"),
        (fa3_spec(), replace(FA3_TILE, warps=10), "warps: got 10; allowed are 8, 12, 16 and 20"),
        (fa3_spec(), replace(FA3_TILE, block_m=64), "block_m: got 64; allowed with 12 warps is 128"),
        (fa3_spec(64), replace(FA3_TILE, block_n=16, stages=12), "stages: got 12; allowed are at most 11"),
        (fa3_spec(64), replace(FA3_TILE, block_n=272), "block_n: got 272; allowed is at most 256"),
        (fa3_spec(), replace(FA3_TILE, min_blocks=2), "fa3_fwd reads no min_blocks"),
        (fa3_spec(), replace(FA3_TILE, block_m=64, warps=8, ping_pong=True), "ping_pong: allowed with two to four consumer warpgroups"),
        (fp8_spec(), replace(FA3_TILE, block_n=80), "block_n: got 80; allowed are multiples of 32"),
        (fp8_spec(DType.F8E5M2), replace(FA3_TILE, block_n=32), "block_n: got 32; allowed with v of e5m2 are 64 and more"),
        (fp8_spec(DType.F8E5M2, 256), FA3_TILE, "it needs 232960 bytes of shared memory; allowed are 232448"),
        (fp8_spec(k_descale=ScaleUnit.BLOCK), replace(FA3_TILE, block_n=96), "allowed with factors of blocks are divisors of 128"),
    ],
)
def test_a_tile_that_cannot_be_is_refused_with_a_reason(spec: ForwardSpec, tile: Tile, reason: str) -> None:
    assert reason in misfit(replace(spec, tile=tile))
    unit = ScaleUnit.BLOCK if isinstance(spec, Fa3Fp8ForwardSpec) and spec.block_descales else None
    extras = Extras(family=spec.family, dropout=spec.dropout, tile=tile, k_descale=unit)
    with pytest.raises(DispatchError, match=r"^tile: got m"):
        lookup(DispatchKey(spec.arch, spec.dtype, spec.head_dim, extras=extras))


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (replace(BWD_TILE, warps=3), "warps: got 3; allowed are those that share 64 x 64 numbers evenly, in blocks of 16 x 16"),
        (replace(BWD_TILE, block_m=16, warps=8), "warps: got 8; allowed are those that share 16 x 64 numbers evenly"),
        (replace(BWD_TILE, block_m=40), "share 40 x 64 numbers evenly"),
        (replace(BWD_TILE, block_n=24), "block_n: got 24; allowed are multiples of 16"),
        (replace(BWD_TILE, persistent=True), "fa2_bwd reads no persistent"),
        (replace(BWD_TILE, stages=4), "stages: got 4; allowed are 1, 2 and 3"),
        (replace(BWD_TILE, block_m=512), "block_m: got 512; allowed are at most 128, the threads of a block"),
        (replace(BWD_TILE, block_m=128, block_n=256), "bytes of shared memory; allowed are"),
    ],
)
def test_a_tile_that_a_backward_cannot_have_is_refused_with_a_reason(tile: Tile, reason: str) -> None:
    assert reason in misfit(replace(backward_spec(), tile=tile))
    with pytest.raises(DispatchError, match=r"^tile: got m"):
        backward_spec(tile=tile)


def test_a_key_may_name_the_tile_of_a_backward() -> None:
    assert backward_spec(tile=BWD_TILE).tile == BWD_TILE
    # What blocks do next is no question to it, and short q has no tile of its own.
    assert backward_spec(tile=BWD_TILE, persistent=True, short_q=True).tile == BWD_TILE
    assert [step.tile == BWD_TILE for step in backward_spec(tile=BWD_TILE).steps()] == [False, True, False]


def test_a_key_may_name_its_tile() -> None:
    assert spec_of(tile=replace(FA2_TILE, block_n=32)).tile == replace(FA2_TILE, block_n=32)
    assert spec_of(tile=FA2_TILE, persistent=True).tile.persistent
    for wrong in ({"tile": "m128n64w4s1b2"}, {"tile": FA2_TILE, "tiles_for": SmArch.SM_80}):
        with pytest.raises(DispatchError, match=r"tile: got .*allowed is None, or a Tile without tiles_for"):
            Extras(**wrong)
