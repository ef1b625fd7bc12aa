"""How the operators of torch are mapped over a dimension (torch.func.vmap): its elements become heads of one call.

Heads are independent, in dense calls and in packed ones, so V mapped calls of Hq query and Hkv KV heads are one call of V * Hq and
V * Hkv. An array that is not mapped is repeated. Offsets, lengths and seeds are shared, and refused where they are mapped. With dropout
the gradients of one call that was not mapped are taken one by one: as heads of one call they would have other patterns than that call had.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DropoutError, UnsupportedArgumentError
from .operators import Operands

__all__ = ["attention", "attention_backward", "draw_seed"]

_SHARED = ("rng", "cu_seqlens_q", "cu_seqlens_k", "longest_q", "longest_k")


def attention(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Any, Any]:
    """O, LSE and pattern of all of them, with the dimension beside that of the heads."""
    if not info.batch_size:
        return _of_none(attention, info, in_dims, operands)
    call = _fold(info, in_dims, operands)
    out, lse, pattern = torch.ops.atomr_accel_flashattn.attention(*call)
    dims = out.ndim - 2, lse.ndim - 2, 1 if pattern.ndim == 4 else None
    made = out, lse, pattern
    return tuple(x if dim is None else _unfold(info, x, dim) for x, dim in zip(made, dims, strict=True)), dims


def attention_backward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """The same of gradients."""
    if not info.batch_size:
        return _of_none(attention_backward, info, in_dims, arguments)
    (dout, dlse, out, lse), operands = arguments[:4], arguments[4:]
    if Operands(*operands).dropout_p > 0 and in_dims[2] is in_dims[3] is None:
        return _one_by_one(info, in_dims, arguments)
    call = _fold(info, in_dims[4:], operands)
    read = (None if x is None else _together(info, x, dim, -2) for x, dim in zip((dout, dlse, out, lse), in_dims[:4], strict=True))
    *gradients, dsink = torch.ops.atomr_accel_flashattn.attention_backward(*read, *call[:-1])
    dims = tuple(x.ndim - 2 for x in gradients)
    made = tuple(_unfold(info, x, dim) for x, dim in zip(gradients, dims, strict=True))
    if call.learned_sink is None:
        return (*made, dsink), (*dims, None)
    return (*made, _unfold(info, dsink, 0)), (*dims, 0)


def _one_by_one(info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Gradients of one call, for several dout or dlse."""
    dims = (*in_dims, *(None,) * (len(arguments) - len(in_dims)))
    made = [
        torch.ops.atomr_accel_flashattn.attention_backward(
            *(x if dim is None else x.select(dim, at) for x, dim in zip(arguments, dims, strict=True))
        )
        for at in range(info.batch_size)
    ]
    return tuple(torch.stack(each) for each in zip(*made, strict=True)), (0,) * len(made[0])


def draw_seed(info: Any, _in_dims: tuple[int | None, ...], q: Any) -> tuple[Any, None]:
    """One for all of them: as heads of one call they drop different elements."""
    _check_randomness(info)
    return torch.ops.atomr_accel_flashattn.draw_seed(q), None


def _of_none(rule: Any, info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Mapped over no element: over one of zeros, which is cut off again. So calls are checked, and results have their history."""
    mapped = zip(arguments, in_dims, strict=False)  # operands at the end that have their defaults have no dimension
    one = (x if dim is None else torch.cat((x, x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))), dim) for x, dim in mapped)
    made, dims = rule(info._replace(batch_size=1), in_dims, *one, *arguments[len(in_dims) :])
    return tuple(x if dim is None else x.narrow(dim, 0, 0) for x, dim in zip(made, dims, strict=True)), dims


def _check_randomness(info: Any) -> None:
    if info.randomness != "different":
        raise DropoutError(
            f"dropout_p: got dropout inside of vmap with randomness={info.randomness!r}; allowed is randomness='different'; "
            "pass it to torch.func.vmap"
        )


def _fold(info: Any, in_dims: tuple[int | None, ...], operands: tuple[Any, ...]) -> Operands:
    """The operands of the one call."""
    call = Operands(*operands)
    every: tuple[Any, ...] = (*in_dims, *(None,) * (len(Operands._fields) - len(in_dims)))
    dims = Operands(*every)
    for name in _SHARED:
        if getattr(dims, name) is not None:
            raise UnsupportedArgumentError(f"{name}: got a tensor that vmap maps over; allowed is one for all; use in_dims=None for it")
    if call.dropout_p > 0:
        _check_randomness(info)
    q, k, v = (_together(info, x, dim, -2) for x, dim in zip(call[:3], dims[:3], strict=True))
    sink, slopes = (
        None if x is None else _together(info, x, dim, -1)
        for x, dim in ((call.learned_sink, dims.learned_sink), (call.alibi_slopes, dims.alibi_slopes))
    )
    return call._replace(q=q, k=k, v=v, learned_sink=sink, alibi_slopes=slopes)


def _together(info: Any, x: Any, dim: int | None, heads: int) -> Any:
    """``x`` whose mapped dimension, the slower one, is joined with that of the heads, which is counted from the end."""
    x = x.unsqueeze(heads - 1).expand(*x.shape[:heads], info.batch_size, *x.shape[heads:]) if dim is None else x.movedim(dim, heads - 1)
    return x.flatten(heads - 1, heads)


def _unfold(info: Any, x: Any, dim: int) -> Any:
    """The two dimensions of the joined one ``dim``, which is the mapped one after that."""
    return x.unflatten(dim, (info.batch_size, x.shape[dim] // info.batch_size))
