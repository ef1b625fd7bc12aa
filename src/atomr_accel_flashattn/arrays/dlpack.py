"""Reading the DLPack protocol with ctypes: every element type (bfloat16 and fp8 too), no copy, no dependency.

Source: DLPack's ``dlpack.h`` (DLManagedTensorVersioned, which has flags, and DLManagedTensor of producers that do not know it).
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, NamedTuple

from ..errors import ArrayTypeError, DeviceMismatchError, DTypeError
from ..types import Device

__all__ = ["BorrowedTensor", "DlpackView", "read_dlpack"]

_KIND_CPU: Final = (1, 3)  # kDLCPU, kDLCUDAHost: readable from the host
_KIND_CUDA: Final = (2, 13)  # kDLCUDA, kDLCUDAManaged
_LEGACY_DEFAULT_STREAM: Final = 1
_MAX_VERSION: Final = (1, 0)
_READ_ONLY: Final = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_IS_COPIED: Final = 2  # DLPACK_FLAG_BITMASK_IS_COPIED
_TYPE_CODES: Final = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_SINGLE_TYPES: Final = {6: "bool", 10: "float8_e4m3fn", 12: "float8_e5m2"}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_kind", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_capsule_is = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))


class BorrowedTensor(NamedTuple):
    """What keeps a DLPack tensor alive: the producer's object and the capsule, whose end tells the producer that we are done.

    ``why_not_written``: what the producer says against writing to it, empty where it says nothing.
    """

    owner: Any
    capsule: Any
    why_not_written: str = ""


class DlpackView(NamedTuple):
    """A tensor as DLPack describes it. Strides in elements."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype_name: str
    device: Device
    borrowed: BorrowedTensor


def read_dlpack(x: Any, name: str) -> DlpackView:
    """Describe ``x`` through ``__dlpack__``. GPU producers are asked to order their work before the legacy default stream.

    Raises:
        ArrayTypeError: the producer refuses to export.
        DTypeError: an element type that DLPack knows and we do not.
        DeviceMismatchError: neither host nor CUDA memory.
    """
    try:
        kind, index = (int(part) for part in x.__dlpack_device__())
        capsule = _export(x, {"stream": _LEGACY_DEFAULT_STREAM} if kind in _KIND_CUDA else {})
    except Exception as error:  # whatever the producer raises, the user has to learn which argument it was
        raise ArrayTypeError(f"{name}: {type(x).__qualname__} could not be exported through DLPack: {error}") from error
    if kind not in _KIND_CPU + _KIND_CUDA:
        raise DeviceMismatchError(f"{name}: got DLPack device type {kind}; allowed are host memory (1, 3) and CUDA memory (2, 13)")
    tensor, flags = _capsule_tensor(capsule)
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _contiguous(shape)
    device = Device("cuda", index) if kind in _KIND_CUDA else Device("cpu", 0)
    ptr = (tensor.data or 0) + int(tensor.byte_offset)
    return DlpackView(ptr, shape, strides, _dtype_name(tensor, name), device, BorrowedTensor(x, capsule, _why_not_written(flags)))


def _export(x: Any, stream: dict[str, int]) -> Any:
    """The capsule of a producer, with flags if it knows them: arguments that an old one does not know are a TypeError."""
    try:
        return x.__dlpack__(max_version=_MAX_VERSION, **stream)
    except TypeError:
        return x.__dlpack__(**stream)


def _capsule_tensor(capsule: Any) -> tuple[_Tensor, int]:
    """The tensor in a capsule, and its flags."""
    if not _capsule_is(capsule, b"dltensor_versioned"):
        return _Tensor.from_address(_capsule_pointer(capsule, b"dltensor")), 0
    managed = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
    return managed.tensor, managed.flags


def _why_not_written(flags: int) -> str:
    if flags & _READ_ONLY:
        return "an array that DLPack calls read-only"
    return "an array of which DLPack gives a copy" if flags & _IS_COPIED else ""


def _dtype_name(tensor: _Tensor, name: str) -> str:
    if tensor.lanes == 1:
        if tensor.code in _SINGLE_TYPES and tensor.bits == 8:
            return _SINGLE_TYPES[tensor.code]
        if tensor.code in _TYPE_CODES:
            return f"{_TYPE_CODES[tensor.code]}{tensor.bits}"
    raise DTypeError(
        f"{name}: DLPack type code {tensor.code} with {tensor.bits} bits and {tensor.lanes} lanes is not an element type that we know"
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
