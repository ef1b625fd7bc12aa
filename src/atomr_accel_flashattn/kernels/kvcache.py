"""What the kernels over a cache of K and V share: ``fa::KvCacheParams`` and their specs.

``cuda/kernels/fa2_kvcache.cuh`` attends, all of it or a split of the keys; ``cuda/kernels/split_combine.cuh`` combines the splits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, Self

from ..problem import ArrayInfo, AttentionProblem
from .attention import AttentionSpec
from .forward import FwdParams, forward_params
from .params import KernelParams
from .spec import Family, KernelSpec, Tile

__all__ = ["CacheShape", "Fa2KvCacheSpec", "KvCacheParams", "SplitCombineSpec"]

_COMBINE_TILE: Final = Tile(block_m=64, block_n=32, warps=4)
_ROWS_OF_WARP: Final = 16


class CacheShape(NamedTuple):
    """Numbers of a cache: slots of a block, blocks, slots that a sequence may have, and from one row of the block table to the next."""

    block_size: int
    num_blocks: int
    capacity: int
    table_stride: int = 0
    new_tokens: int = 0


class KvCacheParams(KernelParams):
    """``fa::KvCacheParams``. Its addresses run on into those of ``fa::FwdParams``."""

    _OWN = ("blocks", "cache_lengths", "left_pad", "cu_seqlens_new", "partial_o", "partial_lse")
    SLOTS = (*_OWN, *FwdParams.SLOTS)
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _OWN),
        ("fwd", FwdParams),
        *((name, ctypes.c_int64) for name in ("table_stride", "lse_rows")),
        *((name, ctypes.c_int32) for name in ("block_size", "num_blocks", "capacity", "new_tokens", "splits")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _KvCacheSpec(AttentionSpec):
    FAMILY: ClassVar[Family] = Family.FA2
    PARAMS: ClassVar[str] = "KvCacheParams"

    def pack(self, problem: AttentionProblem, out: ArrayInfo, *, shape: CacheShape, splits: int = 1) -> KvCacheParams:  # type: ignore[override]
        """``fa::KvCacheParams`` of one call without addresses. ``problem.k`` and ``v`` are the cache."""
        group = problem.heads // problem.heads_kv
        rows = -(-max(1, problem.seqlen_q * group) // self.tile.block_m)
        return KvCacheParams(
            fwd=forward_params(problem, out, blocks_m=rows, packed_heads=group),
            lse_rows=prod(problem.lse_shape),
            splits=splits,
            **shape._asdict(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa2KvCacheSpec(_KvCacheSpec):
    """Groups of warps share the keys of a block, and read K and V with cp.async, row by row. Any architecture, any alignment."""

    HEADER: ClassVar[str] = "fa2_kvcache"
    ENTRY: ClassVar[str] = "fa2_kvcache"
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"block_m": (16, 32, 64, 128), "block_n": (16, 32), "warps": (4, 8), "stages": (1, 2, 3)}
    )

    pack_gqa: bool = True
    paged: bool = False
    split: bool = False

    def config(self) -> dict[str, Any]:
        """With what a cache adds. The learned sink of a call that is split joins where the splits are combined, once."""
        added = {"any_ratio": True, "paged": self.paged, "split": self.split}
        return super(Fa2KvCacheSpec, self).config() | added | {"learned_sink": self.learned_sink and not self.split}

    @property
    def shared_memory(self) -> int:
        """Q, then the stages of K and V of each group of warps, or what is merged of the groups at the end."""
        tile, size = self.tile, self.dtype.itemsize
        groups = tile.warps * _ROWS_OF_WARP // tile.block_m
        stages = groups * tile.stages * tile.block_n * (self.head_dim + self.v_head_dim) * size
        merge = groups * tile.block_m * (2 + self.v_head_dim + 4) * 4
        return tile.block_m * self.head_dim * size + max(stages, merge)

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """mma.sync, ldmatrix, and cp.async where every address is aligned."""
        return ("HMMA", "LDSM", "LDGSTS") if self.aligned else ("HMMA", "LDSM")

    def misfit(self) -> str:
        """A warp has 16 rows, groups of warps are equally large, and a lane knows where a key lies."""
        tile = self.tile
        if tile.block_m % _ROWS_OF_WARP or tile.warps % (tile.block_m // _ROWS_OF_WARP):
            return f"block_m: got {tile.block_m}; allowed with {tile.warps} warps are 16 rows a warp, or a part of that"
        return "" if tile.block_n <= 32 else f"block_n: got {tile.block_n}; allowed are at most 32"

    def registers_suffice(self) -> bool:
        """O and S in float32 for 16 rows a warp."""
        return self.registers_hold((self.v_head_dim + self.tile.block_n) // 2 + 60)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for block_m rows of the query heads of a KV head and sequence; each split has them all."""
        group = problem.heads // problem.heads_kv
        return -(-max(1, problem.seqlen_q * group) // self.tile.block_m) * problem.batch * problem.heads_kv if problem.heads else 0

    def steps(self) -> tuple[KernelSpec, ...]:
        """And what combines its splits."""
        return (self, SplitCombineSpec.of(self)) if self.split else (self,)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCombineSpec(_KvCacheSpec):
    """A warp combines a row."""

    HEADER: ClassVar[str] = "split_combine"
    ENTRY: ClassVar[str] = "split_combine"

    @classmethod
    def of(cls, spec: Fa2KvCacheSpec) -> Self:
        """The one that goes behind ``spec``."""
        return cls(
            arch=spec.arch,
            dtype=spec.dtype,
            head_dim=spec.v_head_dim,
            v_head_dim=spec.v_head_dim,
            tile=_COMBINE_TILE,
            exact_head_dim=spec.exact_head_dim,
            aligned=spec.aligned,
            learned_sink=spec.learned_sink,
            varlen=spec.varlen,
        )

    @property
    def shared_memory(self) -> int:
        """None."""
        return 0

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """The maximum over the lanes of a warp."""
        return ("SHFL.BFLY",)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for as many rows as it has warps."""
        return -(-prod(problem.lse_shape) // self.tile.warps)
