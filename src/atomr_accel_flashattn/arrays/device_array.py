"""DeviceArray: a small GPU array for machines without torch or CuPy. Row-major, no arithmetic, in and out through NumPy.

Allocation is the plain synchronous one: right on every stream, and slow (tens of microseconds), so loops pass ``out=``.
"""

from __future__ import annotations

import contextlib
import sys
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import ArrayTypeError, DTypeError, LaunchError, ShapeError
from ..launch.driver import check, current_context, driver

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DeviceArray"]

_NOT_IN_NUMPY: Final = {"bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_LEGACY_DEFAULT_STREAM: Final = 1


class DeviceArray:
    """A row-major array in the memory of one GPU.

    Make one with :meth:`empty` or :meth:`from_numpy`; read it with :meth:`numpy`. Memory is freed when the last reference goes.
    ``copy.copy`` shares memory; deepcopying and unpickling copy the elements, by way of the host, to a GPU of the same number.

    Attributes:
        ptr: address on the device.
        shape: sizes.
        dtype_name: as ``"bfloat16"``.
        device_index: ordinal of the GPU.
    """

    __slots__ = ("_owner", "device_index", "dtype_name", "ptr", "shape")

    def __init__(self, ptr: int, shape: tuple[int, ...], dtype_name: str, device_index: int, *, owner: Any) -> None:
        self.ptr = ptr
        self.shape = shape
        self.dtype_name = dtype_name
        self.device_index = device_index
        self._owner = owner

    @classmethod
    def borrow(cls, ptr: int, shape: tuple[int, ...], dtype_name: str, device_index: int, *, owner: Any) -> DeviceArray:
        """A view of memory that ``owner`` keeps alive."""
        return cls(ptr, shape, dtype_name, device_index, owner=owner)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype_name: str, device_index: int = 0) -> DeviceArray:
        """Uninitialised memory on one GPU.

        Raises:
            ShapeError: a negative size.
            DTypeError: a type name that we do not know.
            NoDriverError: this machine has no GPU that we can use.
            LaunchError: CUDA could not allocate.
        """
        if any(size < 0 for size in shape):
            raise ShapeError(f"shape: got {shape}; allowed are sizes >= 0")
        size = prod(shape) * _itemsize(dtype_name)
        if size == 0:
            return cls(0, shape, dtype_name, device_index, owner=None)
        with current_context(device_index):
            ptr = int(check(driver().cuMemAlloc(size), f"allocating {size} bytes on GPU {device_index}"))
        return cls(ptr, shape, dtype_name, device_index, owner=_Allocation(ptr, device_index))

    @classmethod
    def from_numpy(cls, array: np.ndarray[Any, Any], device_index: int = 0) -> DeviceArray:
        """A copy of a NumPy array (ml_dtypes for bfloat16) on one GPU. Returns when the copy is done."""
        if not isinstance(array, np.ndarray):
            raise ArrayTypeError(f"array: got {type(array).__qualname__}; allowed is a NumPy array")
        host = np.ascontiguousarray(array)
        made = cls.empty(array.shape, host.dtype.name, device_index)
        if host.nbytes:
            with current_context(device_index):
                check(driver().cuMemcpyHtoD(made.ptr, host.ctypes.data, host.nbytes), f"copying {host.nbytes} bytes to GPU {device_index}")
        return made

    def numpy(self, *, stream: int = _LEGACY_DEFAULT_STREAM) -> np.ndarray[Any, Any]:
        """A copy in host memory, after all work that was enqueued on ``stream`` (a raw CUstream)."""
        host = np.empty(self.shape, _bits(self.dtype_name))
        if host.nbytes:
            with current_context(self.device_index):
                check(driver().cuStreamSynchronize(stream), "waiting for a stream")
                check(
                    driver().cuMemcpyDtoH(host.ctypes.data, self.ptr, host.nbytes),
                    f"copying {host.nbytes} bytes from GPU {self.device_index}",
                )
        if self.dtype_name in _NOT_IN_NUMPY:
            import ml_dtypes

            return host.view(getattr(ml_dtypes, self.dtype_name))
        return host

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * _itemsize(self.dtype_name)

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        """Version 3 of the protocol; types that NumPy lacks appear as unsigned integers of their size."""
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": np.dtype(_bits(self.dtype_name)).str,
            "data": (self.ptr, False),
            "strides": None,
            "stream": _LEGACY_DEFAULT_STREAM,
        }

    def __copy__(self) -> DeviceArray:
        return DeviceArray(self.ptr, self.shape, self.dtype_name, self.device_index, owner=self._owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return DeviceArray.from_numpy, (self.numpy(), self.device_index)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype_name}, device=cuda:{self.device_index})"


def _itemsize(dtype_name: str) -> int:
    if dtype_name in _NOT_IN_NUMPY:
        return _NOT_IN_NUMPY[dtype_name]
    try:
        return np.dtype(dtype_name).itemsize
    except TypeError as error:
        raise DTypeError(f"dtype: got {dtype_name!r}; allowed are NumPy's names and {', '.join(_NOT_IN_NUMPY)}") from error


def _bits(dtype_name: str) -> str:
    return f"u{_itemsize(dtype_name)}" if dtype_name in _NOT_IN_NUMPY else dtype_name


class _Allocation:
    """Frees device memory when it is collected. cuMemFree waits for the GPU, so no kernel on any stream still uses the memory."""

    __slots__ = ("device_index", "ptr")

    def __init__(self, ptr: int, device_index: int) -> None:
        self.ptr = ptr
        self.device_index = device_index

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the process frees it, and the driver may be gone already
            with contextlib.suppress(LaunchError), current_context(self.device_index):  # a lost device: whoever used it has been told
                driver().cuMemFree(self.ptr)
