"""Tensor maps: how the copy engine of sm_90a sees q, k and v. Described here as data, encoded by the driver or by the tests' emulator.

A launch that was made before moves its maps to the addresses of now (:func:`move`), which is cheaper than to look an encoded one up.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from ..problem import ArrayInfo, AttentionProblem, Strides
from ..types import DType
from .driver import cuda_error, current_context, driver_function
from .spec import WARPGROUP_ROWS, KernelSpec

__all__ = ["TENSOR_MAP_ALIGNMENT", "TENSOR_MAP_BYTES", "TensorMapSpec", "encode", "move", "move_function", "tensor_map_specs"]

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64
_WIDE_ROW = 64  # elements of a panel's row: 128 bytes, and so the swizzle's span; 32 otherwise
_NOWHERE = 16  # the address of arrays without elements, which nobody reads: null may not be one

# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16, _INTERLEAVE_NONE, _SWIZZLE_64B and _128B, _L2_PROMOTION_L2_256B,
# _FLOAT_OOB_FILL_NONE (zeros).
_FLOAT16, _BFLOAT16 = 6, 9
_NO_INTERLEAVE, _SWIZZLE_64, _SWIZZLE_128, _PROMOTE_TO_256, _FILL_WITH_ZEROS = 0, 2, 3, 3, 0

# Sizes, strides between dimensions, the box: of four dimensions or five, and where each of the three begins.
_NUMBERS = {4: struct.Struct("=4Q8x3Q8x4I"), 5: struct.Struct("=5Q4Q5I")}
_NUMBERS_AT = (0, 40, 72)
_EVERY_ELEMENT = (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1)


@dataclass(frozen=True, slots=True)
class TensorMapSpec:
    """A tensor (columns, rows, heads, batches), first dimension contiguous, copied in boxes; ``strides`` are bytes between the others.

    Where query heads that share K and V are packed it is (columns, heads of a group, rows, groups, batches).
    """

    dtype: DType
    ptr: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def tensor_map_specs(problem: AttentionProblem, spec: KernelSpec) -> tuple[TensorMapSpec, TensorMapSpec, TensorMapSpec]:
    """The maps of q, k and v for one kernel: panels of cuda/tile/swizzled_tile.cuh."""
    tile = spec.tile
    q = _map(problem.q, problem.q_strides, problem.batch, spec.head_dim, WARPGROUP_ROWS)
    return (
        _packed(q, problem.heads // problem.heads_kv) if spec.pack_gqa else q,
        _map(problem.k, problem.k_strides, problem.batch, spec.head_dim, tile.block_n),
        _map(problem.v, problem.v_strides, problem.batch, spec.v_head_dim, tile.block_n),
    )


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
            for element, rank, swizzle in product((_FLOAT16, _BFLOAT16), _NUMBERS, (_SWIZZLE_64, _SWIZZLE_128))
        }

    def filled(self, spec: TensorMapSpec) -> tuple[Any, ...]:
        """The arguments of cuTensorMapEncodeTiled for ``spec``, until the next call; it leaves the map in ``map``."""
        sizes, box = spec.sizes, spec.box
        rank = len(sizes)
        _NUMBERS[rank].pack_into(self._numbers, 0, *sizes, *spec.strides, *box)
        self._address.value = spec.ptr
        element = _FLOAT16 if spec.dtype is DType.F16 else _BFLOAT16
        return self._arguments[element, rank, _SWIZZLE_128 if box[0] == _WIDE_ROW else _SWIZZLE_64]


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


def _map(array: ArrayInfo, strides: Strides, batch: int, width: int, rows: int) -> TensorMapSpec:
    """Packed arrays are one batch of all tokens. A size of 0 is not allowed in a map, and is never read: it becomes 1."""
    *lead, tokens, heads, columns = array.shape
    dtype = array.dtype or DType.F16
    sizes = (columns, max(1, tokens), max(1, heads), max(1, batch if lead else 1))
    steps = (strides.row, strides.head, strides.batch if lead else 0)
    box = (64 if width % 64 == 0 else 32, rows, 1, 1)
    return TensorMapSpec(dtype, array.ptr or _NOWHERE, sizes, _bytes(steps, sizes, dtype), box)


def _packed(q: TensorMapSpec, group: int) -> TensorMapSpec:
    """The map of q with ``group`` heads after the columns, so that a box holds all of them for one row after the other."""
    (columns, rows, heads, batches), (row, head, batch), (width, box_rows, *_) = q.sizes, q.strides, q.box
    return replace(
        q,
        sizes=(columns, group, rows, heads // group, batches),
        strides=(head, row, head * group, batch),
        box=(width, group, box_rows // group, 1, 1),
    )


def _bytes(steps: tuple[int, int, int], sizes: tuple[int, int, int, int], dtype: DType) -> tuple[int, int, int]:
    """A dimension of one element is never stepped over, whatever its stride says: 16 is as good as any."""
    row, head, batch = (16 if size == 1 else step * dtype.itemsize for step, size in zip(steps, sizes[1:], strict=True))
    return row, head, batch
