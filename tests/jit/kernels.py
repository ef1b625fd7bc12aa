"""Kernels that the tests of the compiler and the launcher use: real specs, the quickest to compile."""

from __future__ import annotations

from dataclasses import replace

from atomr_accel_flashattn.kernels.spec import Direction, Family, KernelSpec, Tile
from atomr_accel_flashattn.types import DType, SmArch

MASK = KernelSpec(
    family=Family.FA2,
    direction=Direction.DROPOUT_MASK,
    arch=SmArch.SM_80,
    dtype=DType.F16,
    head_dim=64,
    v_head_dim=64,
    tile=Tile(block_m=64, block_n=32, warps=4),
)
FORWARD = replace(MASK, direction=Direction.FORWARD, tile=Tile(block_m=64, block_n=64, warps=4))
WGMMA = replace(FORWARD, family=Family.FA3, arch=SmArch.SM_90A, tile=Tile(block_m=64, block_n=32, warps=8, stages=2, persistent=True))
