"""Repeat a functional call over a KV cache on CUDA torch tensors: what :mod:`.repeat` does for those on plain K and V, in the same tables.

Beside what those have, such a call may have a table, lengths, new tokens, cos and sin, descales, a StepPlan and an ``out``, and its plan up
to three launches and memory that they share. All that its plan depends on is in the key that it is found by: of every tensor what a guard
reads and the low bits of its address, which arguments there are, every number, and the shape that a StepPlan was made for.

What the checks say of addresses, a repeated call says too. An array that the call writes, as a cache under new tokens or an ``out``, lies
apart from all others: the bytes between first and last element do, or the checks found at the same distance that no element is shared, as
of K and V in turns in one array. Autograd records none of these calls: one on tensors that want gradients, while those are enabled, goes
to the checks, which refuse it. So does a call before the first schedule of its StepPlan, and a length that there are not the slots for.

A length that is a number becomes an int32 tensor by a kernel, in every call: a kept one would belong to one stream, or to a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ..arrays.new import filled_int32
from ..arrays.torch_hooks import NewTensor, array_of, empty_on, hooks, maker_of
from ..dispatch import FaFwdDispatch
from ..env import settings
from ..launch.error_word import error_word
from ..requests.step_plan import StepPlan
from ..runtime.execute import written_arrays
from ..runtime.on_cache import STEP_SLOTS, in_order
from ..runtime.plan import Key, Output, Plan
from . import repeat
from .repeat import Known, Numbers, Recording, Tensors, find, keep, never, plain_numbers, reach_of, recording_of

__all__ = ["CacheCall", "remember_on_cache", "repeat_on_cache"]

# (q, K, V), numbers as repeat has them, and flat, with None for what there is not: the length of every sequence where no array has them
# (None for all slots), num_splits, rotary_interleaved, batch_invariant (or the longest lengths of packed q and K, and None); lengths, block
# table, rows, left padding, new k and v, cos, sin, offsets of q and of the lengths, slopes, learned sink, descales of q, k and v, ``out``.
# Last the StepPlan, or None.
CacheCall: TypeAlias = tuple[Tensors, Numbers, tuple[Any, ...], Any]

_FIRST_BESIDE: Final = 4  # place of lengths, the first that may be an array
# What there may be from there on, by the slots that the addresses go to.
_BESIDE: Final = (
    *("cache_lengths", "blocks", "blocks", "left_pad", "new_k", "new_v", "cos", "sin", "cu_seqlens_q", "cu_seqlens_k"),
    *("alibi_slopes", "learned_sink", "q_descale", "k_descale", "v_descale", "o"),
)
_MADE: Final = ("nothing", "o", "lse", "cache_lengths", "error", *STEP_SLOTS)  # addresses of a call that are not its arguments'
_EXACT: Final = frozenset({int, bool, type(None)})
_NO_STEP: Final = (0, 0, 0)
_NO_OTHERS: Final = (None, None, None)
_WANTING: Final = (True,)  # in the place of a recording: some tensor wants gradients, and they are not enabled
_MOST_DISTANCES: Final = 64
_MOST_SEEN: Final = 256  # a call for each layer of a model


@dataclass(slots=True, eq=False)
class _OnCache(Known):
    """A plan, and what is needed to run it for a call over a cache.

    Attributes:
        launch: runs the plan on addresses of ``_MADE``, of the room, and of the tensors.
        recording: () or ``_WANTING``.
        make_out: makes the output on the GPU of q; None when the caller brings it.
        make_lse: None where it is not asked for.
        make_room: makes the memory that the launches share, None for none.
        places: where its arrays begin.
        counted: (sequences, slots of each) where lengths are one number; else None.
        error: address of the error word.
        written: places of the tensors that the call writes.
        reaches: bytes between the first and the last element of every tensor, both included.
        apart: (place of a written tensor, place of another, distance) of those that the checks found to share no element.
        seen: addresses of all tensors in calls of before, in which no written one shared an element with another.
    """

    launch: Callable[[int, tuple[int, ...]], None]
    device_index: int
    recording: Recording
    make_out: Callable[[Any], Any] | None
    make_lse: Callable[[Any], Any] | None
    make_room: Callable[[Any], Any] | None
    places: tuple[int, ...]
    counted: tuple[int, int] | None
    error: int
    written: tuple[int, ...]
    reaches: tuple[int, ...]
    apart: set[tuple[int, int, int]]
    seen: set[tuple[int, ...]]


def repeat_on_cache(call: CacheCall) -> tuple[Key | None, tuple[Any, Any] | None]:  # noqa: C901, PLR0911, PLR0912 - as repeat
    """Answer a call as one like it was answered before.

    Returns:
        (key, (o, LSE or None)): without the pair there is no shortcut; without a key there cannot be one.
    """
    arrays, numbers, flat, step = call
    numbers, kinds, choices = plain_numbers(numbers), tuple(map(type, flat)), flat[:_FIRST_BESIDE]
    if (
        numbers is None
        or not _EXACT.issuperset(kinds[:_FIRST_BESIDE])
        or not (step is None or type(step) is StepPlan)
        or hooks.forward_ad._current_level >= 0  # noqa: SLF001 - as repeat has it
        or hooks.count_modes()
    ):
        return None, None
    asked: Key = (numbers, choices[1:], kinds, None if step is None else step.shape)
    tensors = (*arrays, *[x for x in flat[_FIRST_BESIDE:] if x is not None])
    found = repeat.latest.get(asked)
    if found is None or not found.same(*tensors) or (found.recording and hooks.is_grad_enabled()):
        found, recording = None, recording_of(tensors, _NO_OTHERS, deterministic=False)
        if recording != ():
            return None, None
        recording = _WANTING if any(tensor.requires_grad for tensor in tensors) else ()
    else:
        recording = found.recording
    pointers = [tensor.data_ptr() for tensor in tensors]
    if not all(pointers):
        return None, None  # empty, or freed under its tensor: to a kernel, address 0 is an array that there is not
    alignment: Any = 0
    for pointer in pointers:
        alignment |= pointer & 15
    if alignment:  # which of them it is decides on the plan
        alignment = tuple([pointer & 15 for pointer in pointers])
    if found is None or found.alignment != alignment:
        key, found = find(asked, alignment, tensors, recording, guards=True)
        if found is None:
            return key, None
    if found.written and not _are_apart(found, pointers):
        return find(asked, alignment, tensors, recording, guards=True)[0], None
    at_step = _NO_STEP
    if step is not None:
        buffers = step._buffers  # noqa: SLF001 - what requests get of it
        if not buffers.scheduled:
            return None, None
        at_step = buffers.schedule, buffers.partial_o, buffers.partial_sum
    q, index, count, lengths = tensors[0], found.device_index, choices[0], 0
    if found.counted is not None:
        batch, slots = found.counted
        if count is None:
            count = slots
        elif not 0 <= count <= slots:
            return None, None
        counted = filled_int32(batch, count, q)
        lengths = counted.data_ptr()
    out, lse, at_lse = flat[-1], None, 0
    if found.make_out is not None:
        out = found.make_out(q)
    if found.make_lse is not None:
        lse = found.make_lse(q)
        at_lse = lse.data_ptr()
    places: Any = ()
    if found.make_room is not None:
        room = found.make_room(q)
        base = room.data_ptr()
        places = [base + place for place in found.places]
    found.launch(hooks.raw_stream(index), (0, out.data_ptr(), at_lse, lengths, found.error, *at_step, *places, *pointers))
    for place in found.written:
        hooks.increment_version(tensors[place])
    return None, (out, lse)


def remember_on_cache(key: Key, call: CacheCall, request: FaFwdDispatch, output: Output, plan: Plan | None) -> None:
    """Keep a shortcut to the plan of the request that was made for ``call``; does nothing where a shortcut would not be enough."""
    if plan is None or not plan.launches or settings().debug:
        return
    arrays, _, flat, _ = call
    beside = flat[_FIRST_BESIDE:]
    tensors = (*arrays, *[x for x in beside if x is not None])
    _, alignment, recording, *facts = key
    pointers = [tensor.data_ptr() for tensor in tensors]
    reaches = tuple(reach_of(*facts[4 * i : 4 * i + 3]) for i in range(len(tensors)))
    written = tuple(i for i, tensor in enumerate(tensors) if any(tensor is each.source for each in written_arrays(request)))
    apart = set(_near(written, reaches, pointers))
    known = repeat.shortcuts.get(key)
    if known is not None:  # the arrays lie at other distances
        known.apart = apart if len(known.apart) >= _MOST_DISTANCES else known.apart | apart
        return
    device_index, room = plan.launches[0].device_index, plan.workspace
    assert room is not None  # noqa: S101 - every call over a cache has one, perhaps of no bytes
    names = ["q", "k", "v", *[name for name, x in zip(_BESIDE, beside, strict=True) if x is not None]]
    places = {name: place for place, name in enumerate((*_MADE, *room.offsets, *names))}
    brings_lengths = "cache_lengths" in names or "cu_seqlens_k" in names
    cache = request.problem.cache
    made = _OnCache(
        alignment=alignment,
        same=never,
        launch=plan.on_places(in_order(places)).launch,
        device_index=device_index,
        recording=recording,
        make_out=None if request.out_array is not None else _maker(device_index, array_of(output.out)),
        make_lse=None if output.lse is None else _maker(device_index, array_of(output.lse)),
        make_room=None if not room.size else _maker(device_index, ((room.size // 4,), (1,), sys.modules["torch"].float32)),
        places=tuple(room.offsets.values()),
        counted=None if brings_lengths or cache is None else (request.problem.batch, cache.capacity),
        error=error_word(device_index),
        written=written,
        reaches=reaches,
        apart=apart,
        seen=set(),
    )
    keep(key, made)


def _maker(device_index: int, array: NewTensor) -> Callable[[Any], Any]:
    """A function that makes such a tensor on the GPU of the one that it gets."""
    make = maker_of(array)
    return (lambda like: empty_on(device_index, like, array)) if make is None else lambda _like: make()


def _near(written: tuple[int, ...], reaches: tuple[int, ...], pointers: list[int]) -> list[tuple[int, int, int]]:
    """Pairs of a written tensor and another one whose bytes lie within each other, by place and distance."""
    near = []
    for i in written:
        start, end = pointers[i], pointers[i] + reaches[i]
        near += [(i, j, at - start) for j, at in enumerate(pointers) if at < end and start < at + reaches[j] and i != j]
    return near


def _are_apart(found: _OnCache, pointers: list[int]) -> bool:
    """Whether no written tensor shares an element with another one, as far as is known; the checks know the rest."""
    at, seen = tuple(pointers), found.seen
    if at in seen:  # a comparison of all pairs costs 2 us
        return True
    near = _near(found.written, found.reaches, pointers)
    if near and not found.apart.issuperset(near):
        return False
    if len(seen) >= _MOST_SEEN:
        seen.clear()
    seen.add(at)
    return True
