"""The dropout pattern on the CPU: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in NumPy.

Which counter and which byte belong to an element is fixed in docs/semantics.md, Dropout. The pattern is bit for bit that of the GPU
kernels. One generator call covers 16 elements, as it does there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["keep_mask", "key_words", "philox4x32"]

_LOW = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32(c0: NDArray[Any], c1: NDArray[Any], c2: NDArray[Any], c3: NDArray[Any], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 of every counter under one key.

    ``c0..c3`` are uint32 arrays that broadcast together; the result has their common shape plus a last axis of 4 output words.
    """
    words: list[NDArray[Any]] = [word.astype(np.uint64) for word in (c0, c1, c2, c3)]
    x0, x1, x2, x3 = words
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
        x0 = (product_1 >> 32) ^ x1 ^ k0
        x2 = (product_0 >> 32) ^ x3 ^ k1
        x1, x3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return np.stack(np.broadcast_arrays(x0, x1, x2, x3), axis=-1).astype(np.uint32)


def key_words(seed: int, offset: int) -> tuple[int, int]:
    """The two key words of the signed 64-bit (seed, offset); the low half of ``offset`` is counter word 3 instead."""
    return seed & _LOW, ((seed >> 32) ^ (offset >> 32)) & _LOW


def keep_mask(seed: int, offset: int, *, streams: Sequence[int], rows: range, cols: range, threshold: int) -> NDArray[np.bool_]:
    """Which elements are kept: bool (len(streams), len(rows), len(cols)).

    ``streams`` are values of ``b * Hq + h``, ``rows`` and ``cols`` contiguous ranges of i and j inside the sequence, ``threshold`` is T.
    """
    first_row, first_col = rows.start // 16, cols.start // 32
    row_groups = np.arange(first_row, -(-rows.stop // 16), dtype=np.uint32)
    col_groups = np.arange(first_col, -(-cols.stop // 32), dtype=np.uint32)
    c0 = (row_groups[:, None] * np.uint32(8) + np.arange(8, dtype=np.uint32)).reshape(1, -1, 1)
    c1 = (col_groups[:, None] * np.uint32(4) + np.arange(4, dtype=np.uint32)).reshape(1, 1, -1)
    c2 = np.array([stream & _LOW for stream in streams], dtype=np.uint32).reshape(-1, 1, 1)
    c3 = np.full((1, 1, 1), offset & _LOW, dtype=np.uint32)
    words = philox4x32(c0, c1, c2, c3, key_words(seed, offset))
    if sys.byteorder == "big":
        words = words.byteswap()
    kept = words.view(np.uint8) < threshold
    # Axes: stream, i >> 4, i & 7, j >> 5, (j & 7) >> 1, then the byte index as (i >> 3) & 1, (j >> 3) & 3, j & 1.
    kept = kept.reshape(len(streams), len(row_groups), 8, len(col_groups), 4, 2, 4, 2).transpose(0, 1, 5, 2, 3, 6, 4, 7)
    kept = kept.reshape(len(streams), 16 * len(row_groups), 32 * len(col_groups))
    row, col = rows.start - 16 * first_row, cols.start - 32 * first_col
    return kept[:, row : row + len(rows), col : col + len(cols)]
