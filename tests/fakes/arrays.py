"""Arrays of the fake card without a framework."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.arrays.new import empty_like_framework
from atomr_accel_flashattn.arrays.read import numpy_dtype, read_array
from atomr_accel_flashattn.problem import ArrayInfo
from atomr_accel_flashattn.types import Device

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FakeArray", "empty_like", "empty_workspace"]

_ALIGNMENT = 256  # of what CUDA allocates


class FakeArray:
    """Host memory, aligned as that of a GPU, that says it is on one. ``info()`` is what a request takes."""

    def __init__(self, array: NDArray[Any], index: int = 0) -> None:
        room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
        start = -room.ctypes.data % _ALIGNMENT
        self.array = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.index = index

    def info(self) -> ArrayInfo:
        host = read_array(self.array, "x")
        return ArrayInfo(host.ptr, host.shape, host.strides, host.dtype, host.dtype_name, Device("cuda", self.index), self)


def empty_like(like: ArrayInfo, shape: tuple[int, ...], dtype_name: str | None = None) -> ArrayInfo:
    """``empty_like_framework`` that also knows :class:`FakeArray`."""
    if not isinstance(like.source, FakeArray):
        return empty_like_framework(like, shape, dtype_name)
    return FakeArray(np.empty(shape, numpy_dtype(dtype_name or like.dtype_name)), like.device.index).info()


def empty_workspace(like: ArrayInfo, size: int) -> ArrayInfo:
    """``size`` bytes in which NaN lies, so that whoever reads what was not written gives no numbers."""
    made = empty_like(like, (-(-size // 4),), "float32")
    np.ctypeslib.as_array((ctypes.c_float * made.shape[0]).from_address(made.ptr))[:] = np.nan
    return made
