"""The backward kernel of the mma.sync family: ``cuda/kernels/fa2_bwd.cuh``, FlashAttention-2 (arXiv 2307.08691), Algorithm 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Final

from ..problem import AttentionProblem
from ..types import SmArch
from .backward import BackwardSpec
from .bwd_postprocess import BackwardPostprocessSpec
from .bwd_preprocess import BackwardPreprocessSpec

__all__ = ["Fa2BackwardSpec"]

_OTHER_REGISTERS: Final = 31  # beside accumulators and scores
_COLS_OF_DQ: Final = 64  # at a time; 32 where the width is no multiple
_NAMES_IT_REDG: Final = frozenset({SmArch.SM_90, SmArch.SM_100, SmArch.SM_120})  # ``red`` of global memory, in SASS


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa2BackwardSpec(BackwardSpec):
    """dK and dV of a block of keys, and its part of dQ. Any architecture, any alignment."""

    HEADER: ClassVar[str] = "fa2_bwd"
    ENTRY: ClassVar[str] = "fa2_backward"
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"block_m": (32, 64, 128), "block_n": (32, 64, 128), "warps": (4, 8)})

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

    def misfit(self) -> str:
        """Warps share the 16 x 16 blocks of each product evenly (cuda/tile/product.cuh)."""
        tile, dq_cols = self.tile, _COLS_OF_DQ if self.head_dim % _COLS_OF_DQ == 0 else 32
        products = ((tile.block_m, tile.block_n), (tile.block_n, self.head_dim), (tile.block_n, self.v_head_dim), (tile.block_m, dq_cols))
        for rows, cols in products:
            if not _share_evenly(rows, cols, tile.warps):
                return f"warps: got {tile.warps}; allowed are those that share {rows} x {cols} numbers evenly, in blocks of 16 x 16"
        return ""

    def registers_suffice(self) -> bool:
        """DK, dV, S and dP in float32."""
        tile = self.tile
        held = (tile.block_n * (self.head_dim + self.v_head_dim) + 2 * tile.block_m * tile.block_n) // tile.threads
        return self.registers_hold(held + _OTHER_REGISTERS)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for block_n keys of a KV head and sequence."""
        return -(-problem.seqlen_k // self.tile.block_n) * problem.batch * problem.heads_kv

    def steps(self) -> tuple[BackwardPreprocessSpec, Fa2BackwardSpec, BackwardPostprocessSpec]:
        """Delta and zeros before it, and the conversion of dQ behind it."""
        return BackwardPreprocessSpec.of(self), self, BackwardPostprocessSpec.of(self)

    def workspace(self, problem: AttentionProblem) -> dict[str, int]:
        """Bytes of the arrays that the three kernels share, by their slots; each begins at a multiple of 256 bytes, and none is cleared."""
        return {"delta": 4 * prod(problem.lse_shape), "dq_sum": 4 * prod(problem.q.shape)}


def _share_evenly(rows: int, cols: int, warps: int) -> bool:
    """Whether warps can cut these numbers into equal parts of whole blocks.

    Into as many bands of 16 rows as there are, then into columns.
    """
    down = min(warps, rows // 16)
    return rows % 16 == 0 and down > 0 and warps % down == 0 and rows % (16 * down) == 0 and cols % (16 * (warps // down)) == 0
