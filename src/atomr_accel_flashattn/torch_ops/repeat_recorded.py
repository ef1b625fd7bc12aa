"""What a shortcut of a recorded call launches, forward and backward. :mod:`.repeat` finds it.

The forward goes by a shortcut, whose key has in it which tensors want gradients. The backward goes by plans that are kept beside it, found
by the strides and alignment of dO, the presence of dLSE, and whether gradients are to be deterministic: all else that a backward plan
depends on is fixed by the forward's key, as long as the saved tensors lie where they lay, as they lay. Where they do not, as when hooks of
autograd brought them back from the host (``save_on_cpu`` makes them row-major, and they may find the very memory that they left), or where
a gradient is no plain tensor, the backward goes the whole way of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..arrays.torch_hooks import NewTensor, empty_on, hooks
from ..runtime.plan import Key, Output, Plan
from .repeat import Shortcut, launch_more, remember

if TYPE_CHECKING:
    from .attention_function import Saved
    from .first_call import Asked

__all__ = ["BackwardLaunch", "remember_recorded"]

_MOST_PLANS: Final = 64  # of backwards, of one forward


def remember_recorded(key: Key, plan: Plan, output: Output, asked: Asked, *, gives_lse: bool) -> None:
    """Keep a shortcut to the forward that made ``output`` and was recorded; does nothing where it would not be enough."""
    from .attention_function import apply_quickly

    remember(key, plan, output, recorded=lambda shortcut: partial(apply_quickly, _Recorded(shortcut, asked, gives_lse=gives_lse)))


@dataclass(frozen=True, slots=True, eq=False)
class BackwardLaunch:
    """A plan, and what its call makes: dq, dk, dv and the workspace, and dsink; ``offsets`` in the workspace.

    ``statistics_in_dq``: those of the rows lie there until dq is written, else they are the first array of the workspace.
    """

    launch: Callable[[int, tuple[int, ...]], None]
    device_index: int
    arrays: tuple[NewTensor, ...]
    dsink: NewTensor | None
    offsets: tuple[int, ...]
    statistics_in_dq: bool

    @classmethod
    def of(cls, plan: Plan, saved: Saved) -> BackwardLaunch:
        """Of the plan of a backward that was found for these saved tensors."""
        q, k, v, learned_sink, _, lse, *_ = saved
        assert plan.workspace is not None  # noqa: S101 - every backward has one
        arrays = tuple((tuple(x.shape), strides, x.dtype) for x, strides in zip((q, k, v), plan.out_strides, strict=True))
        workspace = (plan.workspace.size // lse.dtype.itemsize,), (1,), lse.dtype
        dsink = None if learned_sink is None else (tuple(learned_sink.shape), (1,), lse.dtype)
        offsets = plan.workspace.offsets
        return cls(plan.launch, q.get_device(), (*arrays, workspace), dsink, tuple(offsets.values()), "statistics" not in offsets)

    def gradients(
        self, q: Any, dout: Any, dlse: Any, pointers: tuple[int, ...], learned_sink: Any, others: Sequence[Any]
    ) -> tuple[Any, Any, Any, Any]:
        """Make them and launch; ``pointers``: of q, k, v, o and LSE; ``others``: slopes, seed and offsets, or nothing."""
        index = self.device_index
        dq, dk, dv, room = (empty_on(index, q, each) for each in self.arrays)
        dsink = None if self.dsink is None else empty_on(index, q, self.dsink)
        base = room.data_ptr()
        addresses = (
            0 if dout is None else dout.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            *((dq.data_ptr(),) if self.statistics_in_dq else ()),
            *[base + offset for offset in self.offsets],
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            0 if dsink is None else dsink.data_ptr(),
            *pointers,
        )
        if others:
            slopes, rng, cu_seqlens_q, cu_seqlens_k = others
            more = (cu_seqlens_q, cu_seqlens_k, slopes, learned_sink, rng)
            addresses = (*addresses, *(0 if each is None else each.data_ptr() for each in more))
        else:
            addresses = (*addresses, 0, 0, 0, 0, 0)
        self.launch(hooks.raw_stream(index), addresses)
        return dq, dk, dv, dsink


@dataclass(slots=True, eq=False)
class _Recorded:
    """A shortcut whose forward autograd records; ``plans``: those of its backward, by what can differ."""

    shortcut: Shortcut
    asked: Asked
    gives_lse: bool
    plans: dict[Key, BackwardLaunch] = field(default_factory=dict)

    def keep(self, key: Key, plan: Plan, saved: Saved) -> None:
        """Remember the plan of a backward that was found for these saved tensors."""
        if len(self.plans) >= _MOST_PLANS:
            self.plans.clear()
        self.plans[key] = BackwardLaunch.of(plan, saved)

    def forward(self, *inputs: Any) -> tuple[Any, Saved, _Again]:
        """Make the outputs and launch."""
        found = self.shortcut
        q, k, v, *others = inputs
        assert found.out is not None  # noqa: S101 - no recorded call brings o
        out = empty_on(found.device_index, q, found.out) if found.make_out is None else found.make_out()
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        learned_sink, slopes, cu_seqlens_q, cu_seqlens_k = others or (None, None, None, None)
        packing = None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k, 0, 0)
        lse, rng = launch_more(found, pointers, q, packing, (slopes, learned_sink, None))
        saved: Saved = (q, k, v, learned_sink, out, lse)
        if others or rng is not None:
            saved = (*saved, slopes, rng, cu_seqlens_q, cu_seqlens_k)
        return (out, lse, None) if self.gives_lse else out, saved, _Again(self, (*pointers, lse.data_ptr()), _strides_of(saved))


@dataclass(slots=True, eq=False)
class _Again:
    """The backward of one call; ``pointers``: where q, k, v, o and LSE lay; ``strides``: those of all arrays that have several."""

    call: _Recorded
    pointers: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def gradients(self, saved: Saved, dout: Any, dlse: Any) -> tuple[Any, Any, Any, Any]:
        """By a plan of before, else by a request, whose plan is kept."""
        q, k, v, learned_sink, out, lse, *others = saved
        call = self.call
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr())
        if pointers != self.pointers or _strides_of(saved) != self.strides or not _are_usual(dout, dlse):
            return call.asked.gradients(saved, dout, dlse)
        for beside in (dout, dlse, learned_sink, *others):
            if beside is not None and not beside.data_ptr():
                return call.asked.gradients(saved, dout, dlse)  # which refuses what was freed under its tensor
        key = (None, 0) if dout is None else (dout.stride(), dout.data_ptr() & 15)
        key = (*key, dlse is None, call.asked.wants_determinism)
        plan = call.plans.get(key)
        if plan is None:
            made, found = call.asked.gradients_and_plan(saved, dout, dlse)
            if found is not None:
                call.keep(key, found, saved)
            return made
        return plan.gradients(q, dout, dlse, pointers, learned_sink, others)

    def by_operator(self, saved: Saved, dout: Any, dlse: Any) -> tuple[Any, Any, Any, Any]:
        """As after a first call."""
        return self.call.asked.by_operator(saved, dout, dlse)


def _strides_of(saved: Saved) -> tuple[tuple[int, ...], ...]:
    """Of q, k, v, o and slopes. The other saved tensors are row-major."""
    q, k, v, _, out, _, *others = saved
    strides = q.stride(), k.stride(), v.stride(), out.stride()
    return (*strides, others[0].stride()) if others and others[0] is not None else strides


def _are_usual(dout: Any, dlse: Any) -> bool:
    """Whether gradients are plain tensors that a request takes as they are, and nobody records what becomes of them."""
    plain = hooks.plain_types
    return (
        (dout is None or (type(dout) in plain and dout.stride(-1) == 1 and not dout.is_neg()))
        and (dlse is None or (type(dlse) in plain and dlse.is_contiguous() and not dlse.is_neg()))
        and not hooks.is_grad_enabled()
    )
