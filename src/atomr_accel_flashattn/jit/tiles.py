"""Which tile a kernel gets: tables that follow from shared memory, registers and spills. To be measured: docs/performance.md."""

from __future__ import annotations

from dataclasses import replace

from ..types import SmArch
from .spec import Tile

__all__ = ["HEAD_DIM_WIDTHS", "head_dim_width", "tile_for", "wgmma_tile_for"]

HEAD_DIM_WIDTHS = (32, 64, 96, 128, 192, 256)

# Architectures with at least 163 KB of shared memory per block.
_LARGE = {
    32: Tile(block_m=128, block_n=64, warps=4, min_blocks=2),
    64: Tile(block_m=128, block_n=64, warps=4, min_blocks=2),
    96: Tile(block_m=128, block_n=64, warps=4, min_blocks=2),
    128: Tile(block_m=128, block_n=64, warps=4, min_blocks=2),
    192: Tile(block_m=128, block_n=64, warps=8),
    256: Tile(block_m=128, block_n=64, warps=8),
}

# Architectures with 99 KB: two blocks of a multiprocessor share 100 KB.
_SMALL = _LARGE | {
    96: Tile(block_m=128, block_n=32, warps=4, min_blocks=2),
    128: Tile(block_m=128, block_n=32, warps=4, min_blocks=2),
    256: Tile(block_m=64, block_n=64, warps=4),
}

_TABLES = {
    SmArch.SM_80: _LARGE,
    SmArch.SM_86: _SMALL,
    SmArch.SM_89: _SMALL,
    SmArch.SM_90: _LARGE,
    SmArch.SM_100: _LARGE,
    SmArch.SM_120: _SMALL,
}

_PHILOX_KEYS = 32  # one Philox call covers 32 keys, so no tile with dropout is narrower
_DROPOUT_KEYS = 128  # keys of scores that 240 registers hold beside the generator's, at d 96
_THREE_WARPGROUPS = 16  # warps of a block with three of them and the loading one
_DROPOUT_NARROWS = 96  # from this width on, the generator's registers spill beside 64 keys of scores (136 to 648 bytes) and fit beside 32


# The wgmma family, by (q/k width, v width); other pairs take the row of the wider one. 64 rows per consumer warpgroup: 240 registers a
# thread with two of them, 160 with three. block_n is the largest that neither spills nor exceeds 227 KB with two stages.
_WGMMA = {
    (32, 32): Tile(block_m=192, block_n=128, warps=16, stages=2),
    (64, 64): Tile(block_m=192, block_n=128, warps=16, stages=2),
    (96, 96): Tile(block_m=128, block_n=160, warps=12, stages=2),
    (128, 128): Tile(block_m=128, block_n=128, warps=12, stages=2),
    (192, 128): Tile(block_m=128, block_n=128, warps=12, stages=2),
    (64, 256): Tile(block_m=128, block_n=96, warps=12, stages=2),
    (192, 192): Tile(block_m=128, block_n=112, warps=12, stages=2),
    (256, 256): Tile(block_m=128, block_n=80, warps=12, stages=2),
}
_TWO_WARPGROUPS = Tile(block_m=128, block_n=128, warps=12, stages=2)  # for (32, 32) and (64, 64), where three of them would spill


def head_dim_width(head_dim: int) -> int:
    """The tile width that holds a head dim of 8..256."""
    return next(width for width in HEAD_DIM_WIDTHS if width >= head_dim)


def wgmma_tile_for(head_dim: int, v_head_dim: int, *, dropout: bool, alibi_and_softcap: bool, persistent: bool) -> Tile:
    """The tile of the wgmma family for two widths.

    Args:
        head_dim: width of q and k.
        v_head_dim: width of v.
        dropout: whether the Philox generator needs registers, and key tiles of whole calls of it.
        alibi_and_softcap: whether both meet, the one pair of features that 160 registers do not hold beside 128 keys.
        persistent: whether blocks take tile after tile.
    """
    wider = max(head_dim, v_head_dim)
    tile = _WGMMA.get((head_dim, v_head_dim)) or _WGMMA[wider, wider]
    if (dropout or alibi_and_softcap) and tile.warps == _THREE_WARPGROUPS:
        tile = _TWO_WARPGROUPS
    if dropout:
        tile = replace(tile, block_n=min(tile.block_n, _DROPOUT_KEYS) // _PHILOX_KEYS * _PHILOX_KEYS)
    return replace(tile, persistent=persistent)


def tile_for(arch: SmArch, head_dim: int, v_head_dim: int, *, dropout: bool) -> Tile:
    """The tile of the mma.sync family for widths ``head_dim`` and ``v_head_dim``."""
    width = max(head_dim, v_head_dim)
    tile = _TABLES[arch][width]
    if dropout and width >= _DROPOUT_NARROWS and tile.block_n > _PHILOX_KEYS:
        return replace(tile, block_n=_PHILOX_KEYS)
    return tile
