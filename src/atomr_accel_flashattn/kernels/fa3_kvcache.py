"""Attention over a KV cache by the wgmma family: ``cuda/kernels/fa3_kvcache.cuh``, and how many splits of the keys suit it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, ClassVar, Final

from ..problem import ArrayInfo, AttentionProblem, KvCache
from .fa3_fwd import Fa3ForwardSpec, tensor_map_of, tensor_map_of_q
from .kvcache import KvCacheParams, SplitCombineSpec, cache_numbers, plain_numbers
from .params import KernelParams, TensorMapParams, TensorMapSpec
from .spec import KernelSpec

__all__ = ["Fa3KvCacheParams", "Fa3KvCacheSpec", "pages_fit_boxes", "wgmma_splits_for"]

_SWIZZLED_ROWS: Final = 8  # over which the swizzle of TMA repeats: boxes of pages have multiples of them
_MOST_SPLITS: Final = 64
# Times in tiles of keys, by arithmetic and not measured: to begin a work tile, to write and to read back its partial result in float32, and
# the launch that combines.
_BEGINNING, _PARTIAL, _COMBINE = 2, 2, 3
_PLAIN_GAIN: Final = 0.75  # of the time without splits, at most: a second launch costs 5 us of the host, which a cache's plan often has


def pages_fit_boxes(cache: KvCache) -> bool:
    """Whether TMA can gather the keys: of a contiguous cache always, and of pages in boxes of 8 rows or a multiple."""
    return not cache.paged or cache.block_size % _SWIZZLED_ROWS == 0


class Fa3KvCacheParams(KvCacheParams):
    """``fa::Fa3KvCacheParams``: those of every kernel over a cache, then what TMA and the scheduler need."""

    MAPS = (("q_map", "q"), ("k_map", "k"), ("v_map", "v"))
    _fields_ = (
        ("counters", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("tiles", "box_rows")),
        ("_alignment", ctypes.c_ubyte * (-(ctypes.sizeof(KvCacheParams) + 16) % 64)),  # the maps begin at a multiple of 64
        *((name, TensorMapParams) for name, _ in MAPS),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa3KvCacheSpec(Fa3ForwardSpec):
    """The mainloop of :class:`Fa3ForwardSpec` with K and V in a cache: boxes of pages, or of the rows of a contiguous one. sm_90a.

    Plain K and V, too, whose keys are split.
    """

    HEADER: ClassVar[str] = "fa3_kvcache"
    ENTRY: ClassVar[str] = "fa3_kvcache"
    PARAMS: ClassVar[str] = "Fa3KvCacheParams"

    paged: bool = False
    split: bool = False
    plain_kv: bool = False  # K and V are arrays like q, and no cache

    def config(self) -> dict[str, Any]:
        """With what a cache adds. The learned sink of a call that is split joins where the splits are combined, once."""
        added = {"paged": self.paged, "split": self.split} | ({"plain_kv": True} if self.plain_kv else {})
        return Fa3ForwardSpec.config(self) | added | {"learned_sink": self.learned_sink and not self.split}

    def grid(self, tiles: int, multiprocessors: int, blocks: int | None = None) -> int:
        """A block for each tile and split, persistent ones no more than SMs; ``blocks``: the splits."""
        parts = tiles * (blocks or 1)
        return min(parts, multiprocessors) if self.tile.persistent else parts

    def pack_call(self, problem: AttentionProblem, out: ArrayInfo, splits: int) -> KernelParams:
        """``fa::Fa3KvCacheParams`` of one call without addresses, its maps still to be encoded."""
        cache = problem.cache
        numbers = plain_numbers(problem, splits) if cache is None else cache_numbers(problem, cache, splits)
        params = Fa3KvCacheParams(
            fwd=self.pack_forward(problem, out),
            **numbers,
            tiles=self.work_tiles(problem) * splits,
            box_rows=0 if cache is None else self._box_rows(cache),
        )
        params.tensor_maps = self.tensor_maps(problem)
        params.counts = self.tile.persistent
        return params

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> Any:
        """Those of a call whose keys are not split."""
        return self.pack_call(problem, out, 1)

    def tensor_maps(self, problem: AttentionProblem) -> tuple[TensorMapSpec, TensorMapSpec, TensorMapSpec]:
        """The maps of q, k and v; K and V of a cache are (columns, slots of a block, heads, blocks), in any layout."""
        cache = problem.cache
        if cache is None:
            return Fa3ForwardSpec.tensor_maps(self, problem)
        rows, slots = self._box_rows(cache), (cache.block_size, problem.heads_kv, cache.num_blocks)
        return (
            tensor_map_of_q(problem, self.head_dim, packed=self.pack_gqa),
            tensor_map_of(problem.k, problem.k_strides, (problem.head_dim, *slots), self.head_dim, rows),
            tensor_map_of(problem.v, problem.v_strides, (problem.v_head_dim, *slots), self.v_head_dim, rows),
        )

    def _box_rows(self, cache: KvCache) -> int:
        """A box lies in one page, and boxes fill a tile."""
        return gcd(self.tile.block_n, cache.block_size) if cache.paged else self.tile.block_n

    def steps(self) -> tuple[KernelSpec, ...]:
        """And what combines its splits, without wgmma."""
        return (self, SplitCombineSpec.of(self)) if self.split else (self,)


def wgmma_splits_for(problem: AttentionProblem, tiles: int, block_n: int, multiprocessors: int) -> int:
    """Parts that the keys of ``tiles`` work tiles are cut into: as many as the caller wants, else what takes the least time.

    Plain K and V are split where that saves a quarter, and where the parts are not larger than they are.

    Lengths on a GPU are not known: the bound of the call stands for them.
    """
    if problem.num_splits or not tiles or problem.batch_invariant:
        return max(1, problem.num_splits)
    steps = -(-_visible_keys(problem) // block_n)
    most = _MOST_SPLITS if problem.cache is not None else min(_MOST_SPLITS, _parts_as_large_as_kv(problem))

    def time(splits: int) -> int:
        waves, partial = -(-tiles * splits // multiprocessors), splits > 1
        return waves * (-(-steps // splits) + _BEGINNING + _PARTIAL * partial) + _COMBINE * partial

    best = min(range(1, max(1, min(most, steps)) + 1), key=time)
    return best if problem.cache is not None or time(best) <= _PLAIN_GAIN * time(1) else 1


def _parts_as_large_as_kv(problem: AttentionProblem) -> int:
    """How many partial results, o in float32, are as large as plain K and V."""
    kv_bytes = sum(prod(array.shape) * (array.dtype.itemsize if array.dtype is not None else 1) for array in (problem.k, problem.v))
    return int(kv_bytes // max(1, 4 * prod(problem.lse_shape) * problem.v_head_dim))


def _visible_keys(problem: AttentionProblem) -> int:
    """At most, of the rows of a tile: a bound on either side leaves a window, and sink tokens."""
    band = problem.band
    if band.left is None or band.right is None:
        return problem.seqlen_k
    return min(problem.seqlen_k, band.left + band.right + problem.seqlen_q + band.sink_tokens)
