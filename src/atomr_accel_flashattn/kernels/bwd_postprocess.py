"""The kernel after the backward: ``cuda/kernels/bwd_postprocess.cuh``, sums of dQ, dK and dV to 16 bits, dsink, and zeros in spare rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Self

from ..problem import AttentionProblem
from .backward import CONVERT_ROWS, BackwardSpec, convert_blocks
from .spec import Tile

__all__ = ["BackwardPostprocessSpec"]

_TILE: Final = Tile(block_m=CONVERT_ROWS, block_n=32, warps=8)
_SPARE_BLOCKS: Final = 64  # that clear spare rows of dK and dV: seldom more than some


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardPostprocessSpec(BackwardSpec):
    """Some blocks convert dQ, some add the parts of dK and dV, a block each sums the gradient of the sink of a head.

    Head dims are numbers to it.
    """

    HEADER: ClassVar[str] = "bwd_postprocess"
    ENTRY: ClassVar[str] = "backward_postprocess"

    @classmethod
    def of(cls, spec: BackwardSpec) -> Self:
        """The one that goes behind ``spec``."""
        return cls(
            arch=spec.arch,
            dtype=spec.dtype,
            head_dim=32,
            v_head_dim=32,
            tile=_TILE,
            exact_head_dim=spec.exact_head_dim,
            aligned=spec.aligned,
            learned_sink=spec.learned_sink,
            varlen=spec.varlen,
            head_split=spec.head_split,
        )

    @property
    def shared_memory(self) -> int:
        """A partial sum of each warp."""
        return self.tile.warps * 4 if self.learned_sink else 0

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """The conversion to 16 bits."""
        return ("F2FP",)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """Those that convert, one for each learned sink, and those that clear spare rows of packed sequences."""
        sinks = 0 if problem.learned_sink is None else problem.heads
        parts = -(-problem.seqlen_k // self.tile.block_m) * problem.batch * problem.heads_kv if self.head_split else 0
        return parts + convert_blocks(problem) + sinks + (_SPARE_BLOCKS if problem.is_varlen else 0)
