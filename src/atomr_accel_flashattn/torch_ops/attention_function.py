"""Attention as an operation of torch's autograd. This module imports torch, so only calls that are recorded import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from ..limits import not_built
from ..requests.backward import DenseBwdRequest
from ..requests.dense import DenseFwdRequest
from ..requests.options import AttentionOptions, MaskKind, PositionBias
from ..runtime.execute import run
from ..varlen import CumulativeSeqlens, VarlenBwdRequest, VarlenFwdRequest

__all__ = ["Attention"]

# Arrays that the backward reads. Tensors among them are kept by autograd, which notices when one is written before it is read again.
_SAVED: Final = ("q", "k", "v", "out", "lse", "slopes", "learned_sink", "rng", "cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a forward call asked for besides its arrays."""

    mask: MaskKind
    sink_tokens: int
    softmax_scale: float
    softcap: float
    dropout_p: float
    longest: tuple[int, int]  # of the sequences of q and k
    deterministic: bool

    @classmethod
    def of(cls, request: DenseFwdRequest | VarlenFwdRequest, *, deterministic: bool) -> _Asked:
        """Of a forward request."""
        problem, options = request.problem, request.options
        return cls(
            mask=request.mask,
            sink_tokens=request.sink_tokens,
            softmax_scale=problem.softmax_scale,
            softcap=options.softcap,
            dropout_p=options.dropout_p,
            longest=(problem.seqlen_q, problem.seqlen_k),
            deterministic=deterministic,
        )

    def backward(self, saved: dict[str, Any], dout: Any, dlse: Any) -> DenseBwdRequest | VarlenBwdRequest:
        """The backward request of that call."""
        options = AttentionOptions(
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            learned_sink=saved["learned_sink"],
            dropout_p=self.dropout_p,
            rng=saved["rng"],
        )
        asked: dict[str, Any] = {
            **{name: saved[name] for name in ("q", "k", "v", "out", "lse")},
            "dout": dout,
            "dlse": dlse,
            "mask": self.mask,
            "bias": PositionBias(saved["slopes"]),
            "sink_tokens": self.sink_tokens,
            "options": options,
            "deterministic": self.deterministic or torch.are_deterministic_algorithms_enabled(),
        }
        if saved["cu_seqlens_q"] is None:
            return DenseBwdRequest(**asked)
        offsets = (CumulativeSeqlens(saved[f"cu_seqlens_{of}"], longest) for of, longest in zip("qk", self.longest, strict=True))
        asked["cu_seqlens_q"], asked["cu_seqlens_k"] = offsets
        return VarlenBwdRequest(**asked)


class Attention(torch.autograd.Function):  # type: ignore[misc] # torch is Any here
    """(o, LSE, dropout pattern or None) of a request, differentiable once in q, k, v and the learned sink, through o and the LSE."""

    @staticmethod
    def forward(ctx: Any, request: DenseFwdRequest | VarlenFwdRequest, flags: tuple[bool, bool], *inputs: Any) -> tuple[Any, Any, Any]:
        """``flags``: whether the pattern is wanted, and whether gradients are to be deterministic.

        ``inputs``: q, k, v and the learned sink as the caller gave them; the request has them without history.
        """
        dropout_mask, deterministic = flags
        output = run(request, dropout_mask=dropout_mask)
        q, k, v, learned_sink = inputs
        offsets: tuple[Any, Any] = (None, None)
        if isinstance(request, VarlenFwdRequest):
            offsets = request.cu_seqlens_q.offsets, (request.cu_seqlens_k or request.cu_seqlens_q).offsets
        arrays = (q, k, v, output.out, output.lse, request.bias.slopes, learned_sink, output.rng, *offsets)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(each if isinstance(each, torch.Tensor) else None for each in arrays))
        ctx.others = tuple(None if isinstance(each, torch.Tensor) else each for each in arrays)
        ctx.asked = _Asked.of(request, deterministic=deterministic)
        if output.dropout_mask is not None:
            ctx.mark_non_differentiable(output.dropout_mask)
        return output.out, output.lse, output.dropout_mask

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, _pattern: Any) -> tuple[Any, ...]:
        """Gradients of the inputs of forward; those of the first two, which are no tensors, are None."""
        none: tuple[Any, ...] = (None, None)
        if dout is None and dlse is None:
            return (*none, None, None, None, None)
        saved = {
            name: other if tensor is None else tensor for name, tensor, other in zip(_SAVED, ctx.saved_tensors, ctx.others, strict=True)
        }
        with torch.no_grad():
            made = run(ctx.asked.backward(saved, _rows_contiguous(dout), None if dlse is None else dlse.contiguous()))
        wanted = ctx.needs_input_grad[len(none) :]
        gradients = tuple(each if want else None for each, want in zip((made.dq, made.dk, made.dv, made.dsink), wanted, strict=True))
        if torch.is_grad_enabled():  # create_graph=True
            depends_on = (dout, dlse, saved["q"], saved["k"], saved["v"], saved["learned_sink"])
            gradients = _DifferentiatedOnce.apply(gradients, *depends_on)
        return (*none, *gradients)


class _DifferentiatedOnce(torch.autograd.Function):  # type: ignore[misc] # as above
    """Gradients that depend on tensors which autograd follows: whoever differentiates them is refused."""

    @staticmethod
    def forward(_ctx: Any, gradients: tuple[Any, ...], *_depends_on: Any) -> tuple[Any, ...]:
        """The gradients, as they are."""
        return gradients

    @staticmethod
    def backward(_ctx: Any, *_: Any) -> tuple[Any, ...]:
        """There are no second derivatives."""
        raise not_built("double_backward", "a gradient of this call is differentiated once more")


def _rows_contiguous(dout: Any) -> Any:
    """``dout`` as requests take it: the last stride is 1, the others are free. What autograd makes is often expanded."""
    if dout is None:
        return None
    dout = dout.resolve_neg()
    return dout if dout.shape[-1] <= 1 or dout.stride(-1) == 1 else dout.contiguous()
