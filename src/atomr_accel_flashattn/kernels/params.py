"""Launch parameters as ctypes: what every kernel's struct is made of. Each kernel's own stands in its module; a test compares offsets.

Addresses come first in every struct, in the order of ``SLOTS``, so that a launch writes them in one go. They are no part of what
:meth:`~.spec.KernelSpec.pack` makes: every launch brings the addresses of now.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

from ..types import DType

__all__ = ["KernelParams", "StrideParams", "TensorMapParams", "TensorMapSpec"]


class KernelParams(ctypes.Structure):
    """Base of the parameter structs.

    Attributes:
        SLOTS: names of the addresses that the struct starts with, 8 bytes each.
        MAPS: fields that hold tensor maps, with the slot whose array each of them reads.
        tensor_maps: those maps before they are encoded, in that order.
        counts: whether the field ``counters`` has to point at two zeros of the launch's stream.
    """

    SLOTS: ClassVar[tuple[str, ...]]
    MAPS: ClassVar[tuple[tuple[str, str], ...]] = ()
    tensor_maps: tuple[TensorMapSpec, ...] = ()
    counts: bool = False


class StrideParams(ctypes.Structure):
    """``fa::Strides``, in elements."""

    _fields_ = (("batch", ctypes.c_int64), ("row", ctypes.c_int64), ("head", ctypes.c_int64))


class TensorMapParams(ctypes.Structure):
    """``fa::TensorMap``: a CUtensorMap. Its 64-byte alignment inside a struct is spelled out there."""

    _fields_ = (("bytes", ctypes.c_ubyte * 128),)


@dataclass(frozen=True, slots=True)
class TensorMapSpec:
    """A tensor (columns, rows, heads, batches), first dimension contiguous, that TMA copies in boxes.

    ``strides`` are bytes between the other dimensions. Where query heads that share K and V are packed it is (columns, heads of a group,
    rows, groups, batches). ``ptr`` is where it is encoded for; launches move it.
    """

    dtype: DType
    ptr: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
