"""The kernel before the backward: ``cuda/kernels/bwd_preprocess.cuh``, delta and zeros in the accumulator of dQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Self

from ..problem import AttentionProblem
from .backward import BackwardSpec
from .spec import Tile

__all__ = ["BackwardPreprocessSpec"]

_TILE: Final = Tile(block_m=64, block_n=32, warps=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardPreprocessSpec(BackwardSpec):
    """Eight lanes take a row of a head at a time. Head dims are numbers to it."""

    HEADER: ClassVar[str] = "bwd_preprocess"
    ENTRY: ClassVar[str] = "backward_preprocess"

    @classmethod
    def of(cls, spec: BackwardSpec) -> Self:
        """The one that goes before ``spec``."""
        return cls(
            arch=spec.arch,
            dtype=spec.dtype,
            head_dim=32,
            v_head_dim=32,
            tile=_TILE,
            aligned=spec.aligned,
            left_bound=spec.left_bound,
            right_bound=spec.right_bound,
            sink_tokens=spec.sink_tokens,
            learned_sink=spec.learned_sink,
            varlen=spec.varlen,
            deterministic=spec.deterministic,
        )

    @property
    def shared_memory(self) -> int:
        """None."""
        return 0

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """The sum over the lanes of a row."""
        return ("SHFL.BFLY",)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for block_m rows of a head and sequence."""
        return -(-problem.seqlen_q // self.tile.block_m) * problem.batch * problem.heads
