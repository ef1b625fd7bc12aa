"""Tensor maps: how the copy engine of sm_90a sees q, k and v. Described here as data, encoded by the driver or by the tests' emulator."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import ArrayInfo, AttentionProblem, Strides
from ..types import DType
from .spec import KernelSpec

__all__ = ["TensorMapSpec", "tensor_map_specs"]


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
