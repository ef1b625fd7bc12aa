"""The plan cache: what a functional call on CUDA torch tensors costs when one like it was made before.

A plan is a launch whose numbers are all fixed; only addresses and the stream change. :func:`repeat` builds the key, finds the plan, makes
the outputs and launches: a tuple hash, a dict hit, pointers, one launch. Nothing is validated again, nothing is synchronised, and nothing
is allocated but the outputs, so the calls can be captured in a CUDA graph.

What the key holds, and why that is enough. A launch is a function of: shapes, strides, element types and devices of every array; which
arrays there are; whether all addresses and strides are multiples of 16 bytes (the kernel's vector loads); every number of the call. All
of these are in the key. Addresses, the stream and the dropout seed are read anew by every call. Gradients and an ``out`` that is also an
input are looked at by every call, because they are no part of shapes. Settings and tile tables are fixed for a process. Plans are kept
only of calls that went the whole way of checks, and only when the numbers are plain Python numbers (a tensor used as a number compares
by identity, and may change).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from .env import settings
from .execute import Launch, Output
from .jit.launch import LaunchPlan
from .jit.params import Fa3FwdParams, FwdParams

__all__ = ["Hooks", "Key", "Numbers", "Others", "Packing", "clear", "hooks", "meet_torch", "remember", "repeat"]

# (dropout_p, softmax_scale, causal, window_size, softcap, sink_tokens, return_attn_probs)
Numbers: TypeAlias = tuple[Any, Any, Any, Any, Any, Any, Any]
# (alibi_slopes, learned_sink, out)
Others: TypeAlias = tuple[Any, Any, Any]
# (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
Packing: TypeAlias = tuple[Any, Any, Any, Any]
Key: TypeAlias = tuple[Any, ...]

_MAX_PLANS: Final = 4096  # of about 1 KB; a workload with more shapes than that starts over
_PLAIN: Final = frozenset({int, float, bool, type(None)})


@dataclass(slots=True)
class Hooks:
    """The few functions of torch on the steady-state path, bound once. Tests put stand-ins here."""

    plain_types: frozenset[type] = frozenset()
    is_grad_enabled: Any = None
    empty_like: Any = None
    float32: Any = None
    int64: Any = None
    raw_stream: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    launch: LaunchPlan[FwdParams | Fa3FwdParams]
    device_index: int
    out_shape: tuple[int, ...] | None  # None: torch.empty_like(q) has the strides that the launch writes
    lse_shape: tuple[int, ...] | None
    dropout: bool


hooks = Hooks()
_plans: dict[Key, _Plan] = {}


def meet_torch() -> None:
    """Bind the hooks once torch is there; calls before that have no torch tensors."""
    torch = sys.modules.get("torch")
    if torch is None or hooks.plain_types or not hasattr(torch, "nn"):
        return
    hooks.is_grad_enabled = torch.is_grad_enabled
    hooks.empty_like, hooks.float32, hooks.int64 = torch.empty_like, torch.float32, torch.int64
    hooks.raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # noqa: SLF001 - 0.2 us; the public call costs 8
    hooks.plain_types = frozenset({torch.Tensor, torch.nn.Parameter})


def repeat(q: Any, k: Any, v: Any, packing: Packing | None, numbers: Numbers, others: Others) -> tuple[Key | None, Any]:
    """Answer a call from its plan.

    Returns:
        (key, result): result is None when there is no plan; key is None when there cannot be one.
    """
    types = hooks.plain_types
    if not (type(q) in types and type(k) in types and type(v) in types and q.is_cuda):
        if not types:
            meet_torch()
        return None, None
    if (q.requires_grad or k.requires_grad or v.requires_grad) and hooks.is_grad_enabled():
        return None, None
    try:
        q_ptr, k_ptr, v_ptr = q.data_ptr(), k.data_ptr(), v.data_ptr()
        bits = q_ptr | k_ptr | v_ptr
        facts = None
        slopes, learned_sink, out = others
        if packing is not None or slopes is not None or learned_sink is not None or out is not None:
            facts = _facts(packing, others)
            if facts is None or (out is not None and _share_storage(out, (q, k, v))):
                return None, None
            bits |= facts[0]
        key = (
            *(q.shape, q.stride(), q.dtype, q.get_device()),
            *(k.shape, k.stride(), k.dtype, k.get_device()),
            *(v.shape, v.stride(), v.dtype, v.get_device()),
            bits & 15,
            numbers,
            facts and facts[1],
        )
        plan = _plans.get(key)
    except (RuntimeError, TypeError):  # tensors without memory (torch.func), numbers that cannot be hashed: the checks name them
        return None, None
    if plan is None:
        return key, None
    return key, _launch(plan, q, (q_ptr, k_ptr, v_ptr), facts[2] if facts is not None else (0, 0, 0, 0), out)


def _launch(plan: _Plan, q: Any, qkv: tuple[int, int, int], extra: tuple[int, int, int, int], out: Any) -> Any:
    if out is None:
        out = hooks.empty_like(q) if plan.out_shape is None else q.new_empty(plan.out_shape)
    lse = rng = None
    if plan.lse_shape is not None:
        lse = q.new_empty(plan.lse_shape, dtype=hooks.float32)
    if plan.dropout:
        rng = q.new_empty((2,), dtype=hooks.int64).random_(-(2**63), 2**63 - 1)
    pointers = (*qkv, out.data_ptr(), 0 if lse is None else lse.data_ptr(), *extra, 0 if rng is None else rng.data_ptr())
    plan.launch.launch(hooks.raw_stream(plan.device_index), pointers)
    return out if lse is None else (out, lse, None)


def _share_storage(out: Any, inputs: tuple[Any, Any, Any]) -> bool:
    """Whether ``out`` may overlap an input; the full check then says."""
    storage = out.untyped_storage().data_ptr()
    return any(tensor.untyped_storage().data_ptr() == storage for tensor in inputs)


def _facts(packing: Packing | None, others: Others) -> tuple[int, Key, tuple[int, int, int, int]] | None:
    """Of the less common arrays: the address bits that count for alignment, their part of the key, and their addresses.

    None when one of them is no plain tensor or wants gradients.
    """
    tensors = (*(packing[:2] if packing is not None else (None, None)), *others)
    types = hooks.plain_types
    parts: list[Any] = []
    pointers: list[int] = []
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
            pointers.append(0)
            continue
        if type(tensor) not in types or (tensor.requires_grad and hooks.is_grad_enabled()):
            return None
        parts.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()))
        pointers.append(tensor.data_ptr())
    out_ptr = pointers.pop()
    lengths = packing[2:] if packing is not None else None
    return out_ptr, (*parts, lengths), (pointers[0], pointers[1], pointers[2], pointers[3])


def remember(key: Key, launch: Launch, q: Any, output: Output, others: Others) -> None:
    """Keep a plan for calls like the one that ``launch`` answered; does nothing where a plan would not be enough."""
    numbers, facts = key[-2], key[-1]
    lengths = facts[-1] if facts is not None else None
    plain = all(type(number) in _PLAIN for number in (*(n for n in numbers if type(n) is not tuple), *numbers[3], *(lengths or ())))
    if settings().debug or not plain or output.dropout_mask is not None:
        return
    out, out_shape = output.out, None
    if others[2] is None and not (out.shape == q.shape and out.stride() == hooks.empty_like(q).stride()):
        if not out.is_contiguous():
            return
        out_shape = tuple(out.shape)
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    _plans[key] = _Plan(
        launch=launch.kernel.plan(launch.params, launch.grid),
        device_index=launch.kernel.device_index,
        out_shape=out_shape,
        lse_shape=None if output.lse is None else tuple(output.lse.shape),
        dropout=numbers[0] > 0,
    )


def clear() -> None:
    """Forget all plans."""
    _plans.clear()
