"""CumulativeSeqlens: where each of the sequences that are packed one after the other begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays.new import int32_like
from ..arrays.read import read_array
from ..arrays.streams import copy_to_host
from ..env import settings
from ..errors import ArrayTypeError, CuSeqlensError, DTypeError
from ..limits import MAX_LENGTH, as_integer
from ..problem import ArrayInfo
from ..runtime.staleness import check_array
from ..short_repr import ShortRepr
from .checks import check_device, is_contiguous
from .copies import MadeAnew

__all__ = ["CumulativeSeqlens", "check_batches", "check_seqlens"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CumulativeSeqlens(MadeAnew, ShortRepr):
    """Where each of B packed sequences begins: sequence b is rows ``offsets[b]`` to ``offsets[b + 1]``.

    Values in host memory are checked here. Values on a GPU are checked only with ATOMR_FLASHATTN_DEBUG set, because reading them waits
    for the GPU.

    Attributes:
        offsets: int32 (B + 1,), starting at 0, never decreasing, ending at or before the number of rows.
        max_seqlen: length of the longest sequence (an upper bound will do); may be None for offsets in host memory. An array without
            dimensions is taken for its value; one on a GPU is waited for.
        array: the description of ``offsets`` (made, not given).

    Raises:
        CuSeqlensError: wrong rank, size, start, order, or a ``max_seqlen`` that a sequence exceeds.
        DTypeError: not int32.
    """

    offsets: Any
    max_seqlen: int | None = None
    array: ArrayInfo = field(init=False, repr=False)
    name: str = field(default="cu_seqlens", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        info = read_array(self.offsets, self.name)
        if info.dtype_name != "int32":
            raise DTypeError(f"{self.name}: got type {info.dtype_name}; allowed is int32; call .int() or .astype('int32')")
        if len(info.shape) != 1 or info.shape[0] < 1 or not is_contiguous(info):
            raise CuSeqlensError(
                f"{self.name}: got shape {info.shape} and strides {info.strides}; allowed is a contiguous array of shape (batch + 1,)"
            )
        object.__setattr__(self, "array", info)
        object.__setattr__(self, "max_seqlen", self._checked_max(self._longest()))

    def _longest(self) -> int | None:
        """The longest length after a look at the values; None when they stay unseen on a GPU."""
        if self.array.device.kind != "cpu" and not settings().debug:
            return None
        values = copy_to_host(self.array).astype(np.int64)
        if values[0] != 0:
            advice = (
                "; these look like lengths: use torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))"
                if values[0] > 0
                else ""
            )
            raise CuSeqlensError(f"{self.name}: got {values[0]} as its first value; allowed is 0{advice}")
        lengths = np.diff(values)
        if (lengths < 0).any():
            at = int(np.argmax(lengths < 0))
            raise CuSeqlensError(
                f"{self.name}: got {values[at]} followed by {values[at + 1]} at index {at}; allowed are values that never decrease"
            )
        return int(lengths.max(initial=0))

    def _checked_max(self, longest: int | None) -> int:
        given: Any = self.max_seqlen
        if given is None and longest is not None:
            return longest
        most = as_integer(given)
        if most is None or not 0 <= most <= MAX_LENGTH:
            raise CuSeqlensError(
                f"max_seqlen of {self.name}: got {given!r}; allowed is an integer in 0..{MAX_LENGTH} (None only for offsets in host memory)"
            )
        if longest is not None and longest > most:
            raise CuSeqlensError(
                f"max_seqlen of {self.name}: got {most}, and a sequence has {longest} rows; allowed is at least the longest length; "
                "check that the offsets are right"
            )
        return most

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | np.ndarray[Any, Any], *, like: Any = None) -> CumulativeSeqlens:
        """Offsets of sequences with the given lengths, in the library and on the device of ``like`` (None: NumPy).

        Raises:
            CuSeqlensError: a negative or non-integer length, or a total beyond int32.
            ArrayTypeError: a library that we cannot make arrays with.
        """
        try:
            values = np.asarray(lengths)
        except (ValueError, TypeError) as error:  # ragged, or memory of a GPU
            raise CuSeqlensError(f"lengths: got {lengths!r}; allowed is a flat sequence of integers >= 0 in host memory") from error
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu") or (values < 0).any():
            raise CuSeqlensError(f"lengths: got {lengths!r}; allowed is a flat sequence of integers >= 0")
        offsets = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise CuSeqlensError(
                f"lengths: got a total of {offsets[-1]} rows; allowed is at most {np.iinfo(np.int32).max}, because offsets are int32"
            )
        return cls(int32_like(offsets.astype(np.int32), like), int(values.max(initial=0)))

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.array.shape[0] - 1

    @property
    def longest(self) -> int:
        """``max_seqlen``, which is always known once this object exists."""
        assert self.max_seqlen is not None  # noqa: S101 - __post_init__ sets it
        return self.max_seqlen

    def check_total(self, rows: int) -> None:
        """The last offset is at most the number of rows; looked at only where the values may be read."""
        if self.array.device.kind != "cpu" and not settings().debug:
            return
        last = int(copy_to_host(self.array)[-1])
        if last > rows:
            raise CuSeqlensError(
                f"{self.name}: got {last} as its last value with {rows} rows in the packed array; allowed is at most the number of rows"
            )


def check_seqlens(seqlens: CumulativeSeqlens, name: str, q: ArrayInfo, packed: ArrayInfo) -> None:
    """Whether offsets are such, lie where q lies, and end within the rows of ``packed``.

    Raises:
        ArrayTypeError: no CumulativeSeqlens.
        DeviceMismatchError: on another device than q.
        StaleArrayError: an array that was freed or resized since.
        CuSeqlensError: an end beyond the rows.
    """
    if not isinstance(seqlens, CumulativeSeqlens):
        raise ArrayTypeError(
            f"{name}: got {type(seqlens).__qualname__}; allowed is a CumulativeSeqlens; "
            "make one with CumulativeSeqlens(offsets, max_seqlen)"
        )
    check_device(seqlens.array, name, q)
    check_array(seqlens.array, name)
    seqlens.check_total(packed.shape[0])


def check_batches(q: ArrayInfo, seqlens_q: CumulativeSeqlens, seqlens_k: CumulativeSeqlens) -> None:
    """Whether q, which has rows, has a sequence, and k as many as q.

    Raises:
        CuSeqlensError: they do not.
    """
    if seqlens_q.batch == 0 and q.shape[0]:
        raise CuSeqlensError(f"cu_seqlens_q: got no sequences with {q.shape[0]} rows in q; allowed is one sequence at least")
    if seqlens_k.batch != seqlens_q.batch:
        raise CuSeqlensError(
            f"cu_seqlens_k: got {seqlens_k.batch} sequences with {seqlens_q.batch} in cu_seqlens_q; allowed are equal numbers of sequences"
        )
