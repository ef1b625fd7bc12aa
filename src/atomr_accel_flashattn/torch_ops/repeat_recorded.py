"""Repeat a functional call that autograd records, forward and backward: what :mod:`.repeat` does for calls that it does not.

The forward goes by a shortcut, whose key has in it which tensors want gradients. The backward goes by plans that are kept beside it, found
by the strides and alignment of dO, the presence of dLSE, and whether gradients are to be deterministic: all else that a backward plan
depends on is fixed by the forward's key, as long as the saved tensors lie where they lay. Where they do not, as when hooks of autograd
brought them back from the host, or where a gradient is no plain tensor, the backward goes the whole way of a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..arrays.torch_hooks import NewTensor, empty_on, hooks, meet_torch, recorder
from ..runtime.plan import Key, Output, Plan
from . import repeat
from .repeat import (
    NOWHERE,
    Numbers,
    Others,
    Packing,
    Shortcut,
    are_plain,
    describe,
    find_shortcut,
    has_memory,
    launch_more,
    remember,
)

if TYPE_CHECKING:
    from .attention_function import Saved
    from .first_call import Asked

__all__ = ["remember_recorded", "repeat_recorded"]

_MOST_PLANS: Final = 64  # of backwards, of one forward


def repeat_recorded(
    q: Any, k: Any, v: Any, packing: Packing | None, numbers: Numbers, others: Others, *, deterministic: bool
) -> tuple[Key | None, Any]:
    """Answer a recorded call as one like it was answered before.

    Returns:
        (key, result): result is None when there is no shortcut; key is None when there cannot be one.
    """
    if (
        hooks.is_grad_enabled is None
        or not hooks.is_grad_enabled()
        or others[2] is not None
        or not are_plain(numbers)
        or (packing is not None and not type(packing[2]) is type(packing[3]) is int)
        or hooks.forward_ad._current_level >= 0  # noqa: SLF001 - a tensor may have a tangent, which the guard does not see
        or hooks.count_modes()  # make_fx may be recording
    ):
        return None, None
    slopes, learned_sink, _ = others
    described, tensors = describe(q, k, v, packing, numbers, others)
    call = (*described, "recorded", deterministic)
    found = repeat.latest.get(call)
    if found is None or not found.same(*tensors):
        found = None
        if not _may_be_recorded(tensors, slopes):
            return None, None
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr()
    alignment = (pointers[0] | pointers[1] | pointers[2]) & 15 | (0 if all(pointers) else NOWHERE)
    if found is None or found.alignment != alignment:
        wanting = tuple(tensor.requires_grad for tensor in tensors)
        key, found = find_shortcut(call, alignment, tensors, recorded=wanting)
        if found is None:
            return key, None
    lengths = (None, None) if packing is None else packing[:2]
    out, lse, _ = found.recorded(q, k, v, learned_sink, slopes, *lengths)
    return None, (out, lse, None) if numbers[-1] else out


def remember_recorded(key: Key, plan: Plan, output: Output, asked: Asked) -> None:
    """Keep a shortcut to the forward that made ``output`` and was recorded; does nothing where it would not be enough."""
    from .attention_function import Attention

    remember(key, plan, output, recorded=lambda shortcut: partial(Attention.apply, _Recorded(shortcut, asked)))


def _may_be_recorded(tensors: tuple[Any, ...], slopes: Any) -> bool:
    """Whether these are plain tensors of torch, on a GPU, some of which want gradients that there are, and nothing else records them."""
    if not hooks.plain_types:
        meet_torch()
    types = hooks.plain_types
    return (
        all(type(tensor) in types for tensor in tensors)
        and tensors[0].is_cuda
        and any(tensor.requires_grad for tensor in tensors)
        and (slopes is None or not slopes.requires_grad)
        and not any(tensor.is_neg() for tensor in tensors)
        and not recorder()
        and all(map(has_memory, tensors))
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Backward:
    """A plan, and what its call makes: dq, dk, dv and the workspace, and dsink; ``offsets`` in the workspace."""

    launch: Callable[[int, tuple[int, ...]], None]
    arrays: tuple[NewTensor, ...]
    dsink: NewTensor | None
    offsets: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Recorded:
    """A shortcut whose forward autograd records; ``plans``: those of its backward, by what can differ."""

    shortcut: Shortcut
    asked: Asked
    plans: dict[Key, _Backward] = field(default_factory=dict)

    def keep(self, key: Key, plan: Plan, saved: Saved) -> None:
        """Remember the plan of a backward that was found for these saved tensors."""
        q, k, v, learned_sink, _, lse, *_ = saved
        assert plan.workspace is not None  # noqa: S101 - every backward has one
        arrays = tuple((tuple(x.shape), strides, x.dtype) for x, strides in zip((q, k, v), plan.out_strides, strict=True))
        workspace = (plan.workspace.size // lse.dtype.itemsize,), (1,), lse.dtype
        dsink = None if learned_sink is None else (tuple(learned_sink.shape), (1,), lse.dtype)
        if len(self.plans) >= _MOST_PLANS:
            self.plans.clear()
        self.plans[key] = _Backward(plan.launch, (*arrays, workspace), dsink, tuple(plan.workspace.offsets.values()))

    def forward(self, *inputs: Any) -> tuple[tuple[Any, Any, Any], Saved, _Again]:
        """Make the outputs and launch."""
        found = self.shortcut
        q, k, v, learned_sink, slopes, cu_seqlens_q, cu_seqlens_k = inputs
        assert found.out is not None  # noqa: S101 - no recorded call brings o
        out = empty_on(found.device_index, q, found.out) if found.make_out is None else found.make_out()
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        packing = None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k, 0, 0)
        lse, rng = launch_more(found, pointers, q, packing, (slopes, learned_sink, None))
        saved = (q, k, v, learned_sink, out, lse, slopes, rng, cu_seqlens_q, cu_seqlens_k)
        return (out, lse, None), saved, _Again(self, (*pointers, lse.data_ptr()))


@dataclass(slots=True, eq=False)
class _Again:
    """The backward of one call; ``pointers``: where q, k, v, o and LSE lay."""

    call: _Recorded
    pointers: tuple[int, ...]

    def gradients(self, saved: Saved, dout: Any, dlse: Any) -> tuple[Any, Any, Any, Any]:
        """By a plan of before, else by a request, whose plan is kept."""
        q, k, v, learned_sink, out, lse, slopes, rng, cu_seqlens_q, cu_seqlens_k = saved
        call = self.call
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr())
        if pointers != self.pointers or not _are_usual(dout, dlse):
            return call.asked.gradients(saved, dout, dlse)
        key = (None, 0) if dout is None else (dout.stride(), dout.data_ptr() & 15)
        key = (*key, dlse is None, call.asked.wants_determinism)
        plan = call.plans.get(key)
        if plan is None:
            made, found = call.asked.gradients_and_plan(saved, dout, dlse)
            if found is not None:
                call.keep(key, found, saved)
            return made
        index = call.shortcut.device_index
        dq, dk, dv, room = (empty_on(index, q, each) for each in plan.arrays)
        dsink = None if plan.dsink is None else empty_on(index, q, plan.dsink)
        base = room.data_ptr()
        addresses = (
            *(0 if dout is None else dout.data_ptr(), 0 if dlse is None else dlse.data_ptr()),
            *(dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), 0 if dsink is None else dsink.data_ptr()),
            *pointers,
            *(0 if each is None else each.data_ptr() for each in (cu_seqlens_q, cu_seqlens_k, slopes, learned_sink, rng)),
            *(base + offset for offset in plan.offsets),
        )
        plan.launch(hooks.raw_stream(index), addresses)
        return dq, dk, dv, dsink


def _are_usual(dout: Any, dlse: Any) -> bool:
    """Whether gradients are plain tensors that a request takes as they are, and nobody records what becomes of them."""
    plain = hooks.plain_types
    return (
        (dout is None or (type(dout) in plain and dout.stride(-1) == 1 and not dout.is_neg()))
        and (dlse is None or (type(dlse) in plain and dlse.is_contiguous() and not dlse.is_neg()))
        and not hooks.count_modes()
        and not hooks.is_grad_enabled()
    )
