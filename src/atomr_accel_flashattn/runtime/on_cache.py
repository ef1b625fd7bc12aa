"""Plans of calls on a KV cache: new tokens first, then the kernel over the cache, then what combines its splits.

Calls on plain K and V that are batch-invariant, or whose keys are split, have the plan of one without new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, Final

from ..dispatch import DispatchKey, lookup
from ..dispatch.choice import splits_of, step_blocks
from ..errors import ShapeError, StepPlanError
from ..kernels.fa3_kvcache import Fa3KvCacheSpec
from ..kernels.forward import DESCALE_SLOTS
from ..kernels.fp8_kvcache import DescaledKvCacheParams, DescaledStepParams
from ..kernels.kv_append import KvAppendSpec, rotated_bytes, rotated_strides
from ..kernels.kvcache import Fa2KvCacheSpec, KvCacheParams
from ..kernels.step import StepParams
from ..launch.error_word import error_word
from ..launch.launcher import Launch, LaunchSeries
from ..limits import MAX_GRID
from ..problem import AttentionProblem
from .plan import SLOTS, SLOTS_OF_SPLIT, Outputs, Plan, Workspace, descale_addresses, forward_addresses, launch_of, series_of
from .staleness import arrays_of_cache

__all__ = ["STEP_SLOTS", "cache_addresses", "check_scheduled", "in_order", "plan_on_cache", "workspace_on_cache"]

# Addresses of a call in this order: those of KvCacheParams, those that only an append has (to it, q is what it reads), a StepPlan's, those
# of descales.
_APPENDED: Final = ("new_k", "new_v", "cos", "sin", "rotated_q", "raw_q")
_SLOTS: Final[tuple[str, ...]] = (*KvCacheParams.SLOTS, *_APPENDED, "schedule", *DESCALE_SLOTS)
_BESIDE: Final = ("blocks", "cache_lengths", "left_pad", "new_k", "new_v", "cu_seqlens_new", "cos", "sin")  # as arrays_of_cache has them
STEP_SLOTS: Final = ("schedule", "partial_o", "partial_sum")  # of StepBuffers
_SLOTS_OF_APPEND: Final = tuple({"q": "attended_q", "raw_q": "q"}.get(slot, slot) for slot in _SLOTS)


def check_scheduled(problem: AttentionProblem) -> None:
    """Raise StepPlanError where a call has a StepPlan that was never scheduled."""
    if problem.step is not None and not problem.step.scheduled:
        raise StepPlanError("plan: got a call before the first schedule of its StepPlan; allowed behind plan.schedule(...) of its step")


def workspace_on_cache(problem: AttentionProblem, key: DispatchKey) -> Workspace | None:
    """What a call needs beside its outputs: partial results of splits, and q after its rotation.

    None on the CPU, and of plain K and V that are not split.
    """
    spec = lookup(key)
    return _workspace(problem, spec, _parts(problem, spec)) if isinstance(spec, (Fa2KvCacheSpec, Fa3KvCacheSpec)) else None


def plan_on_cache(problem: AttentionProblem, spec: Fa2KvCacheSpec | Fa3KvCacheSpec, outputs: Outputs) -> Plan:
    """The launches of a call, into these outputs.

    Raises:
        ShapeError: more blocks than a grid has.
        RuntimeFlashAttnError: a kernel does not compile or load.
    """
    parts, cache = _parts(problem, spec), problem.cache
    launches: list[Launch | LaunchSeries | None] = []
    rotated, slots = problem, _SLOTS
    if cache is None:
        slots = SLOTS_OF_SPLIT if problem.descales is None else (*SLOTS_OF_SPLIT, *DESCALE_SLOTS)
    if cache is not None and cache.new is not None:
        append = KvAppendSpec.for_cache(spec.arch.without_wgmma, problem)
        launches.append(launch_of(append, problem, append.pack_call(problem, outputs.out), _SLOTS_OF_APPEND))
        if cache.new.rotary is not None:
            rotated = replace(problem, q_strides=rotated_strides(problem))
    blocks = spec.work_tiles(problem) * parts
    if blocks > MAX_GRID and problem.step is None:
        raise ShapeError(f"num_splits: got {parts} for a call of {blocks // parts} work tiles, {blocks} in all; allowed are {MAX_GRID}")
    params = spec.pack_call(rotated, outputs.out, parts)
    first, *others = spec.steps()
    if params.MAPS or isinstance(params, (DescaledKvCacheParams, DescaledStepParams)):  # what follows reads neither maps nor descales
        launches.append(launch_of(first, problem, params, slots, parts))
        plain: Any = params if isinstance(params, KvCacheParams) else params.params
        params = (StepParams if isinstance(plain, StepParams) else KvCacheParams).from_buffer_copy(plain)
    else:
        others = [first, *others]
    launches += series_of(others, problem, params, slots, parts)
    return Plan(launches, outputs.out.strides, _workspace(problem, spec, parts))


def cache_addresses(problem: AttentionProblem, outputs: Outputs, workspace: Workspace) -> tuple[int, ...]:
    """The addresses of a call on a KV cache, in the order that its plan was made for; 0 for what it does not have."""
    cache, step, base = problem.cache, problem.step, 0 if outputs.workspace is None else outputs.workspace.ptr
    assert cache is not None  # noqa: S101 - callers have looked
    at = {slot: base + offset for slot, offset in workspace.offsets.items()}
    at |= zip(SLOTS, forward_addresses(problem, outputs.out.ptr, 0 if outputs.lse is None else outputs.lse.ptr), strict=True)
    at |= {slot: array.ptr for slot, array in zip(_BESIDE, arrays_of_cache(cache), strict=True) if array is not None}
    at["error"] = error_word(problem.q.device.index)
    if step is not None:
        check_scheduled(problem)
        at |= {slot: getattr(step, slot) for slot in STEP_SLOTS}
    if problem.descales is not None:
        at |= zip(DESCALE_SLOTS, descale_addresses(problem.descales), strict=True)
    return in_order(at)


def in_order(at: Mapping[str, int]) -> tuple[int, ...]:
    """Addresses by name, in the order that plans of calls on a cache are made for. 0 for what there is not.

    "q" is that of the call: where there is room for it rotated, kernels behind the append read that.
    """
    places = {**at, "raw_q": at["q"], "q": at.get("rotated_q", at["q"])}
    return tuple(places.get(slot, 0) for slot in _SLOTS)


def _parts(problem: AttentionProblem, spec: Fa2KvCacheSpec | Fa3KvCacheSpec) -> int:
    """Splits of the keys, or the blocks of a StepPlan."""
    if problem.step is not None:
        return step_blocks(problem.q.device, spec)
    return splits_of(problem, spec) if spec.split else 1


def _workspace(problem: AttentionProblem, spec: Fa2KvCacheSpec | Fa3KvCacheSpec, parts: int) -> Workspace:
    sizes, rows = {}, prod(problem.lse_shape)
    if spec.split:  # into one part, too, where tiles are borrowed; a StepPlan brings its own
        sizes = {"partial_o": 4 * parts * rows * problem.v_head_dim, "partial_sum": 8 * parts * rows}
    cache = problem.cache
    if cache is not None and cache.new is not None and cache.new.rotary is not None:
        sizes["rotated_q"] = rotated_bytes(problem)
    return Workspace.of(sizes)
