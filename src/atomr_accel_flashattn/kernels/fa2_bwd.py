"""The backward kernel of the mma.sync family: ``cuda/kernels/fa2_bwd.cuh``, FlashAttention-2 (arXiv 2307.08691), Algorithm 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Final

from ..problem import AttentionProblem
from ..types import SmArch
from .backward import BackwardSpec, kv_part_bytes, workspace_of
from .bwd_postprocess import BackwardPostprocessSpec
from .bwd_preprocess import BackwardPreprocessSpec

__all__ = ["Fa2BackwardSpec"]

_OTHER_REGISTERS: Final = 31  # beside accumulators and scores
_DQ_REGISTERS: Final = 64  # of dQ at a time
_NARROW_KEYS, _NARROW_WIDTH, _NARROW_STAGES = 32, 64, 3  # of a warp, of heads, of Q and dO: fa2_bwd_narrow.cuh
# Of a split over query heads. Times are in tiles of queries that a block visits.
_BLOCK_TIME: Final = 3  # of a block beside them: it loads keys, stores dK and dV
_SPLIT_TIME: Final = 8  # of what adds the parts; what does not save more than that is not split
_AS_GOOD: Final = 1.01  # times the shortest time
_MOST_PARTS: Final = 8  # bytes, for each element of q
_NAMES_IT_REDG: Final = frozenset({SmArch.SM_90, SmArch.SM_100, SmArch.SM_120})  # ``red`` of global memory, in SASS


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa2BackwardSpec(BackwardSpec):
    """dK and dV of a block of keys, and its part of dQ. Any architecture, any alignment."""

    HEADER: ClassVar[str] = "fa2_bwd"
    ENTRY: ClassVar[str] = "fa2_backward"
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3), "min_blocks": (1, 2)}
    )

    @property
    def narrow(self) -> bool:
        """Whether a warp owns 32 keys, with P and dS in registers (``fa2_bwd_narrow.cuh``)."""
        tile = self.tile
        fits = max(self.head_dim, self.v_head_dim) <= _NARROW_WIDTH and not (self.softcap or self.dropout)
        return fits and tile.stages == _NARROW_STAGES and tile.block_n == _NARROW_KEYS * tile.warps

    @property
    def shared_memory(self) -> int:
        """K, V, the stages of Q and dO with LSE and delta of their rows, P and dS."""
        tile, size = self.tile, self.dtype.itemsize
        row = (self.head_dim + self.v_head_dim) * size
        ticket = 16 if self.deterministic else 0
        if self.narrow:
            buffers = max(2 * tile.block_m, self.v_head_dim) * tile.block_n * size
            return tile.block_n * self.head_dim * size + tile.stages * tile.block_m * (row + 8) + buffers + ticket
        return tile.block_n * row + tile.stages * tile.block_m * (row + 8) + 2 * tile.block_m * tile.block_n * size + ticket

    @property
    def launch_bounds(self) -> str:
        """Threads, and the blocks that an SM shall hold."""
        return f"{self.threads}, {self.tile.min_blocks}"

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """mma.sync, ldmatrix with and without transposition, atomics without an answer, and cp.async where every address is aligned."""
        red = "REDG" if self.arch in _NAMES_IT_REDG else "RED"
        return ("HMMA", "LDSM", red, *(("LDGSTS",) if self.aligned else ()))

    def misfit(self) -> str:
        """Warps share the 16 x 16 blocks of each product evenly (cuda/tile/product.cuh), and threads the rows of a tile of Q."""
        tile = self.tile
        if tile.stages not in self.AXES["stages"]:
            return f"stages: got {tile.stages}; allowed are 1, 2 and 3"
        dq_cols = self.head_dim if tile.block_m * self.head_dim <= _DQ_REGISTERS * tile.threads else self.head_dim // 2
        keys = ((tile.block_m, tile.block_n), (tile.block_n, self.head_dim), (tile.block_n, self.v_head_dim))
        for rows, cols in (*(() if self.narrow else keys), (tile.block_m, dq_cols)):
            if not _share_evenly(rows, cols, tile.warps):
                return f"warps: got {tile.warps}; allowed are those that share {rows} x {cols} numbers evenly, in blocks of 16 x 16"
        if tile.block_m > tile.threads:
            return f"block_m: got {tile.block_m}; allowed are at most {tile.threads}, the threads of a block"
        return ""

    def registers_suffice(self) -> bool:
        """DK, dV, and S and dP or what takes their place, in float32."""
        tile = self.tile
        scores = 2 * _NARROW_KEYS if self.narrow else 2 * tile.block_m * tile.block_n // tile.threads
        return self.registers_hold(tile.block_n * (self.head_dim + self.v_head_dim) // tile.threads + scores + _OTHER_REGISTERS)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for block_n keys of a KV head and sequence."""
        return -(-problem.seqlen_k // self.tile.block_n) * problem.batch * problem.heads_kv

    def grid(self, tiles: int, multiprocessors: int, blocks: int | None = None) -> int:  # noqa: ARG002 - as its base
        """A block for each tile of keys and part of the query heads; ``blocks``: how many parts."""
        return tiles * (blocks or 1)

    def head_splits(self, problem: AttentionProblem, multiprocessors: int) -> int:
        """Blocks that shall share a tile of keys, each with equally many query heads of its group: 1 where there are blocks enough.

        The fewest whose blocks are done about as early as those of any number, and whose parts of dK and dV take at most four times the
        bytes of q. Lengths of packed sequences are not known: they count as equal.
        """
        group, part = problem.heads // problem.heads_kv, kv_part_bytes(problem)
        room = _MOST_PARTS * prod(problem.q.shape) // part if part else 1
        allowed = (n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n <= room))
        times = {n: self._time(problem, n, multiprocessors) for n in allowed}
        return min(n for n, time in times.items() if time <= _AS_GOOD * min(times.values()))

    def _time(self, problem: AttentionProblem, splits: int, multiprocessors: int) -> float:
        """Until the last block is done, in tiles of queries that a block visits."""
        band, tile, heads = problem.band, self.tile, problem.heads // (problem.heads_kv * splits)
        tiles = min(self.work_tiles(problem), -(-prod(problem.k.shape[:-1]) // tile.block_n) + problem.batch * problem.heads_kv)
        rows = problem.seqlen_q
        if band.left is not None and band.right is not None and not band.sink_tokens:
            rows = min(rows, band.left + band.right + tile.block_n)
        of_head, slots = -(-rows // tile.block_m), multiprocessors * tile.min_blocks
        waves = -(-tiles * splits // slots)
        time = float(waves * heads * of_head)
        shorter, longer = sorted((problem.seqlen_q, problem.seqlen_k))
        if (band.left is None) != (band.right is None) and 2 * shorter > longer:
            # A triangle: blocks of keys that few queries see fill up the time of the others.
            share = 1 - shorter / (2 * longer)
            time = max(heads * of_head, tiles * splits * heads * of_head * share / slots)
        return time + waves * _BLOCK_TIME + (_SPLIT_TIME if splits > 1 else 0)

    def steps(self) -> tuple[BackwardPreprocessSpec, Fa2BackwardSpec, BackwardPostprocessSpec]:
        """Delta and zeros before it, and the conversion of dQ behind it."""
        return BackwardPreprocessSpec.of(self), self, BackwardPostprocessSpec.of(self)

    def workspace(self, problem: AttentionProblem, splits: int = 1) -> dict[str, int]:
        """Bytes of the arrays that the three kernels share, by their slots; each begins at a multiple of 256 bytes, and none is cleared."""
        return workspace_of(problem, splits if self.head_split else 0, deterministic=self.deterministic)


def _share_evenly(rows: int, cols: int, warps: int) -> bool:
    """Whether warps can cut these numbers into equal parts of whole blocks: some bands of rows, each into columns."""
    bands = (down for down in (1, 2, 4, 8, 16) if warps % down == 0)
    return any(rows % (16 * down) == 0 and cols % (16 * (warps // down)) == 0 for down in bands)
