"""Tensor maps: how TMA sees an array. A kernel describes them as data (kernels/params.py); here the driver encodes and moves them.

A launch that was made before moves its maps to the addresses of now (:func:`move`), which is cheaper than to look an encoded one up.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

from ..kernels.params import TensorMapSpec
from ..types import DType
from .driver import cuda_error, current_context, driver_function

__all__ = ["TENSOR_MAP_ALIGNMENT", "TENSOR_MAP_BYTES", "encode", "move", "move_function"]

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64
_WIDE_ROW = 128  # bytes of a box's row that the wide swizzle spans

# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_UINT8, as which fp8 is copied, _FLOAT16 and _BFLOAT16, _INTERLEAVE_NONE, _SWIZZLE_64B and _128B,
# _L2_PROMOTION_L2_256B, _FLOAT_OOB_FILL_NONE (zeros).
_ELEMENTS = {DType.F8E4M3: 0, DType.F8E5M2: 0, DType.F16: 6, DType.BF16: 9}
_NO_INTERLEAVE, _SWIZZLE_64, _SWIZZLE_128, _PROMOTE_TO_256, _FILL_WITH_ZEROS = 0, 2, 3, 3, 0

# Sizes, strides between dimensions, the box: of four dimensions or five, and where each of the three begins.
_NUMBERS = {4: struct.Struct("=4Q8x3Q8x4I"), 5: struct.Struct("=5Q4Q5I")}
_NUMBERS_AT = (0, 40, 72)
_EVERY_ELEMENT = (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1)


def encode(spec: TensorMapSpec, device_index: int) -> bytes:
    """The 128 bytes of a CUtensorMap for GPU ``device_index``.

    Raises:
        LaunchError: the driver refuses the map.
    """
    try:
        form = _free_forms.pop()
    except IndexError:
        form = _Form()
    code = _call(_encode_function(), form.filled(spec), device_index)
    encoded = form.map.tobytes()
    _free_forms.append(form)
    if code:
        raise cuda_error(code, f"encoding a tensor map of sizes {spec.sizes} and byte strides {spec.strides}")
    return encoded


class _Form:
    """The driver's arguments, made once: a map only writes its numbers among them, which saves half of the time.

    One encoding at a time has it: other threads, and signal handlers of this one, take another.
    """

    def __init__(self) -> None:
        room = bytearray(TENSOR_MAP_ALIGNMENT + TENSOR_MAP_BYTES + _NUMBERS[5].size)
        first = ctypes.c_char.from_buffer(room)
        start = -ctypes.addressof(first) % TENSOR_MAP_ALIGNMENT
        self.map = memoryview(room)[start : start + TENSOR_MAP_BYTES]
        self._numbers = memoryview(room)[start + TENSOR_MAP_BYTES :]
        numbers_at = [ctypes.byref(first, start + TENSOR_MAP_BYTES + at) for at in _NUMBERS_AT]
        self._address = ctypes.c_void_p()
        self._arguments = {
            (element, rank, swizzle): (
                *(ctypes.byref(first, start), element, rank, self._address, *numbers_at, _EVERY_ELEMENT),
                *(_NO_INTERLEAVE, swizzle, _PROMOTE_TO_256, _FILL_WITH_ZEROS),
            )
            for element, rank, swizzle in product(set(_ELEMENTS.values()), _NUMBERS, (_SWIZZLE_64, _SWIZZLE_128))
        }

    def filled(self, spec: TensorMapSpec) -> tuple[Any, ...]:
        """The arguments of cuTensorMapEncodeTiled for ``spec``, until the next call; it leaves the map in ``map``."""
        sizes, box = spec.sizes, spec.box
        rank = len(sizes)
        _NUMBERS[rank].pack_into(self._numbers, 0, *sizes, *spec.strides, *box)
        self._address.value = spec.ptr
        swizzle = _SWIZZLE_128 if box[0] * spec.dtype.itemsize == _WIDE_ROW else _SWIZZLE_64
        return self._arguments[_ELEMENTS[spec.dtype], rank, swizzle]


_free_forms: list[_Form] = []


def move(tensor_map: int, ptr: int, device_index: int) -> None:
    """Let the encoded map at host address ``tensor_map`` (a multiple of 64) read from ``ptr``, in whatever context this thread is.

    Raises:
        LaunchError: the driver refuses the address.
    """
    code = _call(move_function(), (tensor_map, ptr), device_index)
    if code:
        raise cuda_error(code, f"moving a tensor map to {ptr:#x}")


@cache
def move_function() -> Any:
    """``cuTensorMapReplaceAddress(map*, address) -> int`` (0.5 us), the part of :func:`move` that is enough where there is a context."""
    function = driver_function("cuTensorMapReplaceAddress")
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    return function


def _call(function: Callable[..., int], arguments: tuple[Any, ...], device_index: int) -> int:
    """The CUresult. The driver may ask for a context, though it needs none to fill 128 bytes; most threads that launch have one."""
    code = function(*arguments)
    if code:
        with current_context(device_index):
            code = function(*arguments)
    return code


@cache
def _encode_function() -> Any:
    return driver_function("cuTensorMapEncodeTiled")
