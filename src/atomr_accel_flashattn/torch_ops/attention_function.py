"""Attention as an operation of torch's autograd. This module imports torch, so only calls that are recorded import it."""

from __future__ import annotations

from typing import Any, Final, Protocol, TypeAlias

import torch

from ..arrays.torch_hooks import hooks, is_watched, mapped_gradient_check
from ..limits import not_built

__all__ = ["SAVED", "Attention", "Differentiator", "RecordedCall", "Saved", "apply_quickly"]

# Arrays that the backward reads, those with gradients first. Autograd keeps the tensors among them, and notices when one is written
# before it is read again. The last ones may be left out where there are none: each costs autograd 0.3 us.
SAVED: Final = ("q", "k", "v", "learned_sink", "out", "lse", "slopes", "rng", "cu_seqlens_q", "cu_seqlens_k")
Saved: TypeAlias = tuple[Any, ...]

_is_mapped: Final = mapped_gradient_check()


class Differentiator(Protocol):
    """What the backward of one call knows beside what autograd saved for it. It keeps no tensor alive."""

    def gradients(self, saved: Saved, dout: Any, dlse: Any) -> tuple[Any, Any, Any, Any]:
        """Of q, k, v and the learned sink, None without one. Not both of ``dout`` and ``dlse`` are None."""
        ...

    def by_operator(self, saved: Saved, dout: Any, dlse: Any) -> tuple[Any, Any, Any, Any]:
        """The same by the operator of torch, which traces, dispatch modes and transforms of torch.func see."""
        ...


class RecordedCall(Protocol):
    """A call that autograd records, the first of its kind or one more."""

    def forward(self, *inputs: Any) -> tuple[Any, Saved, Differentiator]:
        """o, or (o, LSE, dropout pattern or None); what to save, in the order of :data:`SAVED`; and what follows."""
        ...


class Attention(torch.autograd.Function):  # type: ignore[misc] # torch is Any here
    """o of a call, or (o, LSE, dropout pattern), differentiable once in q, k, v and the learned sink, through o and the LSE."""

    @staticmethod
    def forward(ctx: Any, call: RecordedCall, *inputs: Any) -> Any:
        """``inputs``: q, k, v, and perhaps learned sink, slopes and offsets as the caller gave them; the call has them without history."""
        outputs, saved, ctx.differentiator = call.forward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        if type(outputs) is tuple and outputs[2] is not None:
            ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None, _pattern: Any = None) -> tuple[Any, ...]:
        """Gradients of the inputs of forward; None where there are none or where nobody wants them."""
        _, *wanted = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * (1 + len(wanted))
        saved, differentiator = ctx.saved_tensors, ctx.differentiator
        # torch's compiled autograd, or mapped gradients, or a dispatch mode, which the forward was not in
        watched = hooks.is_compiling() or is_watched() or (dout is not None and _is_mapped(dout)) or (dlse is not None and _is_mapped(dlse))
        made = differentiator.by_operator(saved, dout, dlse) if watched else differentiator.gradients(saved, dout, dlse)
        gradients = [each if want else None for each, want in zip(made, wanted, strict=False)]
        if torch.is_grad_enabled() and not watched:  # create_graph=True; the operator refuses it by itself
            gradients = _DifferentiatedOnce.apply(gradients, dout, dlse, *saved[: len(made)])
        return (None, *gradients, *(None,) * (len(wanted) - len(gradients)))


class _DifferentiatedOnce(torch.autograd.Function):  # type: ignore[misc] # as above
    """Gradients that depend on tensors which autograd follows: whoever differentiates them is refused."""

    @staticmethod
    def forward(_ctx: Any, gradients: list[Any], *_depends_on: Any) -> tuple[Any, ...]:
        """The gradients, as they are."""
        return tuple(gradients)

    @staticmethod
    def backward(_ctx: Any, *_: Any) -> tuple[Any, ...]:
        """There are no second derivatives."""
        raise not_built("double_backward", "a gradient of this call is differentiated once more")


# Without what Function.apply looks at first, 2 us: default arguments, of which there are none, and transforms of torch.func, whose tensors
# take another way than a shortcut.
apply_quickly: Final = super(torch.autograd.Function, Attention).apply
