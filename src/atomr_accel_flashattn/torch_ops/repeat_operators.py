"""Repeat a call of an operator of torch on CUDA tensors, forward or backward.

It is found as functional calls are (:mod:`.repeat`): by a guard of torch, else by its full key, in the same tables. An operator has its
numbers from a schema, so they are numbers; autograd is done with it; and its dropout seed was drawn before. So its keys are its own.

A key has which arrays there are and all numbers, the low bits of all addresses and whether one of them is none, and of every array what
a guard looks at. A backward launches what :mod:`.repeat_recorded` launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ..arrays.torch_hooks import empty_on, hooks
from ..env import settings
from ..runtime.plan import Key, Plan
from . import repeat
from .attention_function import Saved
from .operators import Operands
from .repeat import NOWHERE, Known, Tensors, find, keep, launch_more, never, recording_of
from .repeat_recorded import BackwardLaunch

__all__ = ["Gradients", "remember_backward", "repeat_attention", "repeat_backward"]

Gradients: TypeAlias = tuple[Any, Any, Any, Any]

_NO_OTHERS: Final = (None, None, None)


@dataclass(slots=True, eq=False)
class _Backward(Known):
    """A backward that was made before."""

    launch: BackwardLaunch


def repeat_attention(call: Operands) -> tuple[Key | None, tuple[Any, Any] | None]:
    """O and LSE of ``attention`` as a call like it made them; a call that returns its pattern is none.

    Returns:
        (key, result): result is None when there is no shortcut, and key is for :func:`~.repeat.remember` if nothing had to be copied; key
        is None when there cannot be a shortcut.
    """
    if call.return_pattern:
        return None, None
    q, k, v, *others = call[:8]
    asked: Key = (call.dropout_p, *_numbers(call)), "attention", *[x is None for x in others]
    q_ptr, k_ptr, v_ptr = q.data_ptr(), k.data_ptr(), v.data_ptr()
    tensors, asked = _present((q, k, v), others, asked)
    key, found = _known(asked, (q_ptr, k_ptr, v_ptr, *_addresses(others)), tensors)
    if found is None:
        return key, None
    out = empty_on(found.device_index, q, found.out) if found.make_out is None else found.make_out()
    packing = None if call.cu_seqlens_q is None else (call.cu_seqlens_q, call.cu_seqlens_k, 0, 0)
    biases = (call.alibi_slopes, call.learned_sink, None)
    lse, _ = launch_more(found, (q_ptr, k_ptr, v_ptr, out.data_ptr()), q, packing, biases, call.rng)
    return None, (out, lse)


def repeat_backward(
    dout: Any, dlse: Any, out: Any, lse: Any, call: Operands, *, deterministic: bool
) -> tuple[Key | None, Gradients | None]:
    """dq, dk, dv and dsink of ``attention_backward`` as a call like it made them. The rest: :func:`repeat_attention`."""
    q, k, v, *others = call[:8]
    numbers = (call.dropout_p, *_numbers(call), deterministic)
    asked: Key = numbers, "backward", dout is None, dlse is None, *[x is None for x in others]
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr())
    tensors, asked = _present((q, k, v, out, lse), (dout, dlse, *others), asked)
    key, found = _known(asked, (*pointers, *_addresses((dout, dlse, *others))), tensors)
    if found is None:
        return key, None
    sink, slopes, *lengths = others
    return None, found.launch.gradients(q, dout, dlse, pointers, sink, (slopes, *lengths))


def remember_backward(key: Key, plan: Plan, saved: Saved) -> None:
    """Keep a shortcut to the plan of a backward whose request took these tensors as the operator got them."""
    if not settings().debug:
        keep(key, _Backward(key[1], never, BackwardLaunch.of(plan, saved)))


def _numbers(call: Operands) -> tuple[Any, ...]:
    return call.softmax_scale, call.window_left, call.window_right, call.softcap, call.sink_tokens, call.max_seqlen_q, call.max_seqlen_k


def _addresses(others: Any) -> list[int]:
    """Of the arrays that there are. A kernel takes the address 0 for no array."""
    return [x.data_ptr() for x in others if x is not None]


def _present(tensors: Tensors, others: Any, asked: Key) -> tuple[Tensors, Key]:
    """The tensors that there are. A guard takes none twice, and offsets of q are often those of k."""
    if others[-1] is not None and others[-1] is others[-2]:
        return (*tensors, *[x for x in others[:-1] if x is not None]), (*asked, "equal offsets")
    return (*tensors, *[x for x in others if x is not None]), asked


def _known(asked: Key, addresses: tuple[int, ...], tensors: Tensors) -> tuple[Key | None, Any]:
    """The key of a call, None where it is not needed or not allowed, and its shortcut."""
    if hooks.forward_ad._current_level >= 0 or hooks.count_modes():  # noqa: SLF001 - as functional calls have it
        return None, None
    bits = 0
    for address in addresses:
        bits |= address & 15 if address else NOWHERE
    found = repeat.latest.get(asked)
    if found is not None and found.alignment == bits and found.same(*tensors):
        return None, found
    if recording_of(tensors, _NO_OTHERS, deterministic=False) is None:
        return None, None
    return find(asked, bits, tensors, (), guards=True)
