"""What the three kernels of a backward share: their spec and ``fa::BwdParams``."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

from ..problem import ArrayInfo, AttentionProblem, BackwardProblem, GradientArrays
from .attention import AttentionSpec
from .forward import FwdParams, forward_params
from .params import KernelParams, StrideParams
from .spec import Family

__all__ = ["CONVERT_THREADS", "BackwardSpec", "BwdParams"]

CONVERT_THREADS: Final = 256  # of a block of bwd_postprocess; each converts eight columns


class BwdParams(KernelParams):
    """``fa::BwdParams``: what all three kernels are told at run time. Its addresses run on into those of ``fa::FwdParams``."""

    _OWN = ("dout", "dlse", "delta", "dq_sum", "dq", "dk", "dv", "dsink")
    SLOTS = (*_OWN, *FwdParams.SLOTS)
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _OWN),
        ("fwd", FwdParams),
        *((name, StrideParams) for name in ("dout_stride", "dq_stride", "dk_stride", "dv_stride")),
        *((name, ctypes.c_int64) for name in ("tokens_q", "tokens_k")),
        *((name, ctypes.c_int32) for name in ("heads_kv", "blocks_n", "convert_blocks", "sink_blocks")),
        ("softmax_scale", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardSpec(AttentionSpec):
    """A kernel of the backward."""

    FAMILY: ClassVar[Family] = Family.FA2
    PARAMS: ClassVar[str] = "BwdParams"

    deterministic: bool = False  # additions to dQ in one order

    @abstractmethod
    def work_tiles(self, problem: AttentionProblem) -> int:
        """Blocks of a launch."""

    def pack(self, problem: BackwardProblem, gradients: GradientArrays) -> BwdParams:  # type: ignore[override]
        """``fa::BwdParams`` of one call without addresses, of a problem that has o and LSE; ``gradients`` holds all three."""
        known, out = problem.forward, problem.out
        if out is None or None in gradients:
            raise ValueError("a backward without o, or without an array for each gradient, cannot be packed")
        dq, dk, dv = (_strides_of(info) for info in gradients if info is not None)
        return BwdParams(
            fwd=forward_params(known, out, blocks_m=-(-known.seqlen_q // self.tile.block_m)),
            dout_stride=StrideParams() if problem.dout is None else _strides_of(problem.dout),
            dq_stride=dq,
            dk_stride=dk,
            dv_stride=dv,
            tokens_q=prod(known.q.shape[:-2]),
            tokens_k=prod(known.k.shape[:-2]),
            heads_kv=known.heads_kv,
            blocks_n=-(-known.seqlen_k // self.tile.block_n),
            convert_blocks=-(-prod(known.q.shape) // (8 * CONVERT_THREADS)),
            sink_blocks=0 if known.learned_sink is None else known.heads,
            softmax_scale=known.softmax_scale,
        )


def _strides_of(info: ArrayInfo) -> StrideParams:
    """Of an array of tokens, heads and columns, dense or packed."""
    return StrideParams(*((0,) if len(info.shape) == 3 else ()), *info.strides[:-1])
