"""Which tile a kernel gets: measured on an H100 (docs/performance.md); on other architectures it follows from memory and registers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..kernels.attention import AttentionSpec
from ..kernels.fa3_fwd import WARPGROUP_ROWS
from ..kernels.kvcache import INVARIANT_GROUPS
from ..kernels.spec import Family, Tile
from ..limits import HEAD_DIM_WIDTHS, PHILOX_KEYS, SCALED_TOKENS
from ..types import SmArch

__all__ = [
    "are_few_rows",
    "backward_tile_for",
    "cache_rows",
    "cache_tile_for",
    "fp8_cache_tile_for",
    "fp8_wgmma_tile_for",
    "has_row_for_short_q",
    "head_dim_width",
    "invariant_tile_for",
    "is_short_q",
    "row_of",
    "step_tile_for",
    "tile_for",
    "wgmma_cache_tile_for",
    "wgmma_tile_for",
]

# Architectures with at least 163 KB of shared memory per block.
_LARGE = {
    32: Tile(block_m=128, block_n=64, warps=4, min_blocks=2),
    64: Tile(block_m=128, block_n=64, warps=4, min_blocks=2),
    96: Tile(block_m=128, block_n=64, warps=4, min_blocks=2),
    128: Tile(block_m=128, block_n=64, warps=4, min_blocks=2),
    192: Tile(block_m=128, block_n=64, warps=8),
    256: Tile(block_m=128, block_n=64, warps=8),
}

# Architectures with 228 KB an SM: two blocks hide each other's loads, which one of 8 warps waits for (2 to 9 % faster, H100).
_LARGEST = _LARGE | {256: Tile(block_m=64, block_n=64, warps=4, min_blocks=2)}

# Architectures with 99 KB: two blocks of an SM share 100 KB.
_SMALL = _LARGE | {
    96: Tile(block_m=128, block_n=32, warps=4, min_blocks=2),
    128: Tile(block_m=128, block_n=32, warps=4, min_blocks=2),
    256: Tile(block_m=64, block_n=64, warps=4),
}

_TABLES = {
    SmArch.SM_80: _LARGE,
    SmArch.SM_86: _SMALL,
    SmArch.SM_89: _SMALL,
    SmArch.SM_90: _LARGEST,
    SmArch.SM_100: _LARGEST,
    SmArch.SM_120: _SMALL,
}

# 128 keys halve the reads of Q and the barriers (9 to 14 % faster, H100), where nothing takes registers beside scores and accumulators.
_PLAIN = {64: replace(_LARGE[64], block_n=128)}

_THREE_WARPGROUPS = 16  # warps of a block with three of them and the producer: 160 registers hold 64 keys beside the generator's
_DROPOUT_KEYS = 128  # keys of scores that the 240 registers of two warpgroups hold beside them
_DROPOUT_NARROWS = 96  # from this width on, the generator's registers spill beside 64 keys of scores (136 to 648 bytes) and fit beside 32


# The wgmma family, by (q/k width, v width); other pairs take the row of the wider one. 64 rows per consumer warpgroup, and 240, 160 or 112
# registers a thread with two, three or four of them; block_n is about the largest that does not spill, but at 256 x 256, where 64 are as
# fast as 80 or, causal, up to 3 % faster. Three and four hide each other's softmax, where two leave the tensor cores idle for a seventh of
# the time (docs/performance.md).
_WGMMA = {
    (32, 32): Tile(block_m=192, block_n=128, warps=16, stages=2, ping_pong=True),
    (64, 64): Tile(block_m=192, block_n=128, warps=16, stages=4, ping_pong=True),
    (96, 96): Tile(block_m=192, block_n=96, warps=16, stages=2, ping_pong=True),
    (128, 128): Tile(block_m=192, block_n=80, warps=16, stages=2, ping_pong=True),
    (192, 128): Tile(block_m=128, block_n=128, warps=12, stages=2, ping_pong=True),
    (64, 256): Tile(block_m=128, block_n=96, warps=12, stages=2, ping_pong=True),
    (192, 192): Tile(block_m=128, block_n=112, warps=12, stages=2, ping_pong=True),
    (256, 256): Tile(block_m=128, block_n=64, warps=12, stages=2, ping_pong=True),
}
# Up to so many rows of Q, multiples of 192 waste more than three warpgroups win, and the fixed cost of a tile counts more.
_SHORT_Q = {(64, 64): 2048, (128, 128): 1024}
_WGMMA_SHORT_Q = {
    (64, 64): Tile(block_m=256, block_n=64, warps=20, stages=4, ping_pong=True),
    (128, 128): Tile(block_m=128, block_n=128, warps=12, stages=3, ping_pong=True),
}
# Rows that fill one warpgroup of two, behind many keys: what counts is how evenly K and V are read (H200: 4 % over plain K and V, 6 to 7 %
# over pages, docs/performance.md).
_WGMMA_FEW_ROWS = {(128, 128): Tile(block_m=128, block_n=64, warps=12, stages=2)}
_WGMMA_CACHE_FEW_ROWS = {(128, 128): Tile(block_m=128, block_n=96, warps=12, stages=2, ping_pong=True)}
_MANY_KEYS = 1024
# Widths 32 and 64 with more than 160 registers hold beside 128 keys: the generator of dropout, or ALiBi and softcap together.
_WITH_DROPOUT = Tile(block_m=128, block_n=128, warps=12, stages=2, ping_pong=True)
_WITH_ALIBI_AND_SOFTCAP = Tile(block_m=256, block_n=64, warps=20, stages=4, ping_pong=True)
# The arithmetic of a cap hides best behind warps that take no turns: up to 3 % at widths 64 and 256, 4 to 6 % at 128 with fewer keys.
_WITH_SOFTCAP = {(128, 128): Tile(block_m=192, block_n=64, warps=16, stages=3)}
_SOFTCAP_KEYS = {192: 96, 256: 64}  # its registers would spill beside more


def head_dim_width(head_dim: int) -> int:
    """The tile width that holds a head dim of 8..256."""
    return next(width for width in HEAD_DIM_WIDTHS if width >= head_dim)


def is_short_q(head_dim: int, v_head_dim: int, rows: int) -> bool:
    """Whether sequences of up to ``rows`` rows take the tile for short q of :func:`wgmma_tile_for`, where these head dims have one."""
    return rows <= _SHORT_Q.get((head_dim_width(head_dim), head_dim_width(v_head_dim)), 0)


def are_few_rows(rows: int, keys: int) -> bool:
    """Whether the ``rows`` of a KV head, the queries of all its heads, fill one warpgroup at most, and its ``keys`` are many."""
    return 0 < rows <= WARPGROUP_ROWS and keys >= _MANY_KEYS


def has_row_for_short_q(spec: AttentionSpec) -> bool:
    """Whether the table of its family has a tile for short q at the widths of ``spec``."""
    widths = (spec.head_dim, spec.v_head_dim)
    return spec.family is Family.FA3 and widths in _WGMMA_SHORT_Q and not (spec.softcap and widths in _WITH_SOFTCAP)


def row_of(spec: AttentionSpec) -> str:
    """How the row of a kernel is named in the table of its family."""
    return f"({spec.head_dim}, {spec.v_head_dim})" if spec.family is Family.FA3 else str(max(spec.head_dim, spec.v_head_dim))


def wgmma_tile_for(
    head_dim: int,
    v_head_dim: int,
    *,
    dropout: bool = False,
    alibi: bool = False,
    softcap: bool = False,
    short_q: bool = False,
    few_rows: bool = False,
) -> Tile:
    """The tile of the wgmma family for two widths.

    Args:
        head_dim: width of q and k.
        v_head_dim: width of v.
        dropout: whether the Philox generator needs registers, and key tiles of whole calls of it.
        alibi: whether slopes need registers.
        softcap: whether a cap does.
        short_q: what :func:`is_short_q` says.
        few_rows: what :func:`are_few_rows` says.
    """
    widths, wider = (head_dim, v_head_dim), max(head_dim, v_head_dim)
    tile = _WGMMA.get(widths) or _WGMMA[wider, wider]
    if wider <= 64 and (dropout or (alibi and softcap)):
        return _WITH_DROPOUT if dropout else _WITH_ALIBI_AND_SOFTCAP
    if softcap and widths in _WITH_SOFTCAP:
        tile = _WITH_SOFTCAP[widths]
    elif few_rows and widths in _WGMMA_FEW_ROWS:
        tile = _WGMMA_FEW_ROWS[widths]
    elif short_q and widths in _WGMMA_SHORT_Q:
        tile = _WGMMA_SHORT_Q[widths]
    if dropout:
        keys = 64 if tile.warps == _THREE_WARPGROUPS else _DROPOUT_KEYS
        tile = replace(tile, block_n=min(tile.block_n, keys) // PHILOX_KEYS * PHILOX_KEYS)
    if softcap:
        tile = replace(tile, block_n=min(tile.block_n, _SOFTCAP_KEYS.get(wider, tile.block_n)), ping_pong=False)
    return tile


# fp8 of the wgmma family, by the wider width: keys as many as registers hold without spills in the main loop (H200, docs/performance.md).
# At 128 those beside which P V has registers of its own, 3 % faster than half as many again that share them.
_WGMMA_FP8 = {
    64: Tile(block_m=192, block_n=160, warps=16, stages=3, ping_pong=True),
    128: Tile(block_m=128, block_n=128, warps=12, stages=2, ping_pong=True),
    192: Tile(block_m=128, block_n=128, warps=12, stages=2, ping_pong=True),
    256: Tile(block_m=128, block_n=128, warps=12, stages=2, ping_pong=True),
}
_WGMMA_FP8_CROWDED_KEYS = {64: 96}  # with slopes or a softcap in registers
_WGMMA_FP8_SUM_KEYS = {128: 192, 256: 96}  # with columns of ones, which take registers and shared memory

# The same where wgmma adds P V to O.
_WGMMA_FP8_SINGLE_LEVEL_KEYS = {64: 160, 128: 192, 192: 128, 256: 128}
_WGMMA_FP8_SINGLE_LEVEL_CROWDED_KEYS = {64: 128, 128: 160, 192: 96, 256: 64}
_WGMMA_FP8_SINGLE_LEVEL_TAKES_TURNS = {192, 256}  # narrower ones are 1 to 2 % faster without, on average
_WGMMA_FP8_SINGLE_LEVEL_CACHE_KEYS = {192: 64, 256: 64}  # of which pages are whole parts


def fp8_wgmma_tile_for(
    head_dim: int, v_head_dim: int, *, crowded: bool = False, blocks: bool = False, single_level: bool = False, sums: bool = False
) -> Tile:
    """The tile of the wgmma family for two widths of fp8 (kernels/fa3_fp8.py).

    Args:
        head_dim: width of q and k.
        v_head_dim: width of v.
        crowded: whether ALiBi or softcap need registers.
        blocks: whether factors are those of blocks of tokens, or pages have to be whole parts of tiles.
        single_level: whether wgmma adds P V to O.
        sums: whether columns of ones behind those of V add up P.
    """
    wider = max(head_dim, v_head_dim)
    tile = _WGMMA_FP8[wider]
    with_sums = _WGMMA_FP8_SUM_KEYS if sums else {}
    if blocks:
        keys = _WGMMA_FP8_SINGLE_LEVEL_CACHE_KEYS.get(wider, SCALED_TOKENS) if single_level else SCALED_TOKENS
        keys = min(keys, with_sums.get(wider, keys))
    elif single_level:
        keys = (_WGMMA_FP8_SINGLE_LEVEL_CROWDED_KEYS if crowded else _WGMMA_FP8_SINGLE_LEVEL_KEYS)[wider]
    else:
        keys = (with_sums | (_WGMMA_FP8_CROWDED_KEYS if crowded else {})).get(wider, tile.block_n)
    return replace(tile, block_n=keys, ping_pong=not single_level or wider in _WGMMA_FP8_SINGLE_LEVEL_TAKES_TURNS)


# Over a KV cache, by v width: keys that have large common divisors with pages, so that TMA copies few boxes.
_WGMMA_CACHE_KEYS = {192: 96}
_WGMMA_CACHE_SOFTCAP_KEYS = {192: 64}  # 172 bytes of spills beside 96, with two bounds and partial results


def wgmma_cache_tile_for(
    head_dim: int, v_head_dim: int, *, alibi: bool = False, softcap: bool = False, short_q: bool = False, few_rows: bool = False
) -> Tile:
    """The tile of the wgmma family over a KV cache: that of plain arrays but for few rows. Arguments: :func:`wgmma_tile_for`."""
    if few_rows and not softcap and (head_dim, v_head_dim) in _WGMMA_CACHE_FEW_ROWS:
        return _WGMMA_CACHE_FEW_ROWS[head_dim, v_head_dim]
    tile = wgmma_tile_for(head_dim, v_head_dim, alibi=alibi, softcap=softcap, short_q=short_q)
    keys = _WGMMA_CACHE_SOFTCAP_KEYS if softcap else _WGMMA_CACHE_KEYS
    return replace(tile, block_n=min(tile.block_n, keys.get(v_head_dim, tile.block_n)))


def tile_for(arch: SmArch, head_dim: int, v_head_dim: int, *, dropout: bool = False, plain: bool = False) -> Tile:
    """The tile of the mma.sync family for two widths.

    Args:
        arch: whose shared memory holds it.
        head_dim: width of q and k.
        v_head_dim: width of v.
        dropout: whether the Philox generator needs registers, and key tiles of whole calls of it.
        plain: whether nothing needs registers beside the products and the softmax: no bound, bias, cap or dropout, no packed sequences,
            and rows that are as long as the width and aligned.
    """
    wider = max(head_dim, v_head_dim)
    tile = _PLAIN[wider] if plain and wider in _PLAIN else _TABLES[arch][wider]
    if dropout and wider >= _DROPOUT_NARROWS and tile.block_n > PHILOX_KEYS:
        return replace(tile, block_n=PHILOX_KEYS)
    return tile


# The backward, by the wider of both widths. Up to 64, where block_n is 32 keys a warp, P stays in registers; above, K, V, the stages of Q
# and dO, P and dS lie in shared memory, and dK and dV take block_n * width * 2 / threads registers. Measured on an H200; the rest by sizes.
_BACKWARD = {
    32: Tile(block_m=64, block_n=128, warps=4, stages=3, min_blocks=2),
    64: Tile(block_m=64, block_n=128, warps=4, stages=3),
    96: Tile(block_m=64, block_n=128, warps=8, stages=2),
    128: Tile(block_m=64, block_n=128, warps=8, stages=2),
    192: Tile(block_m=64, block_n=64, warps=8, stages=2),
    256: Tile(block_m=64, block_n=64, warps=8),
}
_BACKWARD_LARGEST = _BACKWARD | {
    64: Tile(block_m=64, block_n=128, warps=4, stages=3, min_blocks=2),
    256: Tile(block_m=64, block_n=64, warps=8, stages=2),
}
_BACKWARD_SMALL = _BACKWARD | {
    32: Tile(block_m=64, block_n=128, warps=4, stages=3),
    96: Tile(block_m=64, block_n=64, warps=8, stages=2),
    128: Tile(block_m=64, block_n=64, warps=8),
    192: Tile(block_m=64, block_n=32, warps=4),
    256: Tile(block_m=32, block_n=32, warps=4),
}
# With slopes of a softcap or the generator of dropout in registers.
_BACKWARD_CROWDED = {
    32: Tile(block_m=64, block_n=128, warps=8, stages=2),
    64: Tile(block_m=64, block_n=128, warps=8, stages=2),
    128: Tile(block_m=64, block_n=64, warps=8, stages=2),
}


def backward_tile_for(arch: SmArch, width: int, v_width: int, *, crowded: bool = False) -> Tile:
    """The tile of the backward kernel.

    Args:
        arch: whose shared memory holds it: 99, 163 or 227 KB.
        width: of q and k.
        v_width: of v.
        crowded: whether softcap or dropout need registers.
    """
    forward, wider = _TABLES[arch], max(width, v_width)
    table = _BACKWARD_SMALL if forward is _SMALL else _BACKWARD_LARGEST if forward is _LARGEST else _BACKWARD
    if crowded and wider in _BACKWARD_CROWDED and not (forward is _SMALL and wider > _NARROW):
        return _BACKWARD_CROWDED[wider]
    return table[wider]


_NARROW = 64  # up to this width, two stages of Q and dO of 64 rows fit beside 128 keys in 99 KB


_MOST_CACHE_ROWS = 128


def cache_rows(rows: int) -> int:
    """Rows of a tile of the kernel over a KV cache, for so many rows of a KV head: the queries of all its heads."""
    return next(size for size in (16, 32, 64, _MOST_CACHE_ROWS) if size >= min(rows, _MOST_CACHE_ROWS))


# What differs at width 128 with 227 KB a block, by rows (H200, over pages of 16): with 16, a third stage takes 5 % less at a batch of 128;
# with 32, twice the keys in 168 registers take 4 % less.
_CACHE_128_LARGEST: dict[int, dict[str, Any]] = {16: {"stages": 3}, 32: {"block_n": 32, "min_blocks": 3}}


def cache_tile_for(arch: SmArch, width: int, v_width: int, rows: int) -> Tile:
    """The tile of the kernel over a KV cache.

    ``rows``: what :func:`cache_rows` says. What the groups merge at the end bounds the rows of wide heads.
    """
    tile = step_tile_for(arch, width, v_width, rows)
    measured = max(width, v_width) == 128 and _TABLES[arch] is _LARGEST
    return replace(tile, **_CACHE_128_LARGEST.get(rows, {})) if measured else tile


def step_tile_for(arch: SmArch, width: int, v_width: int, rows: int) -> Tile:
    """That of the blocks of a StepPlan: groups of warps that share the keys, two stages of them in 99 KB. Arguments as there."""
    wider = max(width, v_width)
    block_m = rows if wider <= 128 else min(rows, 32)
    tile = Tile(block_m=block_m, block_n=32 if wider <= 96 else 16, warps=4 if block_m < 64 else 8, stages=2)
    return replace(tile, stages=1) if _TABLES[arch] is _SMALL and wider > 128 and block_m == 16 else tile


def fp8_cache_tile_for(arch: SmArch, width: int, v_width: int, rows: int) -> Tile:
    """The tile over fp8 K and V: that of 16 bits with as many bytes a stage, so with up to twice the keys. Not measured."""
    return replace(step_tile_for(arch, width, v_width, rows), block_n=32)


# Rows of a batch-invariant tile, by the wider head dim: what the merge of four groups leaves room for in 99 KB, and in 163 KB or more.
_INVARIANT_ROWS = {32: (64, 64), 64: (64, 64), 96: (32, 64), 128: (32, 64), 192: (16, 32), 256: (16, 32)}


def invariant_tile_for(arch: SmArch, width: int, v_width: int, rows: int) -> Tile:
    """The tile of a batch-invariant call. Not measured.

    The bits of a row depend on the keys of a tile and on the number of groups that share them, which are one for each width; on the rows of
    a tile and on stages they do not. ``rows``: what :func:`cache_rows` says.
    """
    wider, small = max(width, v_width), _TABLES[arch] is _SMALL
    block_m = min(rows, _INVARIANT_ROWS[wider][0 if small else 1])
    return Tile(
        block_m=block_m,
        block_n=32 if wider <= 96 else 16,
        warps=INVARIANT_GROUPS * block_m // 16,
        stages=1 if small and wider in {96, 192, 256} else 2,
    )
