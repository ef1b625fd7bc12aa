"""The kernel that merges two states of attention: ``cuda/kernels/merge_states.cuh``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final, NamedTuple

from ..limits import VECTOR_BYTES
from ..problem import ArrayInfo
from ..types import DType
from .params import KernelParams, StrideParams
from .spec import SimpleKernelSpec, literal

__all__ = ["MergeStatesParams", "MergeStatesSpec", "States"]

_WARP: Final = 32

_SOURCE = """\
#include "kernels/merge_states.cuh"

extern "C" __global__ void __launch_bounds__({threads}) {name}(const __grid_constant__ fa::MergeStatesParams p) {{
  fa::merge_states<fa::DType::{dtype}, {threads}, {aligned}>(p);
}}
"""


class States(NamedTuple):
    """Two states and where they go. Outputs are (B, S, H, Dv) or (total, H, Dv), LSEs float32 (B, H, S) or (H, total); any strides."""

    o1: ArrayInfo
    lse1: ArrayInfo
    o2: ArrayInfo
    lse2: ArrayInfo
    out: ArrayInfo
    lse: ArrayInfo

    @property
    def outputs(self) -> tuple[ArrayInfo, ArrayInfo, ArrayInfo]:
        """Those that are no LSE."""
        return self.o1, self.o2, self.out


class MergeStatesParams(KernelParams):
    """``fa::MergeStatesParams``."""

    SLOTS = ("o1", "o2", "lse1", "lse2", "o", "lse")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in SLOTS),
        *((f"{name}_stride", StrideParams) for name in ("o1", "o2", "o", "lse1", "lse2", "lse")),
        *((name, ctypes.c_int64) for name in ("o1_col", "o2_col", "o_col", "rows")),
        *((name, ctypes.c_int32) for name in ("seqlen", "heads", "cols", "lanes")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStatesSpec(SimpleKernelSpec):
    """Some lanes of a warp merge a row, 16 bytes at a time. Any architecture; f16, bf16 and float32."""

    HEADER: ClassVar[str] = "merge_states"
    THREADS: ClassVar[int] = 256

    dtype: DType
    aligned: bool = False  # every address and stride, and the size of a row, is a multiple of 16 bytes, and columns are neighbours

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """The exponential of a weight, and 16 bytes of a row where they are aligned."""
        return ("MUFU.EX2", "LDG.E.128") if self.aligned else ("MUFU.EX2",)

    def body(self) -> str:
        """One include and one entry."""
        return _SOURCE.format(threads=self.THREADS, name=self.kernel_name, dtype=self.dtype.name, aligned=literal(self.aligned))

    def work_tiles(self, problem: States) -> int:  # type: ignore[override]
        """A block for as many rows as it has groups of lanes."""
        return -(-prod(problem.lse.shape) * self._lanes(problem) // self.THREADS)

    def pack(self, problem: States, out: ArrayInfo) -> MergeStatesParams:  # type: ignore[override]
        """``fa::MergeStatesParams`` of two states without addresses."""
        *_, seqlen, heads, cols = out.shape
        return MergeStatesParams(
            **{f"{name}_stride": _tokens_and_heads(x) for name, x in zip(("o1", "o2", "o"), problem.outputs, strict=True)},
            **{f"{name}_stride": _lse_strides(x) for name, x in (("lse1", problem.lse1), ("lse2", problem.lse2), ("lse", problem.lse))},
            **{f"{name}_col": x.strides[-1] for name, x in zip(("o1", "o2", "o"), problem.outputs, strict=True)},
            rows=prod(problem.lse.shape),
            seqlen=seqlen,
            heads=heads,
            cols=cols,
            lanes=self._lanes(problem),
        )

    def _lanes(self, problem: States) -> int:
        """As many as there are 16 bytes in a row, rounded up to a power of two; a warp at most."""
        chunks = max(1, -(-problem.out.shape[-1] * self.dtype.itemsize // VECTOR_BYTES))
        return int(min(_WARP, 1 << (chunks - 1).bit_length()))


def _tokens_and_heads(info: ArrayInfo) -> StrideParams:
    lead = (0,) if len(info.shape) == 3 else info.strides[:1]
    return StrideParams(*lead, *info.strides[-3:-1])


def _lse_strides(info: ArrayInfo) -> StrideParams:
    lead = (0,) if len(info.shape) == 2 else info.strides[:1]
    return StrideParams(*lead, info.strides[-1], info.strides[-2])
