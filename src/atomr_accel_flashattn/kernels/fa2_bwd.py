"""The backward kernel of the mma.sync family: ``cuda/kernels/fa2_bwd.cuh``, FlashAttention-2 (arXiv 2307.08691), Algorithm 2."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

from ..problem import AttentionProblem
from ..types import SmArch
from .backward import BackwardSpec
from .bwd_postprocess import BackwardPostprocessSpec
from .bwd_preprocess import BackwardPreprocessSpec

__all__ = ["Fa2BackwardSpec"]

_NAMES_IT_REDG: Final = frozenset({SmArch.SM_90, SmArch.SM_100, SmArch.SM_120})  # ``red`` of global memory, in SASS


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa2BackwardSpec(BackwardSpec):
    """dK and dV of a block of keys, and its part of dQ. Any architecture, any alignment."""

    HEADER: ClassVar[str] = "fa2_bwd"
    ENTRY: ClassVar[str] = "fa2_backward"

    @property
    def shared_memory(self) -> int:
        """K, V, Q, dO, P and dS."""
        tile, size = self.tile, self.dtype.itemsize
        return ((tile.block_m + tile.block_n) * (self.head_dim + self.v_head_dim) + 2 * tile.block_m * tile.block_n) * size

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """mma.sync, ldmatrix with and without transposition, atomics without an answer, and cp.async where every address is aligned."""
        red = "REDG" if self.arch in _NAMES_IT_REDG else "RED"
        return ("HMMA", "LDSM", red, *(("LDGSTS",) if self.aligned else ()))

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for block_n keys of a KV head and sequence."""
        return -(-problem.seqlen_k // self.tile.block_n) * problem.batch * problem.heads_kv

    def steps(self) -> tuple[BackwardPreprocessSpec, Fa2BackwardSpec, BackwardPostprocessSpec]:
        """Delta and zeros before it, and the conversion of dQ behind it."""
        return BackwardPreprocessSpec.of(self), self, BackwardPostprocessSpec.of(self)

    def workspace(self, problem: AttentionProblem) -> dict[str, int]:
        """Bytes of the arrays that the three kernels share, by their slots; each begins at a multiple of 256 bytes, and none is cleared."""
        return {"delta": 4 * prod(problem.lse_shape), "dq_sum": 4 * prod(problem.q.shape)}
