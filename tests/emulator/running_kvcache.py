"""The kernels over a cache of K and V on the emulator: keys and values of a case in pages or slots, NaN everywhere else."""

from __future__ import annotations

import ctypes
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.dispatch import key_of_problem
from atomr_accel_flashattn.dispatch.resolve import _features
from atomr_accel_flashattn.kernels.fa3_kvcache import Fa3KvCacheSpec
from atomr_accel_flashattn.kernels.fp8_kvcache import DescaledKvCacheParams, DescaledStepParams
from atomr_accel_flashattn.kernels.kvcache import Fa2KvCacheSpec, KvCacheParams
from atomr_accel_flashattn.kernels.spec import Family, Tile
from atomr_accel_flashattn.kernels.step import ScheduledKvCacheSpec, StepScheduleSpec, schedule_bytes
from atomr_accel_flashattn.problem import KvCache, StepShape, Strides
from atomr_accel_flashattn.tiles.tables import head_dim_width
from atomr_accel_flashattn.types import KvLayout, SmArch
from tests.check import Run
from tests.inputs import NUMPY_DTYPE, Inputs, Layout, Poisoned
from tests.reference.running import problem_of

from .build import run
from .running import flat_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from atomr_accel_flashattn.kernels.spec import KernelSpec
    from atomr_accel_flashattn.problem import AttentionProblem

    Array = NDArray[Any]

__all__ = ["Cached", "diagonals", "launch"]

_MULTIPROCESSORS = 3  # so few that persistent blocks take many tiles
SMALL = Tile(block_m=16, block_n=32, warps=4, stages=2)


def diagonals(rows: Iterable[Any], columns: Iterable[Any], step: int, whole: Container[Any] = ()) -> list[tuple[Any, Any, int]]:
    """Each row with one of ``step`` columns, those of ``whole`` with all: pairs, and the number of their diagonal."""
    numbered = [(row, column, i + j) for i, row in enumerate(rows) for j, column in enumerate(columns)]
    return [(row, column, number) for row, column, number in numbered if number % step == 0 or row in whole]


@dataclass(frozen=True)
class Cached:
    """How a case is run: ``block_size`` None is a contiguous cache, ``layout`` is its pages'; with ``blocks`` in so many of a StepPlan.

    ``plain``: K and V are the case's own arrays, and no cache. ``holes``: which pages of each sequence have an entry outside the cache.
    """

    block_size: int | None = 16
    splits: int = 1
    tile: Tile = SMALL
    left_pad: int = 0
    blocks: int = 0
    seed: int = 0
    family: Family = Family.FA2
    layout: KvLayout = KvLayout.NHD
    plain: bool = False
    holes: tuple[int, ...] = ()

    def __call__(self, inputs: Inputs) -> Run:
        """What :func:`tests.check.check_case` calls."""
        random = np.random.default_rng(self.seed)
        problem = self.problem(inputs)
        held = {"k": inputs.k, "v": inputs.v, "cu_seqlens_k": inputs.cu_seqlens_k} if self.plain else self._hold(inputs, random)
        out_dtype = inputs.q.dtype if problem.out_dtype is None else NUMPY_DTYPE[problem.out_dtype]
        out = Poisoned.empty(inputs.out_shape, out_dtype, Layout.ODD if inputs.q.strides[-2] % 16 else Layout.PADDED)
        lse = np.full(inputs.lse_shape, np.nan, np.float32)
        out_info = read_array(out.view, "out")
        spec = self._spec(problem)
        cache = problem if self.plain else self._over_cache(problem, held)
        arrays = {
            **{name: held.get(name) for name in ("k", "v", "blocks", "cache_lengths", "left_pad", "cu_seqlens_k")},
            "q": inputs.q,
            "o": out.view,
            "lse": lse,
            "cu_seqlens_q": inputs.cu_seqlens_q,
            "alibi_slopes": inputs.alibi_slopes,
            "learned_sink": inputs.learned_sink,
            **self.more_arrays(held),
        }
        if isinstance(spec, ScheduledKvCacheSpec):
            arrays |= {name: np.full(size // 4, np.nan, np.float32) for name, size in spec.workspace(self.blocks).items()}
            arrays["schedule"] = self.schedule(cache, spec, arrays)
        else:
            arrays["partial_o"] = np.full((self.splits, lse.size, problem.v_head_dim), np.nan, np.float32)
            arrays["partial_sum"] = np.full((self.splits, lse.size, 2), np.nan, np.float32)
        params: Any = spec.pack_call(cache, out_info, self.blocks or self.splits)
        counters = np.zeros(2, np.int32)
        for step in spec.steps():
            tiles = step.work_tiles(cache)
            if not tiles:
                continue
            if step is not spec and isinstance(spec, Fa3KvCacheSpec):
                params = KvCacheParams.from_buffer_copy(params if isinstance(params, KvCacheParams) else params.params)
            elif step is not spec and isinstance(params, (DescaledKvCacheParams, DescaledStepParams)):
                params = params.params
            for (name, _), described in zip(params.MAPS, params.tensor_maps, strict=True):
                ctypes.memmove(ctypes.addressof(getattr(params, name)), flat_tensor(described), 128)
            if params.counts:
                params.counters = counters.ctypes.data
            launch(step, params, arrays, step.grid(tiles, _MULTIPROCESSORS, self.blocks or self.splits), seed=self.seed)
        assert not counters.any(), "a persistent kernel must leave its counters zero"
        out.check()
        return Run(out.view, lse)

    def _over_cache(self, problem: AttentionProblem, held: dict[str, Any]) -> AttentionProblem:
        """The same call over the cache that is held."""
        return replace(
            problem,
            k=read_array(held["k"], "k"),
            v=read_array(held["v"], "v"),
            k_strides=_strides(held["k"]),
            v_strides=_strides(held["v"]),
            seqlen_k=held["fits"],
            cache=KvCache(
                num_blocks=held["k"].shape[0],
                block_size=held["k"].shape[1],
                layout=self.layout,
                blocks=read_array(held["blocks"], "blocks"),
                lengths=read_array(held["cache_lengths"], "lengths"),
                left_pad=None if held.get("left_pad") is None else read_array(held["left_pad"], "left_pad"),
            ),
        )

    def hide_holes(self, inputs: Inputs) -> Inputs:
        """The same call without holes, by another way: one more column of q and k makes the scores of their keys -inf."""
        one, hidden = np.ones((*inputs.q.shape[:-1], 1)), np.zeros((*inputs.k.shape[:-1], 1))
        for sequence in replace(inputs, k=hidden).sequences():
            pages = np.arange(len(sequence.k)) // (self.block_size or 1)
            sequence.k[np.isin(pages, self.holes)] = -np.inf
        return replace(inputs, q=np.concatenate([inputs.q, one], axis=-1), k=np.concatenate([inputs.k, hidden], axis=-1))

    def schedule(self, problem: AttentionProblem, spec: ScheduledKvCacheSpec, arrays: dict[str, Any]) -> Array:
        """What the kernel makes of these lengths, in the bytes that it is given and in no other."""
        shape, before = StepShape.of(problem), StepScheduleSpec.before(spec)
        params: Any = before.pack_shape(shape, spec, self.blocks)
        size = schedule_bytes(shape.batch, params.cache.fwd.blocks_m, self.blocks)
        room = np.full(size + 64, 0xA5, np.uint8)
        launch(before, params, arrays | {"schedule": room}, 1, seed=self.seed)
        assert (room[size:] == 0xA5).all(), "the schedule is longer than it says"
        return room[:size]

    def _spec(self, problem: AttentionProblem) -> Fa2KvCacheSpec | Fa3KvCacheSpec:
        arch = SmArch.SM_90 if self.family is Family.FA2 else SmArch.SM_90A
        key = key_of_problem(problem, arch)
        features = _features(key, head_dim_width(key.head_dim), head_dim_width(key.v_head_dim))
        fields = {"arch": arch, "tile": self.tile, "paged": self.block_size is not None and not self.plain, **features}
        if self.plain:
            fields["plain_kv"] = True
        if self.family is Family.FA3:
            fields["pack_gqa"] = key.packs_heads
        spec: Any = self.spec_of(**fields)
        assert not spec.misfit()
        assert spec.shared_memory <= arch.shared_memory_per_block
        return spec

    def problem(self, inputs: Inputs) -> AttentionProblem:
        """The call without its cache."""
        return problem_of(inputs)

    def spec_of(self, **fields: Any) -> Any:
        """The kernel."""
        if self.blocks:
            return ScheduledKvCacheSpec(**fields)
        kind = Fa2KvCacheSpec if self.family is Family.FA2 else Fa3KvCacheSpec
        return kind(split=self.splits > 1, **fields)

    def more_arrays(self, held: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - of fp8 caches
        """Others beside those of :meth:`_hold`, by slot."""
        return {}

    def _hold(self, inputs: Inputs, random: np.random.Generator) -> dict[str, Any]:
        """The cache of a call: each sequence's keys, in pages drawn at random or in a slot drawn at random."""
        sequences = list(inputs.sequences())
        lengths = np.array([self.left_pad + len(sequence.k) for sequence in sequences], np.int32)
        longest = int(lengths.max(initial=0)) + 3  # more fit
        if self.block_size is None:
            shape = (len(sequences) + 2, longest)
            k, v = (_empty_cache(shape, x) for x in (inputs.k, inputs.v))
            slots = random.permutation(shape[0])[: len(sequences)].astype(np.int32)
            for slot, sequence in zip(slots, sequences, strict=True):
                rows = slice(self.left_pad, self.left_pad + len(sequence.k))
                k[slot, rows], v[slot, rows] = sequence.k, sequence.v
            held: dict[str, Any] = {"k": k, "v": v, "cache_lengths": lengths, "blocks": slots, "fits": longest}
            return held | {"left_pad": np.full(len(sequences), self.left_pad, np.int32) if self.left_pad else None}
        size = self.block_size
        needed = [-(-int(length) // size) for length in lengths]
        width = max(needed, default=0) + 1
        pages = random.permutation(sum(needed) + 3).astype(np.int32)
        k, v = (_empty_cache((len(pages), size), x) for x in (inputs.k, inputs.v))
        table = random.choice(np.array([-1, 2**31 - 1, -(2**31)], np.int32), (len(sequences), width))  # never followed
        first = 0
        if self.layout is KvLayout.HND:
            k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
        for index, sequence in enumerate(sequences):
            table[index, : needed[index]] = pages[first : first + needed[index]]
            for j in range(len(sequence.k)):
                page, row = table[index, j // size], j % size
                k[page, row], v[page, row] = sequence.k[j], sequence.v[j]
            first += needed[index]
        table[:, list(self.holes)] = np.array([-1, 2**31 - 1, len(pages), -(2**31)], np.int32)[np.arange(len(self.holes)) % 4]
        return {"k": k, "v": v, "cache_lengths": lengths, "blocks": table, "fits": width * size}


def launch(spec: KernelSpec, params: Any, arrays: dict[str, Any], grid: int, *, seed: int) -> None:
    """Run a kernel on these arrays, by slot; those that it does not have are null."""
    at = {name: 0 if array is None else array.ctypes.data for name, array in arrays.items()}
    (ctypes.c_uint64 * len(params.SLOTS)).from_buffer(params)[:] = [at.get(name, 0) for name in params.SLOTS]
    run(spec, params, grid, seed=seed)


def _empty_cache(lead: tuple[int, int], like: Array) -> Array:
    heads, width = like.shape[-2:]
    odd = 1 if like.strides[-2] % 16 else 0  # of an address that no 16-byte load may have
    whole = np.full((*lead, heads, width + odd), np.nan, like.dtype)
    return whole[..., odd:]


def _strides(cache: Array) -> Strides:
    return Strides(*(step // cache.itemsize for step in cache.strides[:3]))
