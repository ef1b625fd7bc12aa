"""The forward kernel of the mma.sync family: ``cuda/kernels/fa2_fwd.cuh``, FlashAttention-2 (arXiv 2307.08691)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final

from ..problem import ArrayInfo, AttentionProblem
from .forward import ForwardSpec, FwdParams
from .spec import Family

__all__ = ["Fa2ForwardSpec"]

_OTHER_REGISTERS: Final = 31  # beside accumulators and scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa2ForwardSpec(ForwardSpec):
    """Every warp loads with cp.async and multiplies with mma.sync. Any architecture, any alignment."""

    HEADER: ClassVar[str] = "fa2_fwd"
    ENTRY: ClassVar[str] = "fa2_forward"
    PARAMS: ClassVar[str] = "FwdParams"
    FAMILY: ClassVar[Family] = Family.FA2
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            "block_m": (64, 128, 192, 256),
            "block_n": (16, 32, 48, 64, 80, 96, 128),
            "warps": (4, 8),
            "stages": (1, 2, 3),
            "min_blocks": (1, 2, 3),
            "persistent": (False, True),
        }
    )

    @property
    def shared_memory(self) -> int:
        """Q, then the stages of K and V."""
        return sum(self.shared_tiles())

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """mma.sync, ldmatrix, and cp.async where every address is aligned."""
        return ("HMMA", "LDSM", "LDGSTS") if self.aligned else ("HMMA", "LDSM")

    def misfit(self) -> str:
        """Warps hold whole blocks of 16 rows."""
        tile = self.tile
        if tile.block_m % (16 * tile.warps):
            return f"block_m: got {tile.block_m}; allowed with {tile.warps} warps are multiples of {16 * tile.warps}"
        return ""

    def registers_suffice(self) -> bool:
        """O and S in float32, of the registers that ``min_blocks`` blocks leave."""
        tile = self.tile
        held = tile.block_m * (self.v_head_dim + tile.block_n) // tile.threads
        return self.registers_hold(held + _OTHER_REGISTERS)

    @property
    def launch_bounds(self) -> str:
        """Threads a block, and the blocks that an SM holds."""
        return f"{self.threads}, {self.tile.min_blocks}"

    def grid(self, tiles: int, multiprocessors: int, blocks: int | None = None) -> int:
        """A block for each tile; persistent blocks as many as asked for, or as all SMs hold."""
        if not self.tile.persistent:
            return tiles
        return min(tiles, blocks or multiprocessors * self.tile.min_blocks)

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> FwdParams:
        """``fa::FwdParams``."""
        return self.pack_forward(problem, out)
