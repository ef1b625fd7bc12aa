"""Repeat a functional call on CUDA torch tensors: what it costs when one like it was made before.

Plans lie in one store, under the keys of requests (runtime/plan.py). Making a request to find its plan costs its checks, so calls on torch
tensors have a shortcut: :func:`repeat` recognises the call, makes the outputs and runs the plan. Nothing is validated again, nothing is
synchronised, and nothing is allocated but the outputs, so the calls can be captured in a CUDA graph.

What a shortcut is found by, and why that is enough. A plan is a function of: shapes, strides, element types and devices of every
array; which arrays there are; whether all addresses and strides are multiples of 16 bytes (vector loads and TMA); every number of the
call. All of these are looked at. Addresses, the stream and the dropout seed are read anew by every call. Gradients and an ``out`` that
lies where an input does are looked at by every call, because they are no part of shapes. Shortcuts are kept only of calls that went the
whole way of checks, and only when the numbers are numbers (a tensor used as a number compares by identity, and may change).

A call is first compared with the last one of the same numbers. torch does that with a tensor guard, one C function that reads of every
tensor what a key would hold (and its class, and whether it wants gradients): 0.9 us, where reading the same into a key costs 3. On a guard
miss the shortcut is looked up by the full key, and becomes the most recent one of these numbers.

Calls that autograd records have shortcuts of their own, which launch inside an operation of autograd (:mod:`.repeat_recorded`), and so have
operators of torch (:mod:`.repeat_operators`) and calls over a KV cache (:mod:`.repeat_cache`). All lie in the same tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, TypeAlias

import numpy as np

from ..arrays.new import draw_seed
from ..arrays.torch_hooks import (
    NewTensor,
    array_of,
    autocast_changes,
    autocast_is_on,
    empty_on,
    guard_of,
    hooks,
    is_watched,
    maker_of,
    meet_torch,
)
from ..env import settings
from ..limits import VECTOR_BYTES
from ..runtime import plan as store
from ..runtime.plan import MAX_PLANS, Key, Output, Plan
from .partial_results import with_partial_results

__all__ = [
    "NOWHERE",
    "Known",
    "Numbers",
    "Others",
    "Packing",
    "Recording",
    "Shortcut",
    "Tensors",
    "clear",
    "find",
    "keep",
    "launch_more",
    "never",
    "plain_numbers",
    "reach_of",
    "recording_of",
    "remember",
    "repeat",
]

# (dropout_p, softmax_scale, causal, window_size, softcap, sink_tokens, return_attn_probs)
Numbers: TypeAlias = tuple[Any, Any, Any, Any, Any, Any, Any]
# (alibi_slopes, learned_sink, out)
Others: TypeAlias = tuple[Any, Any, Any]
# (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
Packing: TypeAlias = tuple[Any, Any, Any, Any]
Tensors: TypeAlias = tuple[Any, ...]
# () of a call that is not recorded; else whether gradients are to be deterministic, and which tensors want them
Recording: TypeAlias = tuple[bool, ...]

NOWHERE: Final = VECTOR_BYTES  # in an alignment: some array has no memory, because it is empty or because it was freed under its tensor
_NUMBERS: Final = (Real, np.bool_, type(None))
_REAL: Final = frozenset({int, float})
_WINDOW: Final = 3  # place of window_size among the numbers


@dataclass(slots=True, eq=False)
class Known:
    """What calls are told by.

    Attributes:
        alignment: low bits of all addresses that count, or-ed, or one by one where a plan depends on each.
        same: says of tensors that they are like those that this was found for. It is made again when it does not know tensors that the key
            knows, as in another mode of autograd; what any of them ever says is true.
    """

    alignment: int | tuple[int, ...]
    same: Any


@dataclass(slots=True, eq=False)
class Shortcut(Known):
    """A plan, and what is needed to run it for a call on tensors.

    Attributes:
        launch: runs the plan.
        reaches: bytes between the first and the last element of q, k, v and o, both included.
        out: the output, None when the caller brings it.
        reaches_beside: the same bytes of lengths and biases, where the caller brings the output.
        make_out: makes it; None where that takes a look at the current device.
        plain: whether q, k, v and o are all the arrays that there are.
        recording: how autograd records the call.
        recorded: the operation of autograd that makes the launch (:mod:`.repeat_recorded`); None where there is none.
    """

    launch: Callable[[int, tuple[int, ...]], None]
    device_index: int
    reaches: tuple[int, ...]
    out: NewTensor | None
    make_out: Any
    reaches_beside: tuple[int, ...]
    lse: NewTensor | None
    dropout: bool
    plain: bool
    recording: Recording = ()
    recorded: Any = None

    def is_recording(self, deterministic: bool) -> bool:  # noqa: FBT001 - positional is quicker
        """Whether calls are recorded now, with gradients that are as deterministic as this one's."""
        return self.recording[0] is deterministic and hooks.is_grad_enabled() is True


shortcuts: dict[Key, Any] = {}
latest: dict[Key, Any] = {}  # by all of the key that is not read from tensors


def repeat(  # noqa: C901, PLR0911, PLR0912 - each frame less is 0.1 us
    q: Any, k: Any, v: Any, packing: Packing | None, numbers: Numbers, others: Others, *, deterministic: bool = False
) -> tuple[Key | None, Any]:
    """Answer a call as one like it was answered before, recorded by autograd if that one was.

    Returns:
        (key, result): result is None when there is no shortcut; key is None when there cannot be one.
    """
    slopes, learned_sink, out = others
    plain = numbers if _are_plain(numbers) else _told_apart(numbers)
    if (
        plain is None
        or (packing is not None and not type(packing[2]) is type(packing[3]) is int)
        or hooks.forward_ad._current_level >= 0  # noqa: SLF001 - a tensor may have a tangent, which the guard does not see
        or hooks.count_modes()  # make_fx may be recording
    ):
        return None, None
    if slopes is not None or learned_sink is not None or out is not None:
        call, tensors = _describe(q, k, v, packing, plain, others)
    elif packing is None:
        call, tensors = plain, (q, k, v)
    else:
        call, tensors = _describe_packed(q, k, v, packing, plain)
    found = latest.get(call)
    if found is None or not found.same(*tensors) or not (found.recording == () or found.is_recording(deterministic)):
        found, recording = None, recording_of(tensors, others, deterministic)
        if recording is None:
            return None, None
    else:
        recording = found.recording
    q_ptr, k_ptr, v_ptr, out_ptr = q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if out is None else out.data_ptr()
    somewhere = q_ptr and k_ptr and v_ptr and (out_ptr or out is None)
    alignment = (q_ptr | k_ptr | v_ptr | out_ptr) & 15 | (0 if somewhere else NOWHERE)
    if found is None or found.alignment != alignment:
        key, found = find(
            call, alignment, tensors, recording, guards=bool(recording) or not any(tensor.requires_grad for tensor in tensors)
        )
        if found is None:
            return key, None
    if len(tensors) > 3:
        for beside in tensors[3:]:
            if not beside.data_ptr():
                return None, None  # freed under its tensor: to a kernel, address 0 is an array that there is not
    if found.recorded is not None:
        if packing is None and slopes is learned_sink is None:
            return None, found.recorded(q, k, v)
        lengths = (None, None) if packing is None else packing[:2]
        return None, found.recorded(q, k, v, learned_sink, slopes, *lengths)
    if found.out is not None:
        out = empty_on(found.device_index, q, found.out) if found.make_out is None else found.make_out()
        out_ptr = out.data_ptr()
    elif _overlap(out_ptr, q_ptr, k_ptr, v_ptr, found.reaches) or _meets(out_ptr, found.reaches[-1], tensors[3:-1], found.reaches_beside):
        return None, None  # the checks know whether they share an element
    if found.plain:
        found.launch(hooks.raw_stream(found.device_index), (q_ptr, k_ptr, v_ptr, out_ptr, 0, 0, 0, 0, 0, 0))
        return None, out
    lse, _ = launch_more(found, (q_ptr, k_ptr, v_ptr, out_ptr), q, packing, others)
    if found.out is None:
        hooks.increment_version(out)
    return None, out if lse is None else (out, lse, None)


def plain_numbers(numbers: Numbers) -> Any:
    """Numbers as part of a key; None where they cannot be."""
    return numbers if _are_plain(numbers) else _told_apart(numbers)


def _are_plain(numbers: Numbers) -> bool:
    """Whether numbers have the types that they are declared with, so that equal ones mean the same: True is 1.0, and no scale."""
    p, scale, causal, window, softcap, sinks, probs = numbers
    return (
        (causal is False or causal is True)
        and (probs is False or probs is True)
        and type(window) is tuple
        and len(window) == 2
        and type(window[0]) is type(window[1]) is type(sinks) is int
        and type(p) in _REAL
        and type(softcap) in _REAL
        and (scale is None or type(scale) in _REAL)
    )


def _told_apart(numbers: Numbers) -> Any:
    """Numbers of other types (of NumPy, a list as window, 1 for True) with those types beside them; None where one is no number."""
    window = numbers[_WINDOW]
    if not isinstance(window, (tuple, list)):
        return None
    values = (*numbers[:_WINDOW], tuple(window), *numbers[_WINDOW + 1 :])
    flat = (*numbers[:_WINDOW], *window, *numbers[_WINDOW + 1 :])
    return (*values, *map(type, flat)) if all(isinstance(value, _NUMBERS) for value in flat) else None


def _describe_packed(q: Any, k: Any, v: Any, packing: Packing, numbers: Numbers) -> tuple[Key, Tensors]:
    """What is known of a packed call beside its tensors, and the tensors. A guard takes no tensor twice."""
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k = packing
    if cu_seqlens_k is cu_seqlens_q:
        return (numbers, seqlen_q, seqlen_k), (q, k, v, cu_seqlens_q)
    return (numbers, seqlen_q, seqlen_k, True), (q, k, v, cu_seqlens_q, cu_seqlens_k)


def _describe(q: Any, k: Any, v: Any, packing: Packing | None, numbers: Numbers, others: Others) -> tuple[Key, Tensors]:
    """The same of a call, dense or packed, with slopes, a learned sink or an ``out``: what there is of them is part of what is known."""
    slopes, learned_sink, out = others
    call, tensors = ((numbers, None, None), (q, k, v)) if packing is None else _describe_packed(q, k, v, packing, numbers)
    if slopes is not None:
        tensors = (*tensors, slopes)
    if learned_sink is not None:
        tensors = (*tensors, learned_sink)
    if out is not None:
        tensors = (*tensors, out)
    return (*call, (slopes is None, learned_sink is None, out is None)), tensors


def recording_of(tensors: Tensors, others: Others, deterministic: bool) -> Recording | None:  # noqa: FBT001 - part of the result
    """How autograd records a call on these tensors; None where they are not plain ones on a GPU, or where something else does.

    That is a trace, a dispatch mode or a transform of torch.func. Views with other signs, gradients of slopes and a recorded call into
    ``out`` are for the checks.
    """
    if not hooks.plain_types:
        meet_torch()
    types = hooks.plain_types
    if not (
        all(type(tensor) in types for tensor in tensors)
        and tensors[0].is_cuda
        and not any(tensor.is_neg() for tensor in tensors)
        and not is_watched()
        and all(map(_has_memory, tensors))
        and not autocast_changes(tensors[:3])
    ):
        return None
    wanting = tuple(tensor.requires_grad for tensor in tensors)
    if not (any(wanting) and hooks.is_grad_enabled()):
        return ()
    slopes, _, out = others
    return None if out is not None or (slopes is not None and slopes.requires_grad) else (deterministic, *wanting)


def _has_memory(tensor: Any) -> bool:
    """Whether a tensor has an address of its own, which those inside a torch.func transform have not."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def find(call: Key, alignment: int | tuple[int, ...], tensors: Tensors, recording: Recording, *, guards: bool) -> tuple[Key, Any]:
    """The key of a call and its shortcut, which is from now on the first to be tried for calls of these numbers.

    ``guards``: whether a guard may tell it. It tells whether tensors want gradients, and not whether autograd is on: functional calls on
    those that want them have one only if they are recorded, and ask.
    """
    facts = [fact for tensor in tensors for fact in (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())]
    key = (call, alignment, recording, *facts)
    found = shortcuts.get(key)
    if found is not None:
        if not found.same(*tensors):
            found.same = _guard(tensors) if guards else never
        latest[call] = found
    return key, found


def _guard(tensors: Tensors) -> Any:
    """A function that tells whether as many tensors are like these, if there can be one.

    A guard sees whether autocast is on, and not the type that it asks for. So one that is made under autocast asks for that as well.
    """
    if hooks.guard is None or len({id(tensor) for tensor in tensors}) < len(tensors):
        return never
    same = guard_of(hooks.guard, tensors)
    if not autocast_is_on():
        return same
    return lambda *others: same(*others) and not autocast_changes(others[:3])


def never(*_tensors: Any) -> bool:
    """The guard of a shortcut that has none."""
    return False


def _overlap(out: int, q: int, k: int, v: int, reaches: tuple[int, ...]) -> bool:
    """Whether the bytes of ``out`` and those of an input lie within each other."""
    of_q, of_k, of_v, of_out = reaches
    end = out + of_out
    return (out < q + of_q and q < end) or (out < k + of_k and k < end) or (out < v + of_v and v < end)


def _meets(out: int, reach: int, beside: Tensors, reaches: tuple[int, ...]) -> bool:
    """Whether the bytes of ``out``, ``reach`` of them, and those of another array lie within each other."""
    return any(out < x.data_ptr() + own and x.data_ptr() < out + reach for x, own in zip(beside, reaches, strict=True))


def launch_more(
    found: Shortcut, pointers: tuple[int, int, int, int], q: Any, packing: Packing | None, others: Others, rng: Any = None
) -> tuple[Any, Any]:
    """Launch with more addresses than those of q, k, v and o; the LSE and the dropout seed, where there are any.

    ``rng``: a seed that was drawn before; None is a new one for a call with dropout.
    """
    stream = hooks.raw_stream(found.device_index)
    lse, lse_ptr = None, 0
    if found.lse is not None:
        lse = empty_on(found.device_index, q, found.lse)
        lse_ptr = lse.data_ptr()
    lengths = (0, 0) if packing is None else (packing[0].data_ptr(), packing[1].data_ptr())
    slopes, learned_sink, _ = others
    biases = (0 if slopes is None else slopes.data_ptr(), 0 if learned_sink is None else learned_sink.data_ptr())
    if rng is None and found.dropout:
        rng = draw_seed(q)
    found.launch(stream, (*pointers, lse_ptr, *lengths, *biases, 0 if rng is None else rng.data_ptr()))
    return lse, rng


def remember(key: Key, plan: Plan, output: Output, *, brings_out: bool = False, recorded: Callable[[Shortcut], Any] | None = None) -> None:
    """Keep a shortcut to the plan of the call that made ``output``; does nothing where a shortcut would not be enough.

    ``brings_out``: whether the caller brings o. ``recorded``: makes the operation of autograd that launches it.
    """
    call, alignment, recording, *facts = key
    numbers, *more = call if type(call[0]) is tuple else (call,)
    if settings().debug or output.dropout_mask is not None or not plan.launches:
        return
    device_index = plan.launches[0].device_index
    out = None if brings_out else array_of(output.out)
    dropout = bool(numbers[0] > 0)
    made = Shortcut(
        launch=plan.launch if plan.workspace is None else with_partial_results(plan, device_index),
        device_index=device_index,
        alignment=alignment,
        reaches=(*(reach_of(*facts[4 * i : 4 * i + 3]) for i in range(3)), reach_of(*array_of(output.out))),
        out=out,
        reaches_beside=tuple(reach_of(*facts[4 * i : 4 * i + 3]) for i in range(3, len(facts) // 4 - 1)) if brings_out else (),
        make_out=maker_of(out),
        lse=None if output.lse is None else array_of(output.lse),
        dropout=dropout,
        plain=not more and output.lse is None and not dropout,
        same=never,
        recording=recording,
    )
    if recorded is not None:
        made.recorded = recorded(made)
    keep(key, made)


def keep(key: Key, known: Known) -> None:
    """Let calls of this key find it. When there are too many, those of before are forgotten."""
    if len(shortcuts) >= MAX_PLANS:
        _forget()
    shortcuts[key] = known


def reach_of(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> int:
    """Bytes from the first element to the last one, both included."""
    last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    return 0 if 0 in shape else int((last + 1) * dtype.itemsize)


def clear() -> None:
    """Forget all plans, and the shortcuts to them."""
    _forget()
    store.clear()


def _forget() -> None:
    shortcuts.clear()
    latest.clear()
