"""What the three kernels of a backward share: their spec and ``fa::BwdParams``."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Final

from ..problem import ArrayInfo, AttentionProblem, BackwardProblem, GradientArrays
from .attention import AttentionSpec
from .forward import FwdParams, forward_params
from .params import KernelParams, StrideParams
from .spec import Family

__all__ = ["CONVERT_ROWS", "BackwardSpec", "BwdParams", "convert_blocks", "kv_part_bytes", "workspace_of"]

_SUM_TILE_ROWS: Final = 16  # SumTile in attention/dq_sum.cuh
_DETERMINISTIC_PAIRS: Final = 64
_L2_BYTES: Final = 32 << 20
CONVERT_ROWS: Final = 64  # of dQ, or of dK and dV, that a block of bwd_postprocess converts


class BwdParams(KernelParams):
    """``fa::BwdParams``: what all three kernels are told at run time. Its addresses run on into those of ``fa::FwdParams``."""

    _OWN = ("dout", "dlse", "statistics", "dq_sum", "turns", "dq", "dk", "dv", "dsink")
    SLOTS = (*_OWN, *FwdParams.SLOTS)
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _OWN),
        ("fwd", FwdParams),
        *((name, StrideParams) for name in ("dout_stride", "dq_stride", "dk_stride", "dv_stride")),
        *((name, ctypes.c_int64) for name in ("tokens_q", "tokens_k", "dq_tile_rows")),
        *((name, ctypes.c_int32) for name in ("heads_kv", "blocks_n", "section_pairs", "convert_blocks", "sink_blocks")),
        ("softmax_scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("kv_parts", "kv_tile_rows")),
        *((name, ctypes.c_int32) for name in ("head_splits", "heads_per_split")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardSpec(AttentionSpec):
    """A kernel of the backward."""

    FAMILY: ClassVar[Family] = Family.FA2
    PARAMS: ClassVar[str] = "BwdParams"

    deterministic: bool = False  # additions to dQ in one order
    head_split: bool = False  # blocks share keys, each with some query heads of the group

    def config(self) -> dict[str, Any]:
        """Members of ``fa::Config``, in their order."""
        return {**AttentionSpec.config(self), "deterministic": self.deterministic, "head_split": self.head_split}

    @abstractmethod
    def work_tiles(self, problem: AttentionProblem) -> int:
        """Blocks of a launch."""

    def pack(self, problem: BackwardProblem, gradients: GradientArrays, splits: int = 1) -> BwdParams:  # type: ignore[override]
        """``fa::BwdParams`` of one call without addresses, of a problem that has o and LSE; ``gradients`` holds all three.

        ``splits``: blocks that share a tile of keys, each with equally many query heads of its group.
        """
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
            dq_tile_rows=_dq_tile_rows(known),
            heads_kv=known.heads_kv,
            blocks_n=-(-known.seqlen_k // self.tile.block_n),
            section_pairs=_section_pairs(known, splits, deterministic=self.deterministic, blocks=self.tile.min_blocks),
            convert_blocks=convert_blocks(known),
            sink_blocks=0 if known.learned_sink is None else known.heads,
            softmax_scale=known.softmax_scale,
            kv_parts=_dq_sum_bytes(known) // 4,
            kv_tile_rows=_kv_tile_rows(known),
            head_splits=splits,
            heads_per_split=known.heads // (known.heads_kv * splits),
        )


def convert_blocks(problem: AttentionProblem) -> int:
    """Blocks of bwd_postprocess that convert dQ."""
    return -(-problem.seqlen_q // CONVERT_ROWS) * problem.batch * problem.heads


def workspace_of(problem: AttentionProblem, splits: int, *, deterministic: bool) -> dict[str, int]:
    """Bytes of what the three kernels share, by slot, in the order of slots. Behind the sum of dQ lie ``splits`` parts of dK and dV."""
    return {
        "statistics": 8 * (1 + prod(problem.lse_shape)),
        "dq_sum": _dq_sum_bytes(problem) + splits * kv_part_bytes(problem),
        "turns": 4 * (1 + _dq_tile_rows(problem) * _sums(problem, problem.heads)) if deterministic else 0,
    }


def kv_part_bytes(problem: AttentionProblem) -> int:
    """Of dK and dV of all KV heads in float32: what a split over query heads takes, for each of its parts."""
    rows = _kv_tile_rows(problem) * _sums(problem, problem.heads_kv) * _SUM_TILE_ROWS
    return 4 * rows * (problem.head_dim + problem.v_head_dim)


def _dq_sum_bytes(problem: AttentionProblem) -> int:
    return 4 * _dq_tile_rows(problem) * _sums(problem, problem.heads) * _SUM_TILE_ROWS * problem.head_dim


def _sums(problem: AttentionProblem, heads: int) -> int:
    """How many (sequence, head) pairs have a sum of their own; packed sequences share one."""
    return heads * (1 if problem.is_varlen else problem.batch)


def _dq_tile_rows(problem: AttentionProblem) -> int:
    """Rows of tiles in the sum of dQ of a head, of one sequence or of all packed ones: each begins with a new tile."""
    return _tile_rows(problem, problem.q, problem.seqlen_q)


def _kv_tile_rows(problem: AttentionProblem) -> int:
    """The same of a part of dK and dV, of a KV head."""
    return _tile_rows(problem, problem.k, problem.seqlen_k)


def _tile_rows(problem: AttentionProblem, array: ArrayInfo, longest: int) -> int:
    if problem.is_varlen:
        return array.shape[0] // _SUM_TILE_ROWS + problem.batch
    return -(-longest // _SUM_TILE_ROWS)


def _section_pairs(problem: AttentionProblem, splits: int, *, deterministic: bool, blocks: int) -> int:
    """How many (sequence, KV head) pairs run side by side, so that the longest blocks of keys come first: as many as L2 holds.

    Without a bound, or with two, blocks are equally long, and one pair after the other reads the least of Q and dO at a time. Deterministic
    blocks of a pair wait for each other, so that many pairs shall have few blocks each at a time; ``blocks``: of an SM. ``splits`` make as
    many pairs of one, and at least half of them run side by side: the longest block of a last section of few would end after all others.
    For the same reason two pairs do where L2 holds less than two: what they read twice costs less than that end.
    """
    pairs = problem.batch * problem.heads_kv * splits
    if deterministic:
        return max(1, min(pairs, blocks * _DETERMINISTIC_PAIRS))
    if (problem.band.right is None) == (problem.band.left is None):
        return 1
    group = problem.heads // (problem.heads_kv * splits)
    bytes_of_pair = max(1, problem.seqlen_q * group * (6 * problem.head_dim + 2 * problem.v_head_dim))  # Q, the sum of dQ, dO
    least = max(1, min(pairs, 2)) if splits == 1 else -(-pairs // 2)
    return max(least, min(pairs, _L2_BYTES // bytes_of_pair))


def _strides_of(info: ArrayInfo) -> StrideParams:
    """Of an array of tokens, heads and columns, dense or packed."""
    return StrideParams(*((0,) if len(info.shape) == 3 else ()), *info.strides[:-1])
