"""Launch parameters: the structs of cuda/attention/params.cuh as ctypes, and how a problem fills them.

Pointers come first in every struct, so that a call whose shapes were seen before writes one run of addresses and nothing else.
"""

from __future__ import annotations

import ctypes
import math
from typing import ClassVar

from ..problem import ArrayInfo, AttentionProblem
from .spec import KernelSpec

__all__ = [
    "UNBOUNDED",
    "DropoutMaskParams",
    "Fa3FwdParams",
    "FwdParams",
    "KernelParams",
    "StrideParams",
    "TensorMapParams",
    "dropout_mask_grid",
    "forward_grid",
    "forward_pointers",
    "pack_dropout_mask",
    "pack_fa3_forward",
    "pack_forward",
]

UNBOUNDED = 1 << 30  # window_left, window_right without a bound: kUnbounded of params.cuh

_MASK_ROWS, _MASK_KEYS = 64, 32  # patch of one block of the dropout mask kernel
_L2_BYTES = 32 << 20  # K and V of the heads that run side by side should stay in L2
_TANH_LIMIT, _TANH_CUBIC, _TANH_QUINTIC = 0.4, -0.332795, 0.12215362  # tanh x = x + c x^3 + q x^5: relative error below 8e-6
_SERIES_SCORE = 48.0  # in log2 units: what that may cost an exponent stays below 4e-4
_FLOAT32_LARGEST_POWER = 2.0**127
_SECTION_KV_HEADS = 16  # 4 and 8 are 3 to 5 % slower at 2k, 32 no faster


class KernelParams(ctypes.Structure):
    """Base of the parameter structs. ``POINTERS``: how many 8-byte addresses they start with."""

    POINTERS: ClassVar[int]

    def addresses(self) -> tuple[int, ...]:
        """Those addresses, 0 for none."""
        return tuple((ctypes.c_uint64 * self.POINTERS).from_buffer(self))


class StrideParams(ctypes.Structure):
    """``fa::Strides``, in elements."""

    _fields_ = (("batch", ctypes.c_int64), ("row", ctypes.c_int64), ("head", ctypes.c_int64))


class FwdParams(KernelParams):
    """``fa::FwdParams``: everything that a forward kernel is told at run time."""

    POINTERS = 10
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "lse", "cu_seqlens_q", "cu_seqlens_k")),
        *((name, ctypes.c_void_p) for name in ("alibi_slopes", "learned_sink", "rng")),
        *((name, StrideParams) for name in ("q_stride", "k_stride", "v_stride", "o_stride")),
        *((name, ctypes.c_int64) for name in ("lse_batch_stride", "lse_head_stride", "alibi_batch_stride")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "heads_per_kv", "seqlen_q", "seqlen_k", "head_dim", "v_head_dim")),
        *((name, ctypes.c_int32) for name in ("window_left", "window_right", "sink_tokens", "blocks_m", "section_heads", "work_heads")),
        ("packed_shift", ctypes.c_int32),
        ("dropout_threshold", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("dropout_rescale", "scale_log2", "softcap_scale", "softcap_log2")),
        *((name, ctypes.c_float) for name in ("softcap_cubic", "softcap_quintic", "softcap_limit")),
    )


class TensorMapParams(ctypes.Structure):
    """``fa::TensorMap``: a CUtensorMap. Its 64-byte alignment inside a struct is spelled out there."""

    _fields_ = (("bytes", ctypes.c_ubyte * 128),)


class Fa3FwdParams(KernelParams):
    """``fa::Fa3FwdParams``: a forward kernel of the FA3 family."""

    POINTERS = FwdParams.POINTERS
    _fields_ = (
        ("fwd", FwdParams),
        ("counters", ctypes.c_void_p),
        ("tiles", ctypes.c_int32),
        ("_alignment", ctypes.c_ubyte * (-(ctypes.sizeof(FwdParams) + 12) % 64)),  # the maps begin at a multiple of 64
        *((name, TensorMapParams) for name in ("q_map", "k_map", "v_map")),
    )


class DropoutMaskParams(KernelParams):
    """``fa::DropoutMaskParams``: the kernel that writes the dropout pattern."""

    POINTERS = 4
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keep", "rng", "cu_seqlens_q", "cu_seqlens_k")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "seqlen_q", "seqlen_k", "dropout_threshold")),
    )


def forward_pointers(problem: AttentionProblem, out: ArrayInfo, lse_ptr: int | None) -> tuple[int, ...]:
    """The addresses of a forward call in the order of :class:`FwdParams`; 0 for what it does not have."""
    return (
        problem.q.ptr,
        problem.k.ptr,
        problem.v.ptr,
        out.ptr,
        lse_ptr or 0,
        0 if problem.cu_seqlens_q is None else problem.cu_seqlens_q.ptr,
        0 if problem.cu_seqlens_k is None else problem.cu_seqlens_k.ptr,
        0 if problem.alibi_slopes is None else problem.alibi_slopes.ptr,
        0 if problem.learned_sink is None else problem.learned_sink.ptr,
        0 if problem.dropout is None else problem.dropout.rng.ptr,
    )


def pack_forward(problem: AttentionProblem, out: ArrayInfo, lse_ptr: int | None, spec: KernelSpec) -> FwdParams:
    """Parameters of one forward call.

    Args:
        problem: checked inputs.
        out: where o goes, shaped like ``problem.out_shape``, any strides.
        lse_ptr: address of a contiguous float32 array shaped like ``problem.lse_shape``; None when nobody asked for it.
        spec: the kernel's.
    """
    band, softcap = problem.band, problem.softcap
    slopes = problem.alibi_slopes
    lse_heads, lse_rows = problem.lse_shape[-2:]
    scale_log2 = problem.softmax_scale * math.log2(math.e)
    softcap_scale = problem.softmax_scale / softcap if softcap else 0.0
    group = _packed_heads(problem, spec)
    return FwdParams(
        *forward_pointers(problem, out, lse_ptr),
        q_stride=StrideParams(*problem.q_strides),
        k_stride=StrideParams(*problem.k_strides),
        v_stride=StrideParams(*problem.v_strides),
        o_stride=StrideParams(*((0,) if problem.is_varlen else ()), *out.strides[:-1]),
        lse_batch_stride=0 if problem.is_varlen else lse_heads * lse_rows,
        lse_head_stride=lse_rows,
        alibi_batch_stride=slopes.strides[0] if slopes is not None and len(slopes.shape) == 2 else 0,
        batch=problem.batch,
        heads=problem.heads,
        heads_per_kv=problem.heads // problem.heads_kv,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        head_dim=problem.head_dim,
        v_head_dim=problem.v_head_dim,
        window_left=UNBOUNDED if band.left is None else min(band.left, UNBOUNDED),
        window_right=UNBOUNDED if band.right is None else min(band.right, UNBOUNDED),
        sink_tokens=min(band.sink_tokens, UNBOUNDED),
        blocks_m=_row_blocks(problem, spec),
        section_heads=_section_heads(problem, group),
        work_heads=problem.heads // group,
        packed_shift=group.bit_length() - 1,
        dropout_threshold=problem.dropout.keep_threshold if problem.dropout else 256,
        dropout_rescale=problem.dropout.rescale if problem.dropout else 1.0,
        scale_log2=scale_log2,
        softcap_scale=softcap_scale,
        softcap_log2=softcap * math.log2(math.e),
        **_softcap_series(scale_log2, softcap_scale),
    )


def _softcap_series(scale_log2: float, softcap_scale: float) -> dict[str, float]:
    """Up to which raw score softcap may be a polynomial, and its factors beside ``scale_log2``; the tanh is that of ``softcap_scale`` * s.

    The limit is below every score where the factors are no numbers of float32.
    """
    square = softcap_scale * softcap_scale
    cubic, quintic = scale_log2 * _TANH_CUBIC * square, scale_log2 * _TANH_QUINTIC * square * square
    if not 0 < quintic < _FLOAT32_LARGEST_POWER:
        return {"softcap_limit": -1.0}
    limit = min(_TANH_LIMIT / softcap_scale, _SERIES_SCORE / scale_log2)
    return {"softcap_cubic": cubic, "softcap_quintic": quintic, "softcap_limit": limit}


def pack_fa3_forward(forward: FwdParams, maps: tuple[bytes, bytes, bytes], counters: int, tiles: int) -> Fa3FwdParams:
    """Parameters of one forward call of the FA3 family.

    Args:
        forward: what both families are told.
        maps: encoded tensor maps of q, k and v.
        counters: address of two int32 zeros that the kernel leaves zero; used by persistent kernels.
        tiles: how many tiles there are in all.
    """
    q_map, k_map, v_map = (TensorMapParams.from_buffer_copy(each) for each in maps)
    return Fa3FwdParams(fwd=forward, counters=counters, tiles=tiles, q_map=q_map, k_map=k_map, v_map=v_map)


def forward_grid(problem: AttentionProblem, spec: KernelSpec) -> int:
    """Blocks of a forward launch, one per tile of query rows, head and sequence; 0 when there is nothing to do."""
    return _row_blocks(problem, spec) * problem.batch * (problem.heads // _packed_heads(problem, spec))


def pack_dropout_mask(problem: AttentionProblem, keep_ptr: int) -> DropoutMaskParams:
    """Parameters of the kernel that writes the dropout pattern of ``problem`` (which has a dropout) to ``keep_ptr``.

    ``keep_ptr``: address of a contiguous bool array shaped like ``problem.dropout_mask_shape``.
    """
    if problem.dropout is None:
        raise ValueError("a problem without dropout has no dropout pattern")
    return DropoutMaskParams(
        keep=keep_ptr,
        rng=problem.dropout.rng.ptr,
        cu_seqlens_q=_address(problem.cu_seqlens_q),
        cu_seqlens_k=_address(problem.cu_seqlens_k),
        batch=problem.batch,
        heads=problem.heads,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        dropout_threshold=problem.dropout.keep_threshold,
    )


def dropout_mask_grid(problem: AttentionProblem) -> int:
    """Blocks of a dropout mask launch: 64 rows by 32 keys each."""
    return -(-problem.seqlen_q // _MASK_ROWS) * -(-problem.seqlen_k // _MASK_KEYS) * problem.batch * problem.heads


def _packed_heads(problem: AttentionProblem, spec: KernelSpec) -> int:
    """Query heads whose rows a tile mixes."""
    return problem.heads // problem.heads_kv if spec.pack_gqa else 1


def _row_blocks(problem: AttentionProblem, spec: KernelSpec) -> int:
    return -(-problem.seqlen_q * _packed_heads(problem, spec) // spec.tile.block_m)


def _section_heads(problem: AttentionProblem, packed: int) -> int:
    """How many (sequence, head) pairs run side by side, whole groups of one KV head; heads are groups of ``packed`` query heads.

    Where later rows see more keys, the rows of as many heads as fit in L2 are mixed, so that the longest come first. Where all rows see
    equally many, one head after the other touches the least of K and V at a time: 3 to 10 % at d 256.
    """
    group = problem.heads // problem.heads_kv // packed
    if problem.band.right is None or problem.band.left is not None:
        return group
    element = problem.k.dtype.itemsize if problem.k.dtype else 1
    kv_bytes = max(1, problem.seqlen_k * (problem.head_dim + problem.v_head_dim) * element)
    kv_heads = max(1, min(_SECTION_KV_HEADS, _L2_BYTES // kv_bytes))
    return max(1, min(problem.batch * problem.heads // packed, kv_heads * group))


def _address(array: ArrayInfo | None) -> int:
    return 0 if array is None else array.ptr
