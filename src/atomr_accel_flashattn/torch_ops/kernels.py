"""What the operators of torch do with real tensors: make a request and run it. Loaded by their first call; imports torch."""

from __future__ import annotations

from typing import Any

import torch

from ..arrays.new import draw_seed
from ..errors import CuSeqlensError, DropoutError
from ..requests.options import AttentionOptions, MaskKind, PositionBias
from ..runtime.execute import execute
from ..runtime.plan import Key
from ..varlen import forward_request
from .first_call import Asked, usual_rows
from .operators import Operands, rows_contiguous
from .repeat import remember
from .repeat_operators import Gradients, remember_backward, repeat_attention, repeat_backward

__all__ = ["attention", "attention_backward", "draw_seed"]


def attention(*operands: Any) -> tuple[Any, Any, Any]:
    """O, LSE, and the dropout pattern or a tensor without elements."""
    call = _read(operands)
    if call.dropout_p > 0 and call.rng is None:
        raise DropoutError(f"rng: got None with dropout_p {call.dropout_p}; allowed is the (seed, offset) tensor that draw_seed gives")
    key, made = repeat_attention(call)
    if made is None:
        with torch.no_grad():
            return _first(call, key)
    return *made, _nothing(made[1], torch.bool)


def _first(call: Operands, key: Key | None) -> tuple[Any, Any, Any]:
    """Through a request, which leaves a shortcut for calls like it."""
    options = AttentionOptions(
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        learned_sink=call.learned_sink,
        dropout_p=call.dropout_p,
        rng=call.rng,
    )
    packing = None if call.cu_seqlens_q is None else (call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
    arrays = _as_requests_take_them(call[:3])
    request = forward_request(
        arrays, packing, mask=_mask(call), bias=PositionBias(call.alibi_slopes), sink_tokens=call.sink_tokens, options=options
    )
    made, plan = execute(request, lse=True, dropout_mask=call.return_pattern)
    if key is not None and plan is not None and _all_same(arrays, call[:3]):
        remember(key, plan, made)
    return made.out, made.lse, _nothing(made.lse, torch.bool) if made.dropout_mask is None else made.dropout_mask


def attention_backward(dout: Any, dlse: Any, out: Any, lse: Any, *operands: Any) -> tuple[Any, Any, Any, Any]:
    """dq, dk, dv, and dsink or a tensor without elements."""
    call = _read(operands)
    deterministic = call.deterministic or torch.are_deterministic_algorithms_enabled()
    key, made = repeat_backward(dout, dlse, out, lse, call, deterministic=deterministic)
    if made is None:
        made = _first_backward((dout, dlse, out, lse), call, key, deterministic=deterministic)
    *gradients, dsink = made
    return *gradients, _nothing(lse, torch.float32) if dsink is None else dsink


def _first_backward(given: tuple[Any, Any, Any, Any], call: Operands, key: Key | None, *, deterministic: bool) -> Gradients:
    """Through a request, which leaves a shortcut for calls like it."""
    dout, dlse, out, lse = given
    asked = Asked(
        mask=_mask(call),
        sink_tokens=call.sink_tokens,
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        dropout_p=call.dropout_p,
        longest=(call.max_seqlen_q, call.max_seqlen_k),
        deterministic=deterministic,
    )
    *arrays, out = _as_requests_take_them((*call[:3], out))
    dout = None if dout is None else usual_rows(dout)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    saved = (*arrays, call.learned_sink, out, lse, call.alibi_slopes, call.rng, call.cu_seqlens_q, call.cu_seqlens_k)
    made, plan = asked.gradients_and_plan(saved, dout, dlse)
    if key is not None and plan is not None and _all_same((*arrays, dout, dlse, out, lse), (*call[:3], *given)):
        remember_backward(key, plan, saved)
    return made


def _read(operands: tuple[Any, ...]) -> Operands:
    """Operands whose lengths are numbers."""
    call = Operands(*operands)
    if (call.cu_seqlens_q is None) is not (call.cu_seqlens_k is None):
        got, absent = "kq" if call.cu_seqlens_q is None else "qk"
        raise CuSeqlensError(f"cu_seqlens_{absent}: got None with offsets in cu_seqlens_{got}; allowed are offsets in both, or in neither")
    if call.longest_q is not None:
        call = call._replace(max_seqlen_q=_number(call.longest_q, "longest_q"))
    if call.longest_k is not None:
        call = call._replace(max_seqlen_k=_number(call.longest_k, "longest_k"))
    return call


def _number(length: Any, name: str) -> int:
    """The value of a tensor; waits for it when it is on a GPU."""
    if length.ndim or length.is_floating_point() or length.is_complex() or length.dtype is torch.bool:
        raise CuSeqlensError(f"{name}: got {length.dtype} of shape {tuple(length.shape)}; allowed is an integer tensor without dimensions")
    return int(length)


def _as_requests_take_them(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(map(rows_contiguous, arrays))


def _all_same(ones: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(one is other for one, other in zip(ones, others, strict=True))


def _nothing(like: Any, dtype: Any) -> Any:
    """A tensor without elements."""
    return like.new_empty((0,), dtype=dtype)


def _mask(call: Operands) -> MaskKind:
    return MaskKind.window(call.window_left, call.window_right)
