"""A recorded call that goes the whole way: a request forward, a request backward. This module imports torch, as attention_function does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..requests.backward import DenseBwdRequest
from ..requests.dense import DenseFwdRequest
from ..requests.options import AttentionOptions, MaskKind, PositionBias
from ..runtime.execute import execute, run
from ..runtime.plan import Output, Plan, find
from ..varlen import CumulativeSeqlens, VarlenBwdRequest, VarlenFwdRequest
from .attention_function import SAVED, Attention, Saved

__all__ = ["Asked", "attend", "usual_rows"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a forward call asked for besides its tensors, and the backward of that call."""

    mask: MaskKind
    sink_tokens: int
    softmax_scale: float | None
    softcap: float
    dropout_p: float
    longest: tuple[int, int]  # of the sequences of q and k
    deterministic: bool
    others: Saved = (None,) * len(SAVED)  # arrays of other libraries, in the place that a tensor would have

    @classmethod
    def of(cls, request: DenseFwdRequest | VarlenFwdRequest, *, deterministic: bool, others: Saved) -> Asked:
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
            others=others,
        )

    @property
    def wants_determinism(self) -> bool:
        """Now: torch may have been told to in between."""
        return self.deterministic or torch.are_deterministic_algorithms_enabled()

    def gradients(self, saved: Saved, dout: Any, dlse: Any) -> tuple[Any, Any, Any, Any]:
        """Through a request."""
        return self.gradients_and_plan(saved, dout, dlse)[0]

    def gradients_and_plan(self, saved: Saved, dout: Any, dlse: Any) -> tuple[tuple[Any, Any, Any, Any], Plan | None]:
        """And the plan that made them; None where none was kept, as on the CPU."""
        with torch.no_grad():
            request = self.request(saved, None if dout is None else usual_rows(dout), None if dlse is None else dlse.contiguous())
            made = run(request)
        return (made.dq, made.dk, made.dv, made.dsink), find(request)

    def by_operator(self, saved: Saved, dout: Any, dlse: Any) -> tuple[Any, Any, Any, Any]:
        """Through the operator; arrays of other libraries, which it does not take, go to the checks of a request, which refuse them."""
        if any(other is not None for other in self.others):
            return self.gradients(saved, dout, dlse)
        q, k, v, learned_sink, out, lse, *others = saved
        slopes, rng, *offsets = others or (None,) * 4
        band = self.mask.band(self.sink_tokens)
        *gradients, dsink = torch.ops.atomr_accel_flashattn.attention_backward(
            *(dout, dlse, out, lse, q, k, v, learned_sink, slopes, rng),
            *offsets,
            *self.longest,
            softmax_scale=self.softmax_scale,
            window_left=-1 if band.left is None else band.left,
            window_right=-1 if band.right is None else band.right,
            softcap=self.softcap,
            dropout_p=self.dropout_p,
            sink_tokens=band.sink_tokens,
            deterministic=self.deterministic,
        )
        return *gradients, None if learned_sink is None else dsink

    def request(self, saved: Saved, dout: Any, dlse: Any) -> DenseBwdRequest | VarlenBwdRequest:
        """The backward request of that call."""
        tensors = (*saved, *(None,) * (len(SAVED) - len(saved)))
        arrays = {name: other if tensor is None else tensor for name, tensor, other in zip(SAVED, tensors, self.others, strict=True)}
        options = AttentionOptions(
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            learned_sink=arrays["learned_sink"],
            dropout_p=self.dropout_p,
            rng=arrays["rng"],
        )
        asked: dict[str, Any] = {
            **{name: arrays[name] for name in ("q", "k", "v", "out", "lse")},
            "dout": dout,
            "dlse": dlse,
            "mask": self.mask,
            "bias": PositionBias(arrays["slopes"]),
            "sink_tokens": self.sink_tokens,
            "options": options,
            "deterministic": self.wants_determinism,
        }
        if arrays["cu_seqlens_q"] is None:
            return DenseBwdRequest(**asked)
        offsets = (CumulativeSeqlens(arrays[f"cu_seqlens_{of}"], longest) for of, longest in zip("qk", self.longest, strict=True))
        asked["cu_seqlens_q"], asked["cu_seqlens_k"] = offsets
        return VarlenBwdRequest(**asked)


@dataclass(slots=True)
class _FirstCall:
    """A request whose arrays have no history."""

    request: DenseFwdRequest | VarlenFwdRequest
    probs: bool  # whether the caller gets LSE and dropout pattern
    deterministic: bool
    lse: Any = None
    plan: Plan | None = None  # that it was run by
    asked: Asked | None = None

    def forward(self, *inputs: Any) -> tuple[Any, Saved, Asked]:
        """Run it."""
        output, self.plan = execute(self.request, lse=True, dropout_mask=self.probs)
        q, k, v, learned_sink, slopes, *offsets = inputs
        arrays = (q, k, v, learned_sink, output.out, output.lse, slopes, output.rng, *offsets)
        tensors = tuple(each if isinstance(each, torch.Tensor) else None for each in arrays)
        others = tuple(None if isinstance(each, torch.Tensor) else each for each in arrays)
        self.asked = Asked.of(self.request, deterministic=self.deterministic, others=others)
        self.lse = output.lse
        return (output.out, output.lse, output.dropout_mask) if self.probs else output.out, tensors, self.asked


def attend(
    request: DenseFwdRequest | VarlenFwdRequest, inputs: tuple[Any, Any, Any, Any], *, probs: bool, deterministic: bool
) -> tuple[Output, Plan | None, Asked | None]:
    """Run a request, whose arrays have no history, as one operation of autograd on ``inputs``: q, k, v and the learned sink, which have."""
    offsets: tuple[Any, Any] = (None, None)
    if isinstance(request, VarlenFwdRequest):
        offsets = request.cu_seqlens_q.offsets, (request.cu_seqlens_k or request.cu_seqlens_q).offsets
    call = _FirstCall(request, probs, deterministic)
    made = Attention.apply(call, *inputs, request.bias.slopes, *offsets)
    return Output(*made) if probs else Output(made, call.lse), call.plan, call.asked


def usual_rows(dout: Any) -> Any:
    """``dout`` as requests take it: the last stride is 1, the others are free. What autograd makes is often expanded."""
    dout = dout.resolve_neg()
    return dout if dout.shape[-1] <= 1 or dout.stride(-1) == 1 else dout.contiguous()
