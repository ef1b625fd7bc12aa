"""The kernels of a StepPlan: ``fa::StepParams``, what cuts the keys of a step, what attends in its blocks, and what combines their parts.

``cuda/attention/step_schedule.cuh`` says how the work is cut.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self

from ..problem import ArrayInfo, AttentionProblem, StepShape
from ..types import DType
from .attention import AttentionSpec
from .forward import FwdParams, band_params
from .kvcache import KEYS_OF_SPLIT, CombineSpec, Fa2KvCacheSpec, KvCacheParams, KvCacheSpec, row_blocks
from .params import KernelParams
from .spec import KernelSpec, Tile

__all__ = ["SCHEDULE_HEAD", "ScheduledKvCacheSpec", "StepCombineSpec", "StepParams", "StepScheduleSpec", "schedule_bytes"]

SCHEDULE_HEAD: Final = 32  # bytes of its head; zeros there say that there was no schedule yet
_SCHEDULE_WARPS: Final = 16
_COMBINE_WARPS: Final = 4
_COMBINE_BLOCKS: Final = 8  # of the combine for each of the attention: rows that are combined side by side
_MOST_RESIDENT: Final = 2  # blocks of an SM: one loads while the other one merges and begins anew
_MOST_REGISTERS: Final = 255  # of a thread: more blocks shall not take any
_RESERVED_SHARED: Final = 1024  # bytes that CUDA takes of an SM's shared memory for each block


class StepParams(KernelParams):
    """``fa::StepParams``. Its addresses run on into those of ``fa::KvCacheParams``."""

    SLOTS = ("schedule", *KvCacheParams.SLOTS)
    _fields_ = (
        ("schedule", ctypes.c_void_p),
        ("cache", KvCacheParams),
        *((name, ctypes.c_int32) for name in ("blocks", "least_cost")),
    )


def schedule_bytes(batch: int, blocks_m: int, blocks: int) -> int:
    """Size of a ``fa::StepSchedule``: its head, where each part of the line begins, where row blocks begin, and which they are."""
    count = batch * blocks_m
    return SCHEDULE_HEAD + 32 * blocks + 8 * (count + 1) + 4 * count


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledKvCacheSpec(Fa2KvCacheSpec):
    """``Fa2KvCacheSpec`` in as many blocks as the SMs hold, which share the keys of all sequences equally."""

    HEADER: ClassVar[str] = "step_kvcache"
    ENTRY: ClassVar[str] = "step_kvcache"
    PARAMS: ClassVar[str] = "StepParams"
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})  # one tile for all layers of a plan: no search has it

    @classmethod
    def resident(cls, **fields: Any) -> Self:
        """The spec of these fields, whose tile says how many of its blocks an SM surely holds."""
        spec = cls(**fields)
        for blocks in range(_MOST_RESIDENT, 1, -1):
            fuller = replace(spec, tile=replace(spec.tile, min_blocks=blocks))
            if blocks * (spec.shared_memory + _RESERVED_SHARED) <= spec.arch.shared_memory_per_sm and fuller.registers_hold(
                _MOST_REGISTERS
            ):
                return fuller
        return spec

    def config(self) -> dict[str, Any]:
        """With what says that blocks have parts."""
        return Fa2KvCacheSpec.config(self) | {"scheduled": True}

    def pack_call(self, problem: AttentionProblem, out: ArrayInfo, parts: int) -> KernelParams:
        """``fa::StepParams`` of one call without addresses; ``parts``: blocks of a plan."""
        return StepParams(cache=self.pack_splits(problem, out, 1), blocks=parts, least_cost=self.least_cost)

    @property
    def least_cost(self) -> int:
        """Tiles of the least part of a unit that is worth a block of its own."""
        return KEYS_OF_SPLIT // self.tile.block_n

    def grid(self, tiles: int, multiprocessors: int, blocks: int | None = None) -> int:  # noqa: ARG002 - as its base
        """``blocks``, those of a plan, or as many as the SMs hold."""
        return blocks or multiprocessors * self.tile.min_blocks

    def steps(self) -> tuple[KernelSpec, ...]:
        """And what combines its parts."""
        return (self, StepCombineSpec.after(self))

    def workspace(self, blocks: int) -> dict[str, int]:
        """Bytes of the partial results of so many blocks, two each, by slot."""
        rows = 2 * blocks * self.tile.block_m
        return {"partial_o": 4 * rows * self.v_head_dim, "partial_sum": 8 * rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCombineSpec(CombineSpec):
    """A block combines some rows of a unit, one after the other."""

    HEADER: ClassVar[str] = "step_combine"
    ENTRY: ClassVar[str] = "step_combine"
    PARAMS: ClassVar[str] = "StepParams"

    @classmethod
    def after(cls, spec: ScheduledKvCacheSpec) -> Self:
        """The one that goes behind ``spec``."""
        return cls.behind(spec, replace(spec.tile, warps=_COMBINE_WARPS, stages=1), pack_gqa=True)

    def config(self) -> dict[str, Any]:
        """As of what it goes behind."""
        return AttentionSpec.config(self) | {"any_ratio": True, "scheduled": True}

    def work_tiles(self, problem: AttentionProblem) -> int:
        """Some, where there is an output."""
        return min(1, prod(problem.out_shape))

    def grid(self, tiles: int, multiprocessors: int, blocks: int | None = None) -> int:  # noqa: ARG002 - as its base
        """Some for each block of the attention."""
        return _COMBINE_BLOCKS * (blocks or multiprocessors * self.tile.min_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScheduleSpec(KvCacheSpec):
    """One block cuts the keys of a step. What is computed counts for nothing but the mask; so layers of other types share it."""

    HEADER: ClassVar[str] = "step_schedule"
    ENTRY: ClassVar[str] = "step_schedule"
    PARAMS: ClassVar[str] = "StepParams"

    @classmethod
    def before(cls, spec: ScheduledKvCacheSpec) -> Self:
        """The one that ``spec`` waits for."""
        tile = Tile(block_m=spec.tile.block_m, block_n=spec.tile.block_n, warps=_SCHEDULE_WARPS)
        return cls(
            arch=spec.arch,
            dtype=DType.F16,
            head_dim=32,
            v_head_dim=32,
            tile=tile,
            left_bound=spec.left_bound,
            right_bound=spec.right_bound,
            sink_tokens=spec.sink_tokens,
            varlen=spec.varlen,
            pack_gqa=True,
        )

    def config(self) -> dict[str, Any]:
        """As of what it cuts for."""
        return AttentionSpec.config(self) | {"any_ratio": True, "scheduled": True}

    @property
    def shared_memory(self) -> int:
        """The sums of each thread."""
        return 16 * self.threads

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """Its sums wait for each other."""
        return ("BAR.SYNC",)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """One: all of it."""
        return min(1, prod(problem.out_shape))

    def pack_shape(self, shape: StepShape, spec: ScheduledKvCacheSpec, blocks: int) -> StepParams:
        """``fa::StepParams`` of a plan without addresses; ``spec``: what attends, in ``blocks`` blocks."""
        group = shape.heads // shape.heads_kv
        forward = FwdParams(
            batch=shape.batch,
            heads=shape.heads,
            heads_per_kv=group,
            seqlen_q=shape.seqlen_q,
            blocks_m=row_blocks(shape.seqlen_q * group, spec.tile),
            work_heads=shape.heads_kv,
            **band_params(shape.band),
        )
        cache = KvCacheParams(fwd=forward, capacity=shape.capacity, new_tokens=shape.new_tokens or 0, splits=1)
        return StepParams(cache=cache, blocks=blocks, least_cost=spec.least_cost)
