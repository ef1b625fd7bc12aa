"""Functional calls that something records go through the operators of torch: which ones, and how. torch is imported by the first of them.

Eager calls do not come here, except to be asked whether somebody records them, once they are known to take the whole way. torch.compile
traces :func:`attend` and what it calls: so this is plain Python on numbers and shapes, and never looks at memory.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..arrays.torch_hooks import hooks, is_watched
from ..errors import ArrayTypeError, CuSeqlensError, OutputError
from ..requests.arguments import flag, mask_of, needs_padding, softcap_of, step_up
from ..requests.options import AttentionOptions
from .autograd import is_recorded

__all__ = ["attend", "autocast", "is_fp8", "is_traced"]


def is_traced(*arrays: Any) -> bool:
    """Whether something records operations of torch on one of these arrays, and would miss a call that is none.

    That is a trace, a dispatch mode (make_fx, export, fake tensors, selective checkpointing), a transform of torch.func, or a class of
    tensors with a dispatch of its own.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    tensors = [x for x in arrays if isinstance(x, torch.Tensor)]
    return bool(tensors) and (is_watched() or any(map(_has_own_dispatch, tensors)))


def _has_own_dispatch(tensor: Any) -> bool:
    """Nested tensors have one too, without our operators: the checks of eager calls say what to do."""
    return not tensor.is_nested and type(tensor).__torch_dispatch__ is not sys.modules["torch"].Tensor.__torch_dispatch__


def autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any] | None:
    """q, k and v in the type that torch.autocast wants on their device; None where they are to stay as they are.

    As operations of torch that run in 16 bits have it: float64 stays, and gradients come back in the type of before. So does fp8, whose
    values are known with their descales only.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(q, torch.Tensor):
        return None
    kind = q.device.type
    if kind not in {"cpu", "cuda"} or not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    stay = (dtype, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    changes = [isinstance(x, torch.Tensor) and x.device.type == kind and x.is_floating_point() and x.dtype not in stay for x in (q, k, v)]
    if not any(changes):
        return None
    q, k, v = (x.to(dtype) if change else x for x, change in zip((q, k, v), changes, strict=True))
    return q, k, v


def is_fp8(*arrays: Any) -> bool:
    """Whether one of these is a tensor of torch with elements of fp8, which the operators do not take."""
    torch = sys.modules.get("torch")
    return torch is not None and any(isinstance(x, torch.Tensor) and x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for x in arrays)


def attend(q: Any, k: Any, v: Any, packing: Any, numbers: tuple[Any, ...], others: tuple[Any, ...], deterministic: Any) -> Any:
    """One functional call in operations of torch; arguments, results and errors are those of the eager one."""
    import torch

    if isinstance(q, np.ndarray):
        return _attend_numpy(q, k, v, packing, numbers, others, deterministic)
    dropout_p, softmax_scale, causal, window_size, softcap, sink_tokens, probs = numbers
    slopes, learned_sink, out = others
    dropout_p, softmax_scale, softcap = map(_float, (dropout_p, softmax_scale, softcap))
    deterministic, probs = flag(deterministic, "deterministic"), flag(probs, "return_attn_probs")
    mask = mask_of(window_size, causal=flag(causal, "causal"))
    band = mask.band(sink_tokens)
    _check_tensors(q, k, v, (slopes, learned_sink, out), () if packing is None else packing[:2])
    q, k, v = autocast(q, k, v) or (q, k, v)
    is_recorded(q, k, v, (slopes, learned_sink, out))
    v_head_dim, pads = v.shape[-1], needs_padding(q.shape[-1], k.shape[-1], v.shape[-1])
    if pads and softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    options = AttentionOptions(softmax_scale=softmax_scale, softcap=softcap_of(softcap), dropout_p=dropout_p)
    if pads:
        q, k, v = (torch.nn.functional.pad(x, (0, step_up(x.shape[-1]) - x.shape[-1])) for x in (q, k, v))
    operators = torch.ops.atomr_accel_flashattn
    dropout = options.dropout_p > 0
    lengths = (None, None, 0, 0, None, None) if packing is None else _lengths(*packing)
    made, lse, pattern = operators.attention(
        q,
        k,
        v,
        learned_sink,
        slopes,
        operators.draw_seed(q) if dropout else None,
        *lengths,
        options.softmax_scale,
        -1 if band.left is None else band.left,
        -1 if band.right is None else band.right,
        options.softcap,
        options.dropout_p,
        band.sink_tokens,
        deterministic,
        probs and dropout,
    )
    if pads and v_head_dim != made.shape[-1]:
        made = made[..., :v_head_dim]
    if out is not None:
        _check_out(out, made)
        made = out.copy_(made)
    return (made, lse, pattern if dropout else None) if probs else made


def _attend_numpy(q: Any, k: Any, v: Any, packing: Any, numbers: tuple[Any, ...], others: tuple[Any, ...], deterministic: Any) -> Any:
    """torch.compile traces arrays of NumPy as tensors; results are arrays again."""
    import torch

    q, k, v, *rest = (torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in (q, k, v, *others))
    if packing is not None:
        packing = (*(torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in packing[:2]), *packing[2:])
    made = attend(q, k, v, packing, numbers, tuple(rest), deterministic)
    return tuple(None if x is None else x.numpy() for x in made) if isinstance(made, tuple) else made.numpy()


def _check_tensors(q: Any, k: Any, v: Any, others: tuple[Any, Any, Any], offsets: tuple[Any, ...]) -> None:
    import torch

    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ArrayTypeError(f"{name}: got {type(x).__qualname__} in a call that torch records; allowed are torch tensors")
    for name, x in zip(("alibi_slopes", "learned_sink", "out"), others, strict=True):
        if x is not None and not isinstance(x, torch.Tensor):
            raise ArrayTypeError(f"{name}: got {type(x).__qualname__} in a call that torch records; allowed are torch tensors and None")
    for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), offsets, strict=False):
        if not isinstance(x, torch.Tensor):
            raise ArrayTypeError(f"{name}: got {type(x).__qualname__} in a call that torch records; allowed are torch tensors")


def _lengths(cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any) -> tuple[Any, ...]:
    """Offsets, longest lengths that are numbers, and those that are tensors, whose value nobody knows before the call runs."""
    longest_q, longest_k = _length(max_seqlen_q, "q"), _length(max_seqlen_k, "k")
    return (cu_seqlens_q, cu_seqlens_k, longest_q[0], longest_k[0], longest_q[1], longest_k[1])


def _length(length: Any, name: str) -> tuple[Any, Any]:
    import torch

    if isinstance(length, (int, torch.SymInt)) and not isinstance(length, bool):
        return length, None
    if length is None:
        raise CuSeqlensError(f"max_seqlen of cu_seqlens_{name}: got None in a call that torch records; pass an integer")
    tensor = length if isinstance(length, torch.Tensor) else torch.as_tensor(length)  # an integer of NumPy is traced as an array
    if tensor.ndim or tensor.is_floating_point() or tensor.dtype is torch.bool:
        raise CuSeqlensError(
            f"max_seqlen of cu_seqlens_{name}: got {length!r}; allowed is an integer, or an integer tensor without dimensions"
        )
    return 0, tensor


def _float(number: Any) -> Any:
    """A number of NumPy, as ``1 / np.sqrt(64)`` is, for Python: torch.compile takes it for an array without dimensions."""
    import torch

    traced = hooks.is_compiling() and isinstance(number, np.ndarray)
    return float(number) if traced and torch.as_tensor(number).dtype is torch.float64 else number


def _check_out(out: Any, made: Any) -> None:
    """A copy would widen and convert."""
    if (tuple(out.shape), out.dtype, out.device) != (tuple(made.shape), made.dtype, made.device):
        raise OutputError(
            f"out: got {out.dtype} of shape {tuple(out.shape)} on {out.device}; "
            f"allowed is {made.dtype} of shape {tuple(made.shape)} on {made.device}"
        )
