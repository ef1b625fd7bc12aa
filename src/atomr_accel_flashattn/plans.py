"""The plan cache: what a functional call on CUDA torch tensors costs when one like it was made before.

A plan is a launch whose numbers are all fixed; only addresses and the stream change. :func:`repeat` finds the plan, makes the outputs and
launches. Nothing is validated again, nothing is synchronised, and nothing is allocated but the outputs, so the calls can be captured in a
CUDA graph.

What the key holds, and why that is enough. A launch is a function of: shapes, strides, element types and devices of every array; which
arrays there are; whether all addresses and strides are multiples of 16 bytes (the kernel's vector loads); every number of the call. All
of these are in the key. Addresses, the stream and the dropout seed are read anew by every call. Gradients and an ``out`` that lies where an
input does are looked at by every call, because they are no part of shapes. Settings and tile tables are fixed for a process. Plans are
kept only of calls that went the whole way of checks, and only when the numbers are plain Python numbers (a tensor used as a number
compares by identity, and may change).

A call is first compared with the last one of the same numbers. torch does that with a tensor guard, one C function that reads of every
tensor what the key holds (and its class, and whether it wants gradients): 0.9 us, where reading the same into a key costs 3. What the
guard does not take for the same goes by its key, and that call is the last one from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from . import request_plans
from .env import settings
from .execute import Launch, Output
from .jit.launch import LaunchPlan
from .jit.params import Fa3FwdParams, FwdParams
from .torch_hooks import NewTensor, empty_on, guard_of, hooks, meet_torch

__all__ = ["Key", "Numbers", "Others", "Packing", "clear", "remember", "repeat"]

# (dropout_p, softmax_scale, causal, window_size, softcap, sink_tokens, return_attn_probs)
Numbers: TypeAlias = tuple[Any, Any, Any, Any, Any, Any, Any]
# (alibi_slopes, learned_sink, out)
Others: TypeAlias = tuple[Any, Any, Any]
# (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
Packing: TypeAlias = tuple[Any, Any, Any, Any]
Key: TypeAlias = tuple[Any, ...]
Tensors: TypeAlias = tuple[Any, ...]

_NOWHERE: Final = 16  # in a plan's alignment: some array has no memory, because it is empty or because it was freed under its tensor
_MAX_PLANS: Final = 4096  # of about 1 KB; a workload with more shapes than that starts over
_PLAIN: Final = frozenset({int, float, bool, type(None)})
# How many of the leading addresses of the parameters a launch brings: q, k, v, o; with LSE and cu_seqlens; with slopes, sink and seed.
_FEW, _MORE, _ALL = 4, 7, 10


@dataclass(slots=True, eq=False)
class _Plan:
    """A launch, and what is needed to repeat it.

    Attributes:
        alignment: low bits of all addresses that count.
        reaches: bytes between the first and the last element of q, k, v and o, both included.
        out: the output, None when the caller brings it.
        make_out: makes it; None where that takes a look at the current device.
        addresses: how many the launch brings.
        same: says of tensors that they are like those that this plan was found for. It is made again when it does not know tensors that
            the key knows, as in another mode of autograd; what any of them ever says is true.
    """

    launch: LaunchPlan[FwdParams | Fa3FwdParams]
    device_index: int
    alignment: int
    reaches: tuple[int, ...]
    out: NewTensor | None
    make_out: Any
    lse: NewTensor | None
    dropout: bool
    addresses: int
    same: Any


_plans: dict[Key, _Plan] = {}
_latest: dict[Key, _Plan] = {}  # by all of the key that is not read from tensors


def repeat(q: Any, k: Any, v: Any, packing: Packing | None, numbers: Numbers, others: Others) -> tuple[Key | None, Any]:
    """Answer a call from its plan.

    Returns:
        (key, result): result is None when there is no plan; key is None when there cannot be one.
    """
    slopes, learned_sink, out = others
    try:
        if slopes is not None or learned_sink is not None or out is not None:
            call, tensors = _describe(q, k, v, packing, numbers, others)
        elif packing is None:
            call, tensors = numbers, (q, k, v)
        else:
            call, tensors = _describe_packed(q, k, v, packing, numbers)
        plan = _latest.get(call)
        same = plan is not None and plan.same(*tensors)
        if not same and not _may_repeat(tensors):
            return None, None
        q_ptr, k_ptr, v_ptr, out_ptr = q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if out is None else out.data_ptr()
        somewhere = q_ptr and k_ptr and v_ptr and (out_ptr or out is None)
        alignment = (q_ptr | k_ptr | v_ptr | out_ptr) & 15 | (0 if somewhere else _NOWHERE)
        if plan is None or not same or plan.alignment != alignment:
            key, plan = _find(call, alignment, tensors)
            if plan is None:
                return key, None
    except (RuntimeError, TypeError):  # tensors without memory (torch.func), numbers that cannot be hashed: the checks name them
        return None, None
    if plan.out is not None:
        out = empty_on(plan.device_index, q, plan.out) if plan.make_out is None else plan.make_out()
        out_ptr = out.data_ptr()
    elif _overlap(out_ptr, q_ptr, k_ptr, v_ptr, plan.reaches):  # the checks know whether they share an element
        return None, None
    if plan.addresses == _FEW:
        plan.launch.launch(hooks.raw_stream(plan.device_index), (q_ptr, k_ptr, v_ptr, out_ptr))
        return None, out
    lse = _launch_more(plan, (q_ptr, k_ptr, v_ptr, out_ptr), q, packing, others)
    return None, out if lse is None else (out, lse, None)


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


def _may_repeat(tensors: Tensors) -> bool:
    """Whether these are plain tensors of torch, on a GPU, that want no gradients and are no views with other signs than their memory."""
    if not hooks.plain_types:
        meet_torch()
    types = hooks.plain_types
    return (
        all(type(tensor) in types for tensor in tensors)
        and tensors[0].is_cuda
        and not (any(tensor.requires_grad for tensor in tensors) and hooks.is_grad_enabled())
        and not any(tensor.is_neg() for tensor in tensors)
    )


def _find(call: Key, alignment: int, tensors: Tensors) -> tuple[Key, _Plan | None]:
    """The key of a call and its plan, which is from now on the first to be tried for calls of these numbers."""
    facts = [fact for tensor in tensors for fact in (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())]
    key = (call, alignment, *facts)
    plan = _plans.get(key)
    if plan is not None:
        if not plan.same(*tensors):
            plan.same = _guard(tensors)
        _latest[call] = plan
    return key, plan


def _guard(tensors: Tensors) -> Any:
    """A function that tells whether as many tensors are like these, if there can be one."""
    if hooks.guard is None or any(tensor.requires_grad for tensor in tensors) or len({id(tensor) for tensor in tensors}) < len(tensors):
        return _never
    return guard_of(hooks.guard, tensors)


def _never(*_tensors: Any) -> bool:
    """The guard of a plan that has none."""
    return False


def _overlap(out: int, q: int, k: int, v: int, reaches: tuple[int, ...]) -> bool:
    """Whether the bytes of ``out`` and those of an input lie within each other."""
    of_q, of_k, of_v, of_out = reaches
    end = out + of_out
    return (out < q + of_q and q < end) or (out < k + of_k and k < end) or (out < v + of_v and v < end)


def _launch_more(plan: _Plan, pointers: tuple[int, int, int, int], q: Any, packing: Packing | None, others: Others) -> Any:
    """Launch with more addresses than those of q, k, v and o; the LSE where there is one."""
    stream = hooks.raw_stream(plan.device_index)
    lse, lse_ptr = None, 0
    if plan.lse is not None:
        lse = empty_on(plan.device_index, q, plan.lse)
        lse_ptr = lse.data_ptr()
    lengths = (0, 0) if packing is None else (packing[0].data_ptr(), packing[1].data_ptr())
    if plan.addresses == _MORE:
        plan.launch.launch(stream, (*pointers, lse_ptr, *lengths))
        return lse
    slopes, learned_sink, _ = others
    biases = (0 if slopes is None else slopes.data_ptr(), 0 if learned_sink is None else learned_sink.data_ptr())
    rng = q.new_empty((2,), dtype=hooks.int64).random_(-(2**63), 2**63 - 1) if plan.dropout else None
    plan.launch.launch(stream, (*pointers, lse_ptr, *lengths, *biases, 0 if rng is None else rng.data_ptr()))
    return lse


def remember(key: Key, launch: Launch, output: Output, others: Others) -> None:
    """Keep a plan for calls like the one that ``launch`` answered; does nothing where a plan would not be enough."""
    call, alignment, *facts = key
    numbers, *more = call if type(call[0]) is tuple else (call,)
    plain = all(type(number) in _PLAIN for number in (*numbers[:3], *numbers[3], *numbers[4:], *more[:2]))
    if settings().debug or not plain or output.dropout_mask is not None:
        return
    if len(_plans) >= _MAX_PLANS:
        _forget()
    brought = max(i for i, address in enumerate(launch.params.addresses(), 1) if address or i == _FEW)
    addresses = next(count for count in (_FEW, _MORE, _ALL) if brought <= count)
    out = _array(output.out) if others[2] is None else None
    one_gpu = hooks.device_count is not None and hooks.device_count() == 1
    _plans[key] = _Plan(
        launch=launch.kernel.plan(launch.params, launch.grid, addresses),
        device_index=launch.kernel.device_index,
        alignment=alignment,
        reaches=(*(_reach(*facts[4 * i : 4 * i + 3]) for i in range(3)), _reach(*_array(output.out))),
        out=out,
        make_out=partial(hooks.empty_on_current, *out) if one_gpu and out is not None else None,
        lse=None if output.lse is None else _array(output.lse),
        dropout=numbers[0] > 0,
        addresses=addresses,
        same=_never,
    )


def _array(tensor: Any) -> NewTensor:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _reach(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> int:
    """Bytes from the first element to the last one, both included."""
    last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    return 0 if 0 in shape else int((last + 1) * dtype.itemsize)


def clear() -> None:
    """Forget all plans, of functional calls and of requests."""
    _forget()
    request_plans.clear()


def _forget() -> None:
    _plans.clear()
    _latest.clear()
