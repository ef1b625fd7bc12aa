"""Plans of requests: what a run of a request on a GPU costs when one like it was run before. plans.py is the same for functional calls.

What the key holds, and why that is enough. A request was checked when it was made, and is frozen; its launch is a function of its class, of
the attributes that its class names (:func:`keeps_plans`), of its problem, and of the strides of the output. Of the problem everything is in
the key but addresses, of which it has the low bits that decide on vector loads: addresses and the stream are brought by every launch.
Strides of an output that the caller brought are in the key, those of a new one in the plan, because a plan is looked for before outputs are
made. An LSE is an address and no more. Settings and tile tables are fixed for a process.

Requests of other classes, subclasses of ours included, may name any kernel in their ``dispatch_key``: they go the whole way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from .env import settings
from .jit.launch import LaunchPlan
from .problem import ArrayInfo
from .protocols import FaFwdDispatch

__all__ = ["Key", "RequestPlan", "clear", "find", "keep", "keeps_plans", "key_of"]

Key: TypeAlias = tuple[Any, ...]
C = TypeVar("C", bound=type)

_MAX_PLANS: Final = 4096  # a workload with more shapes than that starts over
_ALIGNED_BYTES: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class RequestPlan:
    """A launch, and the strides in elements of the output that it writes."""

    launch: LaunchPlan[Any]
    out_strides: tuple[int, ...]


_attributes: dict[type, tuple[str, ...]] = {}
_plans: dict[Key, RequestPlan] = {}


def keeps_plans(*attributes: str) -> Callable[[C], C]:
    """A decorator for classes of requests whose kernel is a function of their problem, their ``out`` and these (hashable) attributes.

    They have a slot ``plan_key``, which is None at first. It holds for the class alone: a subclass says so itself.
    """

    def note(kind: C) -> C:
        _attributes[kind] = attributes
        return kind

    return note


def key_of(request: FaFwdDispatch) -> Key | None:
    """What requests have in common that share a plan; None for a request that has none, as one on the CPU, or any in debug mode."""
    attributes = _attributes.get(type(request))
    if attributes is None or settings().debug:
        return None
    ours: Any = request
    key: Key | None = ours.plan_key
    if key is None and request.problem.q.device.kind != "cpu":
        key = _key_of(request, attributes)
        object.__setattr__(request, "plan_key", key)
    return key


def _key_of(request: FaFwdDispatch, attributes: tuple[str, ...]) -> Key:
    problem, out = request.problem, request.out_array
    q, k, v, dropout = problem.q, problem.k, problem.v, problem.dropout
    addresses = q.ptr | k.ptr | v.ptr | (0 if out is None else out.ptr)
    return (
        *(type(request), *([getattr(request, name) for name in attributes] if attributes else ())),
        *(q.device, q.dtype_name, addresses % _ALIGNED_BYTES),
        *(q.shape, q.strides, k.shape, k.strides, v.shape, v.strides, None if out is None else out.strides),
        *(problem.seqlen_q, problem.seqlen_k, problem.softmax_scale, problem.softcap, problem.band),
        None if problem.alibi_slopes is None else _layout(problem.alibi_slopes),
        None if problem.learned_sink is None else _layout(problem.learned_sink),
        None if problem.cu_seqlens_q is None else _layout(problem.cu_seqlens_q),
        None if dropout is None else dropout.p,
    )


def _layout(info: ArrayInfo) -> tuple[Any, ...]:
    return info.shape, info.strides


def find(key: Key | None) -> RequestPlan | None:
    """The plan of requests with this key, if there is one."""
    return None if key is None else _plans.get(key)


def keep(key: Key, plan: RequestPlan) -> None:
    """Let further requests with this key repeat a launch."""
    if len(_plans) >= _MAX_PLANS:
        clear()
    _plans[key] = plan


def clear() -> None:
    """Forget all plans of requests."""
    _plans.clear()
