"""What the operators of torch do with real tensors: make a request and run it. Loaded by their first call; imports torch."""

from __future__ import annotations

from typing import Any

import torch

from ..arrays.new import draw_seed
from ..errors import DropoutError
from ..requests.options import AttentionOptions, MaskKind, PositionBias
from ..runtime.execute import execute
from ..varlen import forward_request
from .first_call import Asked
from .operators import Operands, rows_contiguous

__all__ = ["attention", "attention_backward", "draw_seed"]


def attention(*operands: Any) -> tuple[Any, Any, Any]:
    """O, LSE, and the dropout pattern or a tensor without elements."""
    call = _read(operands)
    if call.dropout_p > 0 and call.rng is None:
        raise DropoutError(f"rng: got None with dropout_p {call.dropout_p}; allowed is the (seed, offset) tensor that draw_seed gives")
    packing = None if call.cu_seqlens_q is None else (call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
    options = AttentionOptions(
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        learned_sink=call.learned_sink,
        dropout_p=call.dropout_p,
        rng=call.rng,
    )
    with torch.no_grad():
        request = forward_request(
            call[:3], packing, mask=_mask(call), bias=PositionBias(call.alibi_slopes), sink_tokens=call.sink_tokens, options=options
        )
        made, _ = execute(request, lse=True, dropout_mask=call.return_pattern)
    pattern = call.q.new_empty((0,), dtype=torch.bool) if made.dropout_mask is None else made.dropout_mask
    return made.out, made.lse, pattern


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
    q, k, v = map(rows_contiguous, call[:3])
    if call.longest_q is not None:
        call = call._replace(max_seqlen_q=int(call.longest_q))
    if call.longest_k is not None:
        call = call._replace(max_seqlen_k=int(call.longest_k))
    return call._replace(q=q, k=k, v=v)


def _mask(call: Operands) -> MaskKind:
    return MaskKind.window(call.window_left, call.window_right)
