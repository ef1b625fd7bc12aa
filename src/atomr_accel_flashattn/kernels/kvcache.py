"""Attention over a cache of K and V: ``fa::KvCacheParams``, the kernels that read it, and how many splits of the keys suit.

``cuda/kernels/fa2_kvcache.cuh`` attends, all of it or a split of the keys; ``cuda/kernels/split_combine.cuh`` combines the splits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self

from ..problem import ArrayInfo, AttentionProblem, KvCache
from ..types import DType
from .attention import AttentionSpec
from .forward import FwdParams, forward_params
from .params import KernelParams
from .spec import Family, KernelSpec, Tile

__all__ = [
    "INVARIANT_GROUPS",
    "KEYS_OF_SPLIT",
    "CombineSpec",
    "Fa2KvCacheSpec",
    "KvCacheParams",
    "KvCacheSpec",
    "SplitCombineSpec",
    "cache_numbers",
    "plain_numbers",
    "row_blocks",
    "splits_for",
]

INVARIANT_GROUPS: Final = 4  # of warps that share the keys of a batch-invariant call
_COMBINE_TILE: Final = Tile(block_m=64, block_n=32, warps=4)
_ROWS_OF_WARP: Final = 16
_OF_FP8: Final = ("k_token_scales", "v_token_scales", "fp8_products")
_MOST_SPLITS: Final = 64
KEYS_OF_SPLIT: Final = 256  # at least: a split has a partial result to write and to read


class KvCacheParams(KernelParams):
    """``fa::KvCacheParams``. Its addresses run on into those of ``fa::FwdParams``."""

    _OWN = ("blocks", "cache_lengths", "left_pad", "cu_seqlens_new", "partial_o", "partial_sum", "error")
    SLOTS = (*_OWN, *FwdParams.SLOTS)
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _OWN),
        ("fwd", FwdParams),
        *((name, ctypes.c_int64) for name in ("table_stride", "lse_rows")),
        *((name, ctypes.c_int32) for name in ("block_size", "num_blocks", "capacity", "new_tokens", "splits")),
    )


def cache_numbers(problem: AttentionProblem, cache: KvCache, splits: int) -> dict[str, int]:
    """The numbers of ``fa::KvCacheParams`` beside those of ``fa::FwdParams``."""
    return {
        "table_stride": cache.blocks.strides[0] if cache.blocks is not None and cache.paged else 0,
        "lse_rows": prod(problem.lse_shape),
        "block_size": cache.block_size,
        "num_blocks": cache.num_blocks,
        "capacity": cache.capacity,
        "new_tokens": 0 if cache.new is None or cache.new.cu_seqlens is not None else cache.new.longest,
        "splits": splits,
    }


def plain_numbers(problem: AttentionProblem, splits: int) -> dict[str, int]:
    """The same of a call on plain K and V; the others are 0, and never read."""
    return {"lse_rows": prod(problem.lse_shape), "splits": splits}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheSpec(AttentionSpec):
    """A kernel of a call over a cache."""

    FAMILY: ClassVar[Family] = Family.FA2
    PARAMS: ClassVar[str] = "KvCacheParams"

    def pack_call(self, problem: AttentionProblem, out: ArrayInfo, parts: int) -> KernelParams:
        """The parameters of one call without addresses, for all its kernels; ``parts``: splits of its keys."""
        return self.pack_splits(problem, out, parts)

    def pack_splits(self, problem: AttentionProblem, out: ArrayInfo, splits: int) -> KvCacheParams:
        """``fa::KvCacheParams`` of one call without addresses."""
        cache, group = problem.cache, problem.heads // problem.heads_kv
        forward = forward_params(problem, out, blocks_m=row_blocks(problem.seqlen_q * group, self.tile), packed_heads=group)
        numbers = plain_numbers(problem, splits) if cache is None else cache_numbers(problem, cache, splits)
        return KvCacheParams(fwd=forward, **numbers)

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> KernelParams:
        """Those of a call whose keys are not split."""
        return self.pack_call(problem, out, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa2KvCacheSpec(KvCacheSpec):
    """Groups of warps share the keys of a block, and read K and V with cp.async, row by row. Any architecture, any alignment."""

    HEADER: ClassVar[str] = "fa2_kvcache"
    ENTRY: ClassVar[str] = "fa2_kvcache"
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"block_m": (16, 32, 64, 128), "block_n": (16, 32), "warps": (4, 8), "stages": (1, 2, 3), "min_blocks": (1, 2, 3, 4)}
    )

    pack_gqa: bool = True
    paged: bool = False
    split: bool = False
    batch_invariant: bool = False  # tile n of the keys goes to group n % 4, and rows do not look at each other
    plain_kv: bool = False  # K and V are arrays like q, and no cache
    # fp8 K and V in pages: each slot has a descale of its own.
    k_token_scales: bool = False
    v_token_scales: bool = False
    fp8_products: bool = False  # fp8 q and k are multiplied in 8 bits, else in f16

    def config(self) -> dict[str, Any]:
        """With what a cache adds. The learned sink of a call that is split joins where the splits are combined, once."""
        added = {"any_ratio": True, "paged": self.paged, "split": self.split}
        added |= {name: True for name in ("batch_invariant", "plain_kv") if getattr(self, name)}
        return AttentionSpec.config(self) | added | {"learned_sink": self.learned_sink and not self.split}

    def types_config(self) -> dict[str, Any]:
        """With whose descales there are, and how fp8 is multiplied."""
        return AttentionSpec.types_config(self) | {name: True for name in _OF_FP8 if getattr(self, name)}

    @property
    def shared_memory(self) -> int:
        """Q, then the stages of K and V of each group of warps (and factors of q), or what is merged of the groups at the end."""
        tile, row = self.tile, self.head_dim * self.k_type.itemsize + self.v_head_dim * self.v_type.itemsize
        groups = tile.warps * _ROWS_OF_WARP // tile.block_m
        stages = groups * tile.stages * tile.block_n * row
        scales = 4 * tile.block_m if self.k_type.is_fp8 and self.dtype is DType.BF16 else 0  # what rows of q are divided by
        merge = groups * tile.block_m * (2 + self.v_head_dim + 4) * 4
        return tile.block_m * self.head_dim * (1 if self.fp8_products else 2) + max(stages + scales, merge)

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """mma.sync, ldmatrix, and cp.async where every address is aligned."""
        return ("HMMA", "LDSM", "LDGSTS") if self.aligned else ("HMMA", "LDSM")

    @property
    def launch_bounds(self) -> str:
        """Threads a block, and the blocks that an SM holds."""
        return f"{self.threads}, {self.tile.min_blocks}"

    def misfit(self) -> str:
        """A warp has 16 rows, groups of warps are equally large, and a lane knows where a key lies."""
        tile = self.tile
        if tile.block_m % _ROWS_OF_WARP or tile.warps % (tile.block_m // _ROWS_OF_WARP):
            return f"block_m: got {tile.block_m}; allowed with {tile.warps} warps are 16 rows a warp, or a part of that"
        if self.batch_invariant and tile.warps * _ROWS_OF_WARP != INVARIANT_GROUPS * tile.block_m:
            return (
                f"warps: got {tile.warps}; allowed with batch_invariant are {INVARIANT_GROUPS} groups, in which every row has the same sums"
            )
        return "" if tile.block_n <= 32 else f"block_n: got {tile.block_n}; allowed are at most 32"

    def registers_suffice(self) -> bool:
        """O and S in float32 for 16 rows a warp."""
        return self.registers_hold((self.v_head_dim + self.tile.block_n) // 2 + 60)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for block_m rows of the query heads of a KV head and sequence; each split has them all."""
        rows = row_blocks(problem.seqlen_q * (problem.heads // problem.heads_kv), self.tile)
        return rows * problem.batch * problem.heads_kv if prod(problem.out_shape) else 0

    def grid(self, tiles: int, multiprocessors: int, blocks: int | None = None) -> int:  # noqa: ARG002 - as its base
        """A block for each tile and split; ``blocks``: the splits."""
        return tiles * (blocks or 1)

    def steps(self) -> tuple[KernelSpec, ...]:
        """And what combines its splits."""
        return (self, SplitCombineSpec.of(self)) if self.split else (self,)


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineSpec(KvCacheSpec):
    """What goes behind a kernel whose blocks share the keys of a row: its warps share the parts of a row."""

    @classmethod
    def behind(cls, spec: AttentionSpec, tile: Tile, **more: Any) -> Self:
        """The one of ``spec``, with ``more`` fields."""
        return cls(
            arch=spec.arch.without_wgmma,
            dtype=spec.out_type,
            head_dim=spec.v_head_dim,
            v_head_dim=spec.v_head_dim,
            tile=tile,
            exact_head_dim=spec.exact_head_dim,
            aligned=spec.aligned,
            learned_sink=spec.learned_sink,
            varlen=spec.varlen,
            **more,
        )

    @property
    def shared_memory(self) -> int:
        """The sums of each warp: o and its denominator."""
        return self.tile.warps * (self.v_head_dim + 4) * 4

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """The maximum over the lanes of a warp."""
        return ("SHFL.BFLY",)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCombineSpec(CombineSpec):
    """A block combines a row."""

    HEADER: ClassVar[str] = "split_combine"
    ENTRY: ClassVar[str] = "split_combine"

    @classmethod
    def of(cls, spec: AttentionSpec) -> Self:
        """The one that goes behind ``spec``."""
        return cls.behind(spec, _COMBINE_TILE)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One for a row."""
        return prod(problem.lse_shape) if prod(problem.out_shape) else 0


def row_blocks(rows: int, tile: Tile) -> int:
    """Blocks of ``block_m`` rows of a KV head, one at least: there may be rows of q that no sequence owns."""
    return -(-max(1, rows) // tile.block_m)


def splits_for(problem: AttentionProblem, tiles: int, multiprocessors: int) -> int:
    """Parts that the keys are cut into: as many as the caller wants, else as many as give every SM at most two blocks of ``tiles``.

    More would leave some SMs a third block while others have none (H200, batch 8 of 4k keys: 4 parts 38.6 us, 5 parts 40.4).

    Lengths on a GPU are not known: the bound of the call stands for them, so that a captured graph has room for all.
    """
    if problem.num_splits or not tiles or problem.batch_invariant:
        return max(1, problem.num_splits)
    wanted = 2 * multiprocessors // tiles if tiles < multiprocessors else 1
    return max(1, min(wanted, _MOST_SPLITS, problem.seqlen_k // KEYS_OF_SPLIT))
