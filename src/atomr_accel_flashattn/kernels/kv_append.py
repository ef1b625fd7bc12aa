"""New tokens into a cache of K and V, rotated on the way: ``cuda/kernels/kv_append.cuh``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

from ..problem import ArrayInfo, AttentionProblem, Strides
from ..types import DType, ScaleUnit, SmArch
from .forward import descale_strides
from .params import KernelParams, StrideParams
from .spec import SimpleKernelSpec, literal

__all__ = ["Fp8AppendParams", "Fp8AppendSpec", "KvAppendParams", "KvAppendSpec", "rotated_bytes", "rotated_strides"]

_CHUNK: Final = 8  # columns of a thread

_SOURCE = """\
#include "kernels/kv_append.cuh"

extern "C" __global__ void __launch_bounds__({threads}) {name}(const __grid_constant__ fa::KvAppendParams p) {{
  fa::kv_append<fa::DType::{dtype}, {threads}, {flags}>(p);
}}
"""

_FP8_SOURCE = """\
#include "kernels/fp8_append.cuh"

extern "C" __global__ void __launch_bounds__({threads}) {name}(const __grid_constant__ fa::Fp8AppendParams p) {{
  fa::fp8_append<{types}, {threads}, {flags}>(p);
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


class Fp8AppendParams(KernelParams):
    """``fa::Fp8AppendParams``. Its addresses run on into those of ``fa::KvAppendParams``."""

    SLOTS = ("k_descale", "v_descale", "left_pad", *KvAppendParams.SLOTS)
    _fields_ = (
        *((name, ctypes.c_void_p) for name in SLOTS[:3]),
        ("append", KvAppendParams),
        *((f"{name}_stride", StrideParams) for name in SLOTS[:2]),
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

    @classmethod
    def for_cache(cls, arch: SmArch, problem: AttentionProblem) -> KvAppendSpec:
        """The kernel that writes the new tokens of a call, and turns its q."""
        cache = problem.cache
        assert cache is not None and cache.new is not None and problem.q.dtype is not None  # noqa: S101, PT018 - callers have looked
        rotary, dtype = cache.new.rotary, cache.new.v.dtype
        assert dtype is not None  # noqa: S101 - requests have checked it
        flags = {
            "paged": cache.paged,
            "interleaved": rotary is not None and rotary.interleaved,
            "wide_rotary": rotary is not None and rotary.cos.dtype is DType.F32,
        }
        if problem.descales is None:
            return KvAppendSpec(arch=arch, dtype=dtype, **flags)
        quantises = not dtype.is_fp8
        tokens = {
            f"{name}_token_scales": quantises and each is not None and each.unit is ScaleUnit.TOKEN
            for name, each in (("k", problem.descales.k), ("v", problem.descales.v))
        }
        k, v = problem.k.dtype, problem.v.dtype
        assert k is not None and v is not None  # noqa: S101, PT018 - requests have checked it
        return Fp8AppendSpec(arch=arch, dtype=dtype if quantises else DType.F8E4M3, k_dtype=k, v_dtype=v, **flags, **tokens)

    def pack_call(self, problem: AttentionProblem, out: ArrayInfo) -> KernelParams:
        """The parameters of one call without addresses."""
        return self.pack(problem, out)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8AppendSpec(KvAppendSpec):
    """A warp writes a row of K or V, or turns one of Q. ``dtype`` is that of new K and V; e4m3 says that they are fp8, as the cache."""

    HEADER: ClassVar[str] = "fp8_append"

    k_dtype: DType
    v_dtype: DType
    k_token_scales: bool = False  # made here, of each token and head
    v_token_scales: bool = False

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """The conversion to 8 bits, or the copy of bytes."""
        return ("STG.E.U8",) if self.dtype.is_fp8 else ("F2FP", "STG.E.U8")

    def body(self) -> str:
        """One include and one entry."""
        types = ", ".join(f"fa::DType::{dtype.name}" for dtype in (self.dtype, self.k_dtype, self.v_dtype))
        given = (self.paged, self.interleaved, self.wide_rotary, self.k_token_scales, self.v_token_scales)
        flags = ", ".join(literal(flag) for flag in given)
        return _FP8_SOURCE.format(threads=self.THREADS, name=self.kernel_name, types=types, flags=flags)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """A block for as many rows as it has warps."""
        cache = problem.cache
        if cache is None or cache.new is None:
            return 0
        rows = 2 * problem.batch * cache.new.longest * problem.heads_kv
        if cache.new.rotary is not None:
            rows += problem.batch * problem.seqlen_q * problem.heads
        return -(-rows // (self.THREADS // 32))

    def pack_call(self, problem: AttentionProblem, out: ArrayInfo) -> Fp8AppendParams:
        """``fa::Fp8AppendParams`` of one call without addresses."""
        strides = descale_strides(problem)
        strides.pop("q_descale_stride", None)  # q is not quantised
        return Fp8AppendParams(append=self.pack(problem, out), **strides)


def rotated_strides(problem: AttentionProblem) -> Strides:
    """Of q after its rotation: row-major."""
    row = problem.heads * problem.head_dim
    return Strides(0 if problem.is_varlen else problem.seqlen_q * row, row, problem.head_dim)


def rotated_bytes(problem: AttentionProblem) -> int:
    """Size of that."""
    assert problem.q.dtype is not None  # noqa: S101 - requests have checked it
    return prod(problem.q.shape) * problem.q.dtype.itemsize
