"""Tensor maps: how the copy engine of sm_90a sees q, k and v. Described here as data, encoded by the driver or by the tests' emulator."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..problem import ArrayInfo, AttentionProblem, Strides
from ..types import DType
from .driver import check, driver
from .spec import KernelSpec

__all__ = ["TensorMapSpec", "encode", "tensor_map_specs"]

_BYTES = 128
_WIDE_ROW = 128  # bytes of a panel's row, and so the swizzle's span; 64 otherwise
_KEPT = 4096  # encoded maps of 128 bytes


@dataclass(frozen=True, slots=True)
class TensorMapSpec:
    """A 4-d tensor (columns, rows, heads, batches), first dimension contiguous, copied in boxes of ``box`` = (columns, rows).

    ``strides`` are bytes between rows, heads and batches. Equal maps are encoded once.
    """

    dtype: DType
    ptr: int
    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    box: tuple[int, int]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a box: the swizzle's span, 128 or 64."""
        return self.box[0] * self.dtype.itemsize


def tensor_map_specs(problem: AttentionProblem, spec: KernelSpec) -> tuple[TensorMapSpec, TensorMapSpec, TensorMapSpec]:
    """The maps of q, k and v for one kernel: panels of cuda/panels.cuh."""
    tile = spec.tile
    return (
        _map(problem.q, problem.q_strides, problem.batch, spec.head_dim, tile.block_m),
        _map(problem.k, problem.k_strides, problem.batch, spec.head_dim, tile.block_n),
        _map(problem.v, problem.v_strides, problem.batch, spec.v_head_dim, tile.block_n),
    )


@lru_cache(maxsize=_KEPT)
def encode(spec: TensorMapSpec) -> bytes:
    """The 128 bytes of a CUtensorMap (3 us, then remembered).

    Raises:
        LaunchError: the driver refuses the map.
    """
    cuda = driver()
    types = cuda.CUtensorMapDataType
    element = {DType.F16: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, DType.BF16: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16}[spec.dtype]
    swizzles = cuda.CUtensorMapSwizzle
    encoded: Any = check(
        cuda.cuTensorMapEncodeTiled(
            element,
            4,
            spec.ptr,
            [cuda.cuuint64_t(size) for size in spec.sizes],
            [cuda.cuuint64_t(step) for step in spec.strides],
            [cuda.cuuint32_t(size) for size in (*spec.box, 1, 1)],
            [cuda.cuuint32_t(1)] * 4,
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if spec.row_bytes == _WIDE_ROW else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"encoding a tensor map of sizes {spec.sizes} and byte strides {spec.strides}",
    )
    return ctypes.string_at(int(encoded.getPtr()), _BYTES)


def _map(array: ArrayInfo, strides: Strides, batch: int, width: int, rows: int) -> TensorMapSpec:
    """Packed arrays are one batch of all tokens. A size of 0 is not allowed in a map, and is never read: it becomes 1."""
    *lead, tokens, heads, columns = array.shape
    dtype = array.dtype or DType.F16
    sizes = (columns, max(1, tokens), max(1, heads), max(1, batch if lead else 1))
    steps = (strides.row, strides.head, strides.batch if lead else 0)
    return TensorMapSpec(dtype, array.ptr, sizes, _bytes(steps, sizes, dtype), (64 if width % 64 == 0 else 32, rows))


def _bytes(steps: tuple[int, int, int], sizes: tuple[int, int, int, int], dtype: DType) -> tuple[int, int, int]:
    """A dimension of one element is never stepped over, whatever its stride says: 16 is as good as any."""
    row, head, batch = (16 if size == 1 else step * dtype.itemsize for step, size in zip(steps, sizes[1:], strict=True))
    return row, head, batch
