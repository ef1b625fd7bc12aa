"""New tokens into a cache of K and V, rotated on the way: ``cuda/kernels/kv_append.cuh``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

from ..problem import ArrayInfo, AttentionProblem, Strides
from ..types import DType
from .params import KernelParams, StrideParams
from .spec import SimpleKernelSpec, literal

__all__ = ["KvAppendParams", "KvAppendSpec", "rotated_bytes", "rotated_strides"]

_CHUNK: Final = 8  # columns of a thread

_SOURCE = """\
#include "kernels/kv_append.cuh"

extern "C" __global__ void __launch_bounds__({threads}) {name}(const __grid_constant__ fa::KvAppendParams p) {{
  fa::kv_append<fa::DType::{dtype}, {threads}, {flags}>(p);
}}
"""


class KvAppendParams(KernelParams):
    """``fa::KvAppendParams``."""

    SLOTS = (
        *("new_k", "new_v", "q", "cos", "sin", "blocks", "cache_lengths", "cu_seqlens_k", "cu_seqlens_new", "cu_seqlens_q"),
        *("k", "v", "rotated_q", "error"),
    )
    _fields_ = (
        *((name, ctypes.c_void_p) for name in SLOTS),
        *((f"{name}_stride", StrideParams) for name in ("new_k", "new_v", "q", "k", "v", "rotated_q")),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "heads_kv", "seqlen_q", "seqlen_new", "head_dim", "v_head_dim")),
        *((name, ctypes.c_int32) for name in ("block_size", "num_blocks", "capacity", "rotary_dim", "rotary_rows", "q_advances")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvAppendSpec(SimpleKernelSpec):
    """A thread copies eight columns of a row of K, V or Q. Any architecture, any alignment."""

    HEADER: ClassVar[str] = "kv_append"
    THREADS: ClassVar[int] = 256

    dtype: DType
    paged: bool = False
    interleaved: bool = False
    wide_rotary: bool = False  # cos and sin are float32

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """The conversion back to 16 bits."""
        return ("F2FP",)

    def body(self) -> str:
        """One include and one entry."""
        flags = ", ".join(literal(flag) for flag in (self.paged, self.interleaved, self.wide_rotary))
        return _SOURCE.format(threads=self.THREADS, name=self.kernel_name, dtype=self.dtype.name, flags=flags)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """A block for as many chunks of rows as it has threads: of new K and V, and of Q where it is rotated."""
        cache = problem.cache
        if cache is None or cache.new is None:
            return 0
        k_chunks, v_chunks = -(-problem.head_dim // _CHUNK), -(-problem.v_head_dim // _CHUNK)
        work = problem.batch * cache.new.longest * problem.heads_kv * (k_chunks + v_chunks)
        if cache.new.rotary is not None:
            work += problem.batch * problem.seqlen_q * problem.heads * k_chunks
        return -(-work // self.THREADS)

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> KvAppendParams:  # noqa: ARG002 - o has no part in it
        """``fa::KvAppendParams`` of one call without addresses. Rotated q is row-major."""
        cache = problem.cache
        if cache is None or cache.new is None:
            raise ValueError("a problem without new tokens appends none")
        new = cache.new
        rotary = new.rotary
        return KvAppendParams(
            new_k_stride=StrideParams(*new.k_strides),
            new_v_stride=StrideParams(*new.v_strides),
            q_stride=StrideParams(*problem.q_strides),
            k_stride=StrideParams(*problem.k_strides),
            v_stride=StrideParams(*problem.v_strides),
            rotated_q_stride=StrideParams(*rotated_strides(problem)),
            table_stride=cache.blocks.strides[0] if cache.blocks is not None and cache.paged else 0,
            batch=problem.batch,
            heads=problem.heads,
            heads_kv=problem.heads_kv,
            seqlen_q=problem.seqlen_q,
            seqlen_new=new.longest,
            head_dim=problem.head_dim,
            v_head_dim=problem.v_head_dim,
            block_size=cache.block_size,
            num_blocks=cache.num_blocks,
            capacity=cache.capacity,
            rotary_dim=0 if rotary is None else 2 * rotary.cos.shape[1],
            rotary_rows=0 if rotary is None else rotary.cos.shape[0],
            q_advances=int(problem.band.left is not None or problem.band.right is not None),
        )


def rotated_strides(problem: AttentionProblem) -> Strides:
    """Of q after its rotation: row-major."""
    row = problem.heads * problem.head_dim
    return Strides(0 if problem.is_varlen else problem.seqlen_q * row, row, problem.head_dim)


def rotated_bytes(problem: AttentionProblem) -> int:
    """Size of that."""
    assert problem.q.dtype is not None  # noqa: S101 - requests have checked it
    return prod(problem.q.shape) * problem.q.dtype.itemsize
