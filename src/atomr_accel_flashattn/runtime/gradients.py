"""Gradients: what answers a backward request, and how they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays.new import empty_like_framework
from ..arrays.read import as_numpy
from ..arrays.torch_hooks import tell_written
from ..dispatch import FaBwdDispatch, lookup
from ..kernels.spec import KernelSpec
from ..limits import not_built
from ..problem import ArrayInfo
from ..reference.backward import backward
from ..short_repr import ShortRepr

__all__ = ["Gradients", "differentiate"]


@dataclass(slots=True, eq=False, repr=False)
class Gradients(ShortRepr):
    """What a backward call made, in the library of q (or of ``dq``, ``dk``, ``dv``, where the caller brought them).

    Attributes:
        dq: gradient of q, of its shape and type.
        dk: gradient of k, summed over the query heads that read a KV head.
        dv: gradient of v, likewise.
        dsink: gradient of the learned sink, float32 (Hq,); None without one.
    """

    dq: Any
    dk: Any
    dv: Any
    dsink: Any = None


def differentiate(request: FaBwdDispatch) -> Gradients:
    """The gradients that a request asks for. On a GPU its key is refused by name: no kernel makes them yet."""
    spec = lookup(request.dispatch_key())  # what is refused is refused before anything is allocated
    if isinstance(spec, KernelSpec):
        raise not_built("backward", f"got {spec.kernel_name}")
    problem, given = request.problem, request.gradient_arrays
    forward = problem.forward
    inputs = (forward.q, forward.k, forward.v)
    made = [array or empty_like_framework(like, like.shape) for array, like in zip(given, inputs, strict=True)]
    dsink = None if forward.learned_sink is None else empty_like_framework(forward.q, (forward.heads,), "float32")
    dq, dk, dv = (as_numpy(array) for array in made)
    backward(problem, dq, dk, dv, None if dsink is None else as_numpy(dsink))
    for array in given:
        if array is not None:
            tell_written(array.source)
    mine = [_for_user(request, name, array) for name, array in zip(given._fields, made, strict=True)]
    return Gradients(mine[0], mine[1], mine[2], dsink and dsink.source)


def _for_user(request: FaBwdDispatch, name: str, array: ArrayInfo) -> Any:
    """The caller's own array where there was one."""
    own = getattr(request, name, None)
    return array.source if own is None else own
