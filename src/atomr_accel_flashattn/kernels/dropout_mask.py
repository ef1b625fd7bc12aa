"""The kernel that writes the dropout pattern: ``cuda/kernels/dropout_mask.cuh`` (docs/semantics.md, Dropout)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from ..problem import ArrayInfo, AttentionProblem
from .params import KernelParams
from .spec import SimpleKernelSpec, literal

__all__ = ["DropoutMaskParams", "DropoutMaskSpec"]

_ROWS, _KEYS = 64, 32  # patch of one block

_SOURCE = """\
#include "kernels/dropout_mask.cuh"

extern "C" __global__ void __launch_bounds__({threads}) {name}(const __grid_constant__ fa::DropoutMaskParams p) {{
  fa::dropout_mask<{varlen}>(p);
}}
"""


class DropoutMaskParams(KernelParams):
    """``fa::DropoutMaskParams``."""

    SLOTS = ("keep", "rng", "cu_seqlens_q", "cu_seqlens_k")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in SLOTS),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "seqlen_q", "seqlen_k", "dropout_threshold")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutMaskSpec(SimpleKernelSpec):
    """The pattern depends on positions alone, so there is one kernel per architecture, and one for packed sequences."""

    HEADER: ClassVar[str] = "dropout_mask"
    THREADS: ClassVar[int] = 128

    varlen: bool = False

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """The wide products of Philox."""
        return ("IMAD.WIDE.U32",)

    def body(self) -> str:
        """One include and one entry."""
        return _SOURCE.format(threads=self.THREADS, name=self.kernel_name, varlen=literal(self.varlen))

    def work_tiles(self, problem: AttentionProblem) -> int:
        """A block writes 64 rows by 32 keys."""
        if not prod(problem.dropout_mask_shape):
            return 0
        return -(-problem.seqlen_q // _ROWS) * -(-problem.seqlen_k // _KEYS) * problem.batch * problem.heads

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> DropoutMaskParams:  # noqa: ARG002 - o has no part in it
        """``fa::DropoutMaskParams`` of a problem that has a dropout. The pattern is contiguous, shaped like ``dropout_mask_shape``."""
        if problem.dropout is None:
            raise ValueError("a problem without dropout has no dropout pattern")
        return DropoutMaskParams(
            batch=problem.batch,
            heads=problem.heads,
            seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k,
            dropout_threshold=problem.dropout.keep_threshold,
        )
