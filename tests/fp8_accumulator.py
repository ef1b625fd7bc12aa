"""Sums of products as 8-bit wgmma makes them on Hopper, for tests that predict or bound what it loses.

PTX leaves the precision open. A step takes 32 products (instruction shape K): they and the accumulator are aligned to the largest of
them, of which 13 bits after the leading one are kept, and the rest of every addend is dropped, as is what the sum has beyond 14 bits.
DeepSeek-V3 (arXiv 2412.19437, section 3.5.2) says as much of the H800; of an H200 this gave two LSE of rising scores, wrong by 0.049 and
0.073, to the last bit of a float32 (62.58821 and 101.23820), which neither 12 or 14 bits did nor steps of 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["FRACTION", "STEP", "accumulated", "sums_of_tiles"]

STEP = 32  # products
FRACTION = 13  # bits of an addend after the leading one of the largest
_ROWS = 64  # at once: (rows, n, 32) products


def accumulated(a: Array, b: Array, total: Array | None = None) -> Array:
    """``total + a @ b.T`` for fp8 values a (m, k) and b (n, k) in any float type: (m, n) in float32."""
    result = np.zeros((len(a), len(b)), np.float32) if total is None else total.astype(np.float32)
    for begin in range(0, len(a), _ROWS):
        rows = slice(begin, begin + _ROWS)
        for step in range(0, a.shape[-1], STEP):
            left, right = (x[:, step : step + STEP].astype(np.float32) for x in (a[rows], b))
            result[rows] = _step(left[:, None] * right, result[rows])
    return result


def _step(products: Array, total: Array) -> Array:
    """Of products (m, n, 32) and an accumulator (m, n). Exact: 33 addends of 14 bits have 24 at most."""
    unit = _unit(np.maximum(np.abs(products).max(axis=-1), np.abs(total)))
    units = np.trunc(products / unit[..., None]).sum(axis=-1) + np.trunc(total / unit)
    made = units * unit
    drop = _unit(made)
    return np.trunc(made / drop) * drop


def _unit(largest: Array) -> Array:
    """The last bit that is kept beside this number."""
    return np.ldexp(np.float32(1), np.frexp(largest)[1] - 1 - FRACTION)


def sums_of_tiles(v: Array, block_n: int, flush_tiles: int = 0) -> Array:
    """What a kernel makes of the rows of v (keys, d) with equal scores: the sum of 2^8 v over the keys, in float32.

    Tiles of ``block_n`` keys come from the last to the first; every ``flush_tiles`` of them the accumulator is added to a float32 total
    and starts from 0 (0: never).
    """
    result, total = np.zeros((1, v.shape[1]), np.float32), None
    for index, start in enumerate(reversed(range(0, len(v), block_n)), 1):
        tile = v[start : start + block_n]
        total = accumulated(np.full((1, len(tile)), 2.0**8), tile.T, total)
        if flush_tiles and index % flush_tiles == 0:
            result, total = result + total, None
    return (result if total is None else result + total)[0]
