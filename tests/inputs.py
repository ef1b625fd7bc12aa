"""Inputs of one attention call as NumPy arrays, the memory layouts they come in, and poisoned outputs.

Every view made here lies inside a flat buffer whose other elements are NaN, so that reading past a row, a head or the end of a
sequence shows in the result, and writing there shows in :meth:`Poisoned.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from atomr_accel_flashattn.types import DType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["NUMPY_DTYPE", "Inputs", "Layout", "Poisoned", "Sequence", "place", "storage_of"]

NUMPY_DTYPE: dict[DType, np.dtype[Any]] = {
    DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.F32: np.dtype(np.float32),
    DType.F64: np.dtype(np.float64),
}


class Layout(Enum):
    """How a (..., S, H, D) array lies in memory; the last dimension is always contiguous."""

    CONTIGUOUS = "contiguous"
    PADDED = "padded"  # 8 elements between rows, spare heads and tokens: 16-byte steps
    ODD = "odd"  # 1 element between rows and before the first: no 16-byte load is aligned
    HEADS_FIRST = "heads_first"  # stored (..., H, S, D)
    FUSED = "fused"  # the middle of a (..., S, 3, H, D) array, as in packed q, k, v
    SHARED_KV = "shared_kv"  # k and v expanded with stride 0: over the batch when dense, over the heads when packed


@dataclass(frozen=True, slots=True)
class Sequence:
    """Views of one sequence: q (Sq, Hq, D), k (Sk, Hkv, D), v (Sk, Hkv, Dv), and where its rows lie in o and in the LSE."""

    index: int
    q: Array
    k: Array
    v: Array
    out_rows: tuple[int | slice, ...]  # o[out_rows] is (Sq, Hq, Dv)
    lse_rows: tuple[int | slice, ...]  # lse[lse_rows] is (Hq, Sq)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One call. Shapes and meaning: docs/semantics.md. `dropout_p` is 0 or comes with `rng`, the int64 (seed, offset)."""

    dtype: DType
    q: Array
    k: Array
    v: Array
    softmax_scale: float
    left: int | None = None
    right: int | None = None
    sink_tokens: int = 0
    softcap: float = 0.0
    alibi_slopes: Array | None = None
    learned_sink: Array | None = None
    cu_seqlens_q: Array | None = None
    cu_seqlens_k: Array | None = None
    dropout_p: float = 0.0
    rng: Array | None = None

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.q.shape[-2])

    @property
    def heads_kv(self) -> int:
        """KV heads."""
        return int(self.k.shape[-2])

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.q) if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    @property
    def max_seqlen_q(self) -> int:
        """Most queries in a sequence."""
        return int(self.q.shape[1]) if self.cu_seqlens_q is None else int(np.diff(self.cu_seqlens_q).max(initial=0))

    @property
    def max_seqlen_k(self) -> int:
        """Most keys in a sequence."""
        return int(self.k.shape[1]) if self.cu_seqlens_k is None else int(np.diff(self.cu_seqlens_k).max(initial=0))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of o."""
        return (*self.q.shape[:-1], self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of the LSE."""
        return (self.heads, len(self.q)) if self.cu_seqlens_q is not None else (self.batch, self.heads, self.max_seqlen_q)

    @property
    def keep_shape(self) -> tuple[int, ...]:
        """Shape of the dropout pattern."""
        return (self.batch, self.heads, self.max_seqlen_q, self.max_seqlen_k)

    def sequence(self, index: int) -> Sequence:
        """The sequence with this index."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return Sequence(index, self.q[index], self.k[index], self.v[index], (index,), (index,))
        rows = slice(int(self.cu_seqlens_q[index]), int(self.cu_seqlens_q[index + 1]))
        keys = slice(int(self.cu_seqlens_k[index]), int(self.cu_seqlens_k[index + 1]))
        return Sequence(index, self.q[rows], self.k[keys], self.v[keys], (rows,), (slice(None), rows))

    def sequences(self) -> Iterator[Sequence]:
        """All sequences in order."""
        return (self.sequence(index) for index in range(self.batch))


def place(array: Array, layout: Layout) -> Array:
    """The same values as a view, laid out as asked, inside a flat buffer of NaN. A broadcast layout keeps the first slice only."""
    *lead, tokens, heads, width = array.shape
    if layout is Layout.SHARED_KV:
        axis = 0 if lead else 1
        first = place(array[:1] if axis == 0 else array[:, :1], Layout.CONTIGUOUS)
        return np.broadcast_to(first, array.shape)
    if layout is Layout.HEADS_FIRST:
        return np.swapaxes(place(np.swapaxes(array, -3, -2), Layout.CONTIGUOUS), -3, -2)
    whole, offset = {
        Layout.CONTIGUOUS: ((*lead, tokens, heads, width), 0),
        Layout.PADDED: ((*lead, tokens + 2, heads + 1, width + 8), 8),
        Layout.ODD: ((*lead, tokens + 1, heads, width + 1), 1),
        Layout.FUSED: ((*lead, tokens, 3, heads, width), 0),
    }[layout]
    size = int(np.prod(whole, dtype=np.int64))
    storage = np.full(offset + size + 64, np.nan, dtype=array.dtype)
    block = storage[offset : offset + size].reshape(whole)
    view = block[..., 1, :, :] if layout is Layout.FUSED else block[..., :tokens, :heads, :width]
    view[...] = array
    return view


def storage_of(view: Array) -> tuple[Array, int, tuple[int, ...]]:
    """The flat buffer that a view of :func:`place` lies in, the offset of its first element in it, and its strides in elements.

    For copying a call to a device with its layout: upload the buffer, then make the strided view there.
    """
    storage = view
    while isinstance(storage.base, np.ndarray):
        storage = storage.base
    offset = (view.ctypes.data - storage.ctypes.data) // view.itemsize if view.size else 0
    return storage.reshape(-1), offset, tuple(step // view.itemsize for step in view.strides)


@dataclass(frozen=True, slots=True, eq=False)
class Poisoned:
    """An output to write into: NaN inside, and a known NaN around that must survive."""

    view: Array
    storage: Array = field(repr=False)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype[Any], layout: Layout = Layout.PADDED) -> Poisoned:
        """An output (..., S, H, D) full of NaN."""
        view = place(np.full(shape, np.nan, dtype), Layout.CONTIGUOUS if layout is Layout.SHARED_KV else layout)
        return cls(view, storage_of(view)[0])

    def check(self) -> None:
        """Raise AssertionError when anything around the view is no longer NaN."""
        outside = self.storage.copy()
        offset = storage_of(self.view)[1]
        steps = self.view.strides
        flat = np.lib.stride_tricks.as_strided(outside[offset:], self.view.shape, steps)
        flat[...] = np.nan
        touched = np.flatnonzero(~np.isnan(outside))
        assert touched.size == 0, (
            f"{touched.size} elements outside the output were written, the first at element {touched[0]} of its buffer"
        )
