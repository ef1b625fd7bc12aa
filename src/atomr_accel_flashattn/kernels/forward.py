"""What the forward kernels of both families share: the fields of their specs, ``fa::FwdParams``, and how work becomes a grid."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from math import prod
from typing import Final

from ..limits import UNBOUNDED
from ..problem import ArrayInfo, AttentionProblem, Band
from .attention import AttentionSpec
from .params import KernelParams, StrideParams

__all__ = ["DESCALE_SLOTS", "ForwardSpec", "FwdParams", "band_params", "descale_strides", "forward_params"]

DESCALE_SLOTS: Final = ("q_descale", "k_descale", "v_descale")  # addresses of the factors of fp8 tensors

_L2_BYTES: Final = 32 << 20  # K and V of the heads that run side by side should stay in L2
_SECTION_KV_HEADS: Final = 16  # 4 and 8 are 3 to 5 % slower at 2k, 32 no faster
_TANH_LIMIT, _TANH_CUBIC, _TANH_QUINTIC = 0.4, -0.332795, 0.12215362  # tanh x = x + c x^3 + q x^5: relative error below 8e-6
_POLYNOMIAL_SCORE: Final = 48.0  # in log2 units: what the polynomial may cost an exponent stays below 4e-4
_FLOAT32_LARGEST_POWER: Final = 2.0**127


class FwdParams(KernelParams):
    """``fa::FwdParams``: everything that a forward kernel is told at run time."""

    SLOTS = ("q", "k", "v", "o", "lse", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "learned_sink", "rng")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in SLOTS),
        *((name, StrideParams) for name in ("q_stride", "k_stride", "v_stride", "o_stride")),
        *((name, ctypes.c_int64) for name in ("lse_batch_stride", "lse_head_stride", "alibi_batch_stride")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "heads_per_kv", "seqlen_q", "seqlen_k", "head_dim", "v_head_dim")),
        *((name, ctypes.c_int32) for name in ("window_left", "window_right", "sink_tokens", "blocks_m", "section_heads", "work_heads")),
        ("packed_shift", ctypes.c_int32),
        ("dropout_threshold", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("dropout_rescale", "scale_log2", "softcap_scale", "softcap_log2")),
        *((name, ctypes.c_float) for name in ("softcap_cubic", "softcap_quintic", "softcap_limit")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSpec(AttentionSpec):
    """A forward kernel."""

    def shared_tiles(self) -> tuple[int, int]:
        """Bytes of shared memory that hold Q, and all stages of K and V."""
        tile, row = self.tile, self.head_dim * self.k_type.itemsize + self.v_head_dim * self.v_type.itemsize
        return tile.block_m * self.head_dim * self.dtype.itemsize, tile.stages * tile.block_n * row

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for block_m rows of one head and sequence, or of all heads that share K and V where they are packed."""
        if not prod(problem.out_shape):
            return 0
        return self._row_blocks(problem) * problem.batch * (problem.heads // self.packed_heads(problem))

    def packed_heads(self, problem: AttentionProblem) -> int:
        """Query heads whose rows a tile mixes."""
        return problem.heads // problem.heads_kv if self.pack_gqa else 1

    def _row_blocks(self, problem: AttentionProblem) -> int:
        """One at least, also where no sequence has a row: there may be rows of q that none owns."""
        return -(-max(1, problem.seqlen_q) * self.packed_heads(problem) // self.tile.block_m)

    def pack_forward(self, problem: AttentionProblem, out: ArrayInfo) -> FwdParams:
        """``fa::FwdParams`` of one call without addresses; ``out``: where o goes, shaped like ``problem.out_shape``, any strides.

        An LSE is a contiguous float32 array of ``problem.lse_shape``; its address is 0 when nobody asked for it.
        """
        group = self.packed_heads(problem)
        return forward_params(problem, out, blocks_m=self._row_blocks(problem), packed_heads=group)


def forward_params(problem: AttentionProblem, out: ArrayInfo, *, blocks_m: int, packed_heads: int = 1) -> FwdParams:
    """``fa::FwdParams`` of one call without addresses, with so many tiles of rows, of so many heads at once."""
    softcap = problem.softcap
    slopes = problem.alibi_slopes
    lse_heads, lse_rows = problem.lse_shape[-2:]
    scale_log2 = problem.softmax_scale * math.log2(math.e)
    softcap_scale = problem.softmax_scale / softcap if softcap else 0.0
    return FwdParams(
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
        **band_params(problem.band),
        blocks_m=blocks_m,
        section_heads=_section_heads(problem, packed_heads),
        work_heads=problem.heads // packed_heads,
        packed_shift=packed_heads.bit_length() - 1,
        dropout_threshold=problem.dropout.keep_threshold if problem.dropout else 256,
        dropout_rescale=problem.dropout.rescale if problem.dropout else 1.0,
        scale_log2=scale_log2,
        softcap_scale=softcap_scale,
        softcap_log2=softcap * math.log2(math.e),
        **_softcap_polynomial(scale_log2, softcap_scale),
    )


def descale_strides(problem: AttentionProblem) -> dict[str, StrideParams]:
    """The strides of the factors of q, k and v, by the fields of parameters; those that there are."""
    given = problem.descales or (None, None, None)
    return {f"{name}_stride": StrideParams(*each.strides) for name, each in zip(DESCALE_SLOTS, given, strict=True) if each is not None}


def band_params(band: Band) -> dict[str, int]:
    """The fields of ``fa::FwdParams`` that are a mask."""
    left, right = (UNBOUNDED if side is None else min(side, UNBOUNDED) for side in (band.left, band.right))
    return {"window_left": left, "window_right": right, "sink_tokens": min(band.sink_tokens, UNBOUNDED)}


def _softcap_polynomial(scale_log2: float, softcap_scale: float) -> dict[str, float]:
    """Up to which raw score softcap may be a polynomial, and its factors beside ``scale_log2``; the tanh is that of ``softcap_scale`` * s.

    The limit is below every score where the factors are no numbers of float32.
    """
    square = softcap_scale * softcap_scale
    cubic, quintic = scale_log2 * _TANH_CUBIC * square, scale_log2 * _TANH_QUINTIC * square * square
    if not 0 < quintic < _FLOAT32_LARGEST_POWER:
        return {"softcap_limit": -1.0}
    limit = min(_TANH_LIMIT / softcap_scale, _POLYNOMIAL_SCORE / scale_log2)
    return {"softcap_cubic": cubic, "softcap_quintic": quintic, "softcap_limit": limit}


def _section_heads(problem: AttentionProblem, packed: int) -> int:
    """How many (sequence, head) pairs run side by side (an L2 swizzle), whole groups of one KV head; heads are groups of ``packed`` ones.

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
