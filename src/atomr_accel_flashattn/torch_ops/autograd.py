"""Which functional calls autograd records, and the way of those that it does. torch is imported by the first of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from ..arrays.torch_hooks import tangent_of
from ..errors import OutputError
from ..limits import not_built
from ..problem import ArrayInfo
from ..requests.dense import DenseFwdRequest
from ..runtime.plan import Output, Plan
from ..varlen import VarlenFwdRequest

if TYPE_CHECKING:
    from .first_call import Asked

__all__ = ["Differentiable", "attend", "is_recorded", "without_history"]

# q, k, v and the learned sink, or None: what has gradients
Differentiable: TypeAlias = tuple[Any, Any, Any, Any]


def is_recorded(q: Any, k: Any, v: Any, others: tuple[Any, Any, Any]) -> bool:
    """Whether autograd is to record a call; ``others`` are its slopes, learned sink and out.

    Raises:
        FeatureNotBuiltError: it cannot be: gradients of slopes, forward mode, q of another library.
        OutputError: it cannot be, because the caller brought ``out``.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return False
    slopes, learned_sink, out = others
    named = {"q": q, "k": k, "v": v, "alibi_slopes": slopes, "learned_sink": learned_sink, "out": out}
    tensors = {name: array for name, array in named.items() if isinstance(array, torch.Tensor)}
    wanting = [name for name, tensor in tensors.items() if tensor.requires_grad]
    if not wanting:
        return False
    name = wanting[0]
    got = f"{name} requires grad and gradients are enabled"
    if "alibi_slopes" in wanting:
        raise not_built("slopes_gradient", "alibi_slopes requires grad and gradients are enabled")
    if "q" not in tensors:
        raise not_built(
            "mixed_gradients", f"{got}, and q, in whose library o is made, is of type {type(q).__qualname__}; use a torch tensor as q"
        )
    if out is not None:
        raise OutputError(f"out: got an array, and {got}; allowed is None, because autograd cannot record a call into an array of before")
    for dual in (each for each, tensor in tensors.items() if tangent_of(tensor) is not None):
        raise not_built("forward_mode", f"{dual} is a dual tensor")
    return True


def without_history(inputs: Differentiable) -> Differentiable:
    """The same arrays, none of which requires grad: a request takes those."""
    torch = sys.modules["torch"]
    q, k, v, learned_sink = (each.detach() if isinstance(each, torch.Tensor) else each for each in map(_tensor_of, inputs))
    return q, k, v, learned_sink


def _tensor_of(array: Any) -> Any:
    """The tensor that was described; any other array as it is."""
    torch = sys.modules["torch"]
    return array.source if isinstance(array, ArrayInfo) and isinstance(array.source, torch.Tensor) else array


def attend(
    request: DenseFwdRequest | VarlenFwdRequest, inputs: Differentiable, *, probs: bool = False, deterministic: bool = False
) -> tuple[Output, Plan | None, Asked | None]:
    """Run a request, whose arrays have no history, as one operation of autograd on ``inputs``, which have one.

    Args:
        request: the forward call.
        inputs: the same q, k, v and learned sink, as the caller gave them.
        probs: whether the caller gets LSE, with its history, and dropout pattern.
        deterministic: whether gradients are to be bitwise equal from run to run; torch.use_deterministic_algorithms asks for it as well.

    Returns:
        what the call made, the plan of the forward (None on the CPU), and what was asked.
    """
    from . import first_call

    q, k, v, learned_sink = map(_tensor_of, inputs)
    return first_call.attend(request, (q, k, v, learned_sink), probs=probs, deterministic=deterministic)
