"""Floating-point operations of the operators, for ``torch.utils.flop_counter``. This module imports torch.

torch.compile asks it under ``activation_memory_budget``: there, an operator without a count costs nothing, and is computed again first.
As for torch's own attention, a count is that of the matrix products, two forward and five backward, whatever a mask hides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from .operators import Operands

__all__ = ["register"]


def register(counter: Any) -> None:
    """With ``torch.utils.flop_counter``."""
    operators = torch.ops.atomr_accel_flashattn
    counter.register_flop_formula(operators.attention, get_raw=True)(_of_forward)
    counter.register_flop_formula(operators.attention_backward, get_raw=True)(_of_backward)


def _of_forward(*operands: Any, out_val: Any = None, **named: Any) -> Any:
    """QK^T and PV."""
    del out_val
    call = Operands(*operands, **named)
    return 2 * _scores(call) * (call.q.shape[-1] + call.v.shape[-1])


def _of_backward(_dout: Any, _dlse: Any, _out: Any, _lse: Any, *operands: Any, out_val: Any = None, **named: Any) -> Any:
    """QK^T, dP = dO V^T, dV = P^T dO, dQ = dS K and dK = dS^T Q."""
    del out_val
    call = Operands(*operands, **named)
    return 2 * _scores(call) * (3 * call.q.shape[-1] + 2 * call.v.shape[-1])


def _scores(call: Operands) -> Any:
    """Elements of S; of packed sequences whose offsets have no values, as many as there can be."""
    q, k, heads = call.q, call.k, call.q.shape[-2]
    if call.cu_seqlens_q is None:
        return q.shape[0] * heads * q.shape[1] * k.shape[1]
    if _has_values(call.cu_seqlens_q) and _has_values(call.cu_seqlens_k):
        lengths = (offsets.diff().tolist() for offsets in (call.cu_seqlens_q, call.cu_seqlens_k))
        return heads * sum(of_q * of_k for of_q, of_k in zip(*lengths, strict=True))
    longest_q = call.max_seqlen_q if call.longest_q is None else q.shape[0]
    longest_k = call.max_seqlen_k if call.longest_k is None else k.shape[0]
    most = torch.sym_min((call.cu_seqlens_q.shape[0] - 1) * longest_q * longest_k, q.shape[0] * k.shape[0])
    return heads * most


def _has_values(offsets: Any) -> bool:
    return not (offsets.is_meta or is_fake(offsets))
