"""Tensor maps: how the copy engine of sm_90a sees q, k and v. Described here as data, encoded by the driver or by the tests' emulator.

A launch that was made before moves its maps to the addresses of now (:func:`move`), which is cheaper than to look an encoded one up.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ..problem import ArrayInfo, AttentionProblem, Strides
from ..types import DType
from .driver import cuda_error, current_context, driver_function
from .spec import WARPGROUP_ROWS, KernelSpec

__all__ = ["TENSOR_MAP_ALIGNMENT", "TENSOR_MAP_BYTES", "TensorMapSpec", "encode", "move", "move_function", "tensor_map_specs"]

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64
_WIDE_ROW = 128  # bytes of a panel's row, and so the swizzle's span; 64 otherwise
_NOWHERE = 16  # the address of arrays without elements, which nobody reads: null may not be one

# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16, _INTERLEAVE_NONE, _SWIZZLE_64B and _128B, _L2_PROMOTION_L2_256B,
# _FLOAT_OOB_FILL_NONE (zeros).
_ELEMENT = {DType.F16: 6, DType.BF16: 9}
_NO_INTERLEAVE, _SWIZZLE_64, _SWIZZLE_128, _PROMOTE_TO_256, _FILL_WITH_ZEROS = 0, 2, 3, 3, 0

_Sizes, _Steps, _Box = ctypes.c_uint64 * 5, ctypes.c_uint64 * 4, ctypes.c_uint32 * 5  # of up to five dimensions
_EVERY_ELEMENT = _Box(1, 1, 1, 1, 1)


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

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a box: the swizzle's span, 128 or 64."""
        return self.box[0] * self.dtype.itemsize


def tensor_map_specs(problem: AttentionProblem, spec: KernelSpec) -> tuple[TensorMapSpec, TensorMapSpec, TensorMapSpec]:
    """The maps of q, k and v for one kernel: panels of cuda/panels.cuh."""
    tile = spec.tile
    q = _map(problem.q, problem.q_strides, problem.batch, spec.head_dim, WARPGROUP_ROWS)
    return (
        _packed(q, problem.heads // problem.heads_kv) if spec.pack_gqa else q,
        _map(problem.k, problem.k_strides, problem.batch, spec.head_dim, tile.block_n),
        _map(problem.v, problem.v_strides, problem.batch, spec.v_head_dim, tile.block_n),
    )


def encode(spec: TensorMapSpec, device_index: int) -> bytes:
    """The 128 bytes of a CUtensorMap for GPU ``device_index`` (3 us).

    Raises:
        LaunchError: the driver refuses the map.
    """
    room = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    offset = -ctypes.addressof(room) % TENSOR_MAP_ALIGNMENT
    arguments = (
        ctypes.byref(room, offset),
        _ELEMENT[spec.dtype],
        len(spec.sizes),
        ctypes.c_void_p(spec.ptr),
        _Sizes(*spec.sizes),
        _Steps(*spec.strides),
        _Box(*spec.box),
        _EVERY_ELEMENT,
        _NO_INTERLEAVE,
        _SWIZZLE_128 if spec.row_bytes == _WIDE_ROW else _SWIZZLE_64,
        _PROMOTE_TO_256,
        _FILL_WITH_ZEROS,
    )
    code = _call(_encode_function(), arguments, device_index)
    if code:
        raise cuda_error(code, f"encoding a tensor map of sizes {spec.sizes} and byte strides {spec.strides}")
    return room.raw[offset : offset + TENSOR_MAP_BYTES]


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
