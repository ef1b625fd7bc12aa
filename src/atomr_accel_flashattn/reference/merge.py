"""Two states of attention over different keys made one, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["merge"]


def merge(states: tuple[tuple[Array, Array], tuple[Array, Array]], out: Array, lse: Array) -> None:
    """Write the state of both. Outputs are (..., rows, heads, Dv), LSEs float32 (..., heads, rows); in float32, or in o's type if wider.

    A state without keys, LSE -inf, changes no bit of the other; two of them make (0, -inf). What is written may lie where a state does.
    """
    compute = np.promote_types(np.float32, out.dtype) if out.dtype == np.float64 else np.dtype(np.float32)
    (o1, lse1), (o2, lse2) = states
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        l1, l2 = lse1.astype(compute), lse2.astype(compute)
        top = np.maximum(l1, l2)
        shift = np.where(np.isneginf(top), 0, top)
        w1, w2 = np.exp(l1 - shift), np.exp(l2 - shift)
        total = w1 + w2
        first, second = (np.swapaxes(each / np.where(total == 0, 1, total), -1, -2)[..., None] for each in (w1, w2))
        both = (o1.astype(compute) * first + o2.astype(compute) * second).astype(out.dtype)
        alone1, alone2 = (np.swapaxes(np.isneginf(each), -1, -2)[..., None] for each in (lse2, lse1))
        out[...] = np.where(alone1 & alone2, 0, np.where(alone1, o1, np.where(alone2, o2, both)))
        lse[...] = np.where(np.isneginf(lse2), lse1, np.where(np.isneginf(lse1), lse2, top + np.log(total)))
