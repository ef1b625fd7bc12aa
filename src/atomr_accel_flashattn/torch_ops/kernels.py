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
from .first_call import Asked
from .operators import Operands, rows_contiguous
from .repeat import Packing, remember, repeat

__all__ = ["attention", "attention_backward", "draw_seed"]


def attention(*operands: Any) -> tuple[Any, Any, Any]:
    """O, LSE, and the dropout pattern or a tensor without elements."""
    call = _read(operands)
    if call.dropout_p > 0 and call.rng is None:
        raise DropoutError(f"rng: got None with dropout_p {call.dropout_p}; allowed is the (seed, offset) tensor that draw_seed gives")
    packing = None if call.cu_seqlens_q is None else (call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
    others = (call.alibi_slopes, call.learned_sink, None)
    window = (call.window_left, call.window_right)
    numbers = (0.0, call.softmax_scale, False, window, call.softcap, call.sink_tokens, True)
    with torch.no_grad():
        # a dropout has its seed already, and a shortcut would draw one
        key, made = (None, None) if call.dropout_p > 0 else repeat(*call[:3], packing, numbers, others)
        if made is None:
            made = _first(call, packing, key)
    out, lse, pattern = made
    return out, lse, call.q.new_empty((0,), dtype=torch.bool) if pattern is None else pattern


def _first(call: Operands, packing: Packing | None, key: Key | None) -> tuple[Any, Any, Any]:
    """Through a request, which leaves a shortcut for calls like it."""
    options = AttentionOptions(
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        learned_sink=call.learned_sink,
        dropout_p=call.dropout_p,
        rng=call.rng,
    )
    request = forward_request(
        call[:3], packing, mask=_mask(call), bias=PositionBias(call.alibi_slopes), sink_tokens=call.sink_tokens, options=options
    )
    made, plan = execute(request, lse=True, dropout_mask=call.return_pattern)
    if key is not None and plan is not None:
        remember(key, plan, made)
    return made.out, made.lse, made.dropout_mask


def attention_backward(dout: Any, dlse: Any, out: Any, lse: Any, *operands: Any) -> tuple[Any, Any, Any, Any]:
    """dq, dk, dv, and dsink or a tensor without elements."""
    call = _read(operands)
    asked = Asked(
        mask=_mask(call),
        sink_tokens=call.sink_tokens,
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        dropout_p=call.dropout_p,
        longest=(call.max_seqlen_q, call.max_seqlen_k),
        deterministic=call.deterministic,
    )
    lengths = (call.cu_seqlens_q, call.cu_seqlens_k)
    saved = (*call[:4], rows_contiguous(out), lse.contiguous(), call.alibi_slopes, call.rng, *lengths)
    dq, dk, dv, dsink = asked.gradients(saved, dout, dlse)
    return dq, dk, dv, lse.new_empty((0,), dtype=torch.float32) if dsink is None else dsink


def _read(operands: tuple[Any, ...]) -> Operands:
    """Operands as requests take them: rows of q, k and v are contiguous, lengths are numbers."""
    call = Operands(*operands)
    if (call.cu_seqlens_q is None) is not (call.cu_seqlens_k is None):
        got, absent = "kq" if call.cu_seqlens_q is None else "qk"
        raise CuSeqlensError(f"cu_seqlens_{absent}: got None with offsets in cu_seqlens_{got}; allowed are offsets in both, or in neither")
    q, k, v = map(rows_contiguous, call[:3])
    if call.longest_q is not None:
        call = call._replace(max_seqlen_q=int(call.longest_q))
    if call.longest_k is not None:
        call = call._replace(max_seqlen_k=int(call.longest_k))
    return call._replace(q=q, k=k, v=v)


def _mask(call: Operands) -> MaskKind:
    return MaskKind.window(call.window_left, call.window_right)
