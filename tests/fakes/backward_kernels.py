"""The three kernels of a backward on the fake card. What one leaves in the workspace the next one reads, as on a card.

So a wrong address, stride, slot or order of launches gives wrong numbers: the workspace holds NaN until the first kernel has written it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.arrays.read import as_numpy
from atomr_accel_flashattn.kernels.backward import BackwardSpec, BwdParams
from atomr_accel_flashattn.kernels.bwd_postprocess import BackwardPostprocessSpec
from atomr_accel_flashattn.kernels.bwd_preprocess import BackwardPreprocessSpec
from atomr_accel_flashattn.problem import BackwardProblem
from atomr_accel_flashattn.reference.backward import backward

from .kernel import array_at, decode, strided

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["run_backward_kernel"]


def run_backward_kernel(spec: BackwardSpec, params: BwdParams, *, grid: int) -> None:
    """Check what a launch says against its spec, and compute."""
    p: Any = params
    if isinstance(spec, BackwardPreprocessSpec):
        assert grid == -(-p.fwd.seqlen_q // spec.tile.block_m) * p.fwd.batch * p.fwd.heads
        _preprocess(spec, p)
        return
    _check_alignment(spec, p)
    if isinstance(spec, BackwardPostprocessSpec):
        assert p.convert_blocks == -(-p.fwd.seqlen_q // spec.tile.block_m) * p.fwd.batch * p.fwd.heads
        assert p.sink_blocks == (p.fwd.heads if spec.learned_sink else 0)
        parts = -(-p.fwd.seqlen_k // spec.tile.block_m) * p.fwd.batch * p.heads_kv if spec.head_split else 0
        assert (grid > parts + p.convert_blocks + p.sink_blocks) is spec.varlen
        assert grid >= parts + p.convert_blocks + p.sink_blocks
        _postprocess(spec, p)
        return
    assert spec.exact_head_dim == ((spec.head_dim, spec.v_head_dim) == (p.fwd.head_dim, p.fwd.v_head_dim))
    assert p.blocks_n == -(-p.fwd.seqlen_k // spec.tile.block_n)
    assert p.head_splits * p.heads_per_split == p.fwd.heads_per_kv
    assert (p.head_splits > 1) is spec.head_split
    assert grid == p.blocks_n * p.fwd.batch * p.heads_kv * p.head_splits
    _differentiate(spec, p)


def _preprocess(spec: BackwardSpec, p: Any) -> None:
    """Delta, less dLSE, of each row that is not idle, and zeros in the sum of dQ."""
    lse, delta = _rows(spec, p, p.fwd.lse), _delta(spec, p)
    idle = np.isneginf(lse)
    delta[...] = 0
    if p.dout:
        shape = (*_lead(spec, p), p.fwd.heads, p.fwd.v_head_dim)
        out = as_numpy(strided(spec, p.fwd.o, p.fwd.o_stride, shape)).astype(np.float32)
        products = out * as_numpy(strided(spec, p.dout, p.dout_stride, shape))
        delta[...] = np.where(idle, 0, np.moveaxis(products.sum(-1), -1, -2))
    if p.dlse:
        delta -= np.where(idle & (not spec.learned_sink), 0, _rows(spec, p, p.dlse))
    _dq_sum(p)[: _owned(spec, p, "q")] = 0


def _differentiate(spec: BackwardSpec, p: Any) -> None:
    """dK and dV, and what is added to the sum of dQ. O is not read, only delta."""
    known, _, lse = decode(spec, p.fwd)
    assert p.softmax_scale == np.float32(known.softmax_scale)
    out = np.zeros(known.out_shape, np.float32)
    shift = -_delta(spec, p)
    problem = BackwardProblem(
        forward=known,
        out=_described(out, "float32"),
        lse=lse,
        dout=strided(spec, p.dout, p.dout_stride, known.out_shape) if p.dout else None,
        dlse=_described(shift, "float32"),
    )
    dq = np.empty(known.q.shape, np.float32)
    dk, dv = (as_numpy(strided(spec, *each)) for each in ((p.dk, p.dk_stride, known.k.shape), (p.dv, p.dv_stride, known.v.shape)))
    if spec.head_split:  # the heads of a group are the next kernel's to add
        made = dk, dv = np.zeros(known.k.shape, np.float32), np.zeros(known.v.shape, np.float32)
    backward(problem, dq, dk, dv, None)
    if spec.head_split:
        for parts, whole in zip(_kv_parts(spec, p), made, strict=True):
            rows = whole.reshape(-1, *whole.shape[-2:])
            parts[:, : len(rows)] = rows / p.head_splits
    if known.softmax_scale:  # the scale is the next kernel's
        owned = _owned(spec, p, "q")
        _dq_sum(p)[:owned] += dq.reshape(_dq_sum(p).shape)[:owned] / np.float32(known.softmax_scale)


def _postprocess(spec: BackwardSpec, p: Any) -> None:
    """dQ of the rows that a sequence owns, zeros in all others, and dsink."""
    shape, owned = (*_lead(spec, p), p.fwd.heads, p.fwd.head_dim), _owned(spec, p, "q")
    sums = _dq_sum(p) * np.float32(p.softmax_scale)
    sums[owned:] = 0
    as_numpy(strided(spec, p.dq, p.dq_stride, shape))[...] = sums.reshape(shape)
    if spec.head_split:
        for (ptr, stride, width), parts in zip(_kv_gradients(p), _kv_parts(spec, p), strict=True):
            as_numpy(strided(spec, ptr, stride, (*_lead(spec, p, "k"), p.heads_kv, width)))[...] = parts.sum(0).reshape(
                *_lead(spec, p, "k"), p.heads_kv, width
            )
    if spec.varlen:
        for ptr, stride, width in _kv_gradients(p):
            as_numpy(strided(spec, ptr, stride, (p.tokens_k, p.heads_kv, width)))[_owned(spec, p, "k") :] = 0
    assert bool(p.dsink) is spec.learned_sink
    if spec.learned_sink:
        lse, delta = (each[..., : owned if spec.varlen else None] for each in (_rows(spec, p, p.fwd.lse), _delta(spec, p)))
        sink = as_numpy(array_at(p.fwd.learned_sink, (p.fwd.heads,), "float32"))
        weights = np.exp(sink[:, None] - lse)
        terms = (weights * -delta).sum(-1).reshape(-1, p.fwd.heads)
        as_numpy(array_at(p.dsink, (p.fwd.heads,), "float32"))[...] = terms.sum(0)


def _lead(spec: BackwardSpec, p: Any, of: str = "q") -> tuple[int, ...]:
    """Dimensions of q or k before heads and columns."""
    return (getattr(p, f"tokens_{of}"),) if spec.varlen else (p.fwd.batch, getattr(p.fwd, f"seqlen_{of}"))


def _kv_gradients(p: Any) -> tuple[tuple[Any, Any, int], ...]:
    """Address, strides and width of dK and dV."""
    return (p.dk, p.dk_stride, p.fwd.head_dim), (p.dv, p.dv_stride, p.fwd.v_head_dim)


def _kv_parts(spec: BackwardSpec, p: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """The parts of dK and of dV, each (parts, tokens, KV heads, columns), where the kernels have both in tiles."""
    tile_rows = p.kv_tile_rows if spec.varlen else p.fwd.batch * p.kv_tile_rows
    assert p.tokens_k <= 16 * tile_rows
    widths, first = (p.fwd.head_dim, p.fwd.v_head_dim), p.dq_sum + 4 * p.kv_parts
    room = as_numpy(array_at(first, (p.head_splits, 16 * tile_rows, p.heads_kv, sum(widths)), "float32"))[:, : p.tokens_k]
    return room[..., : widths[0]], room[..., widths[0] :]


def _rows(spec: BackwardSpec, p: Any, ptr: int) -> NDArray[Any]:
    """An array of one number a row and head."""
    shape = (p.fwd.heads, p.tokens_q) if spec.varlen else (p.fwd.batch, p.fwd.heads, p.fwd.seqlen_q)
    assert (p.fwd.lse_batch_stride, p.fwd.lse_head_stride) == (0 if spec.varlen else math.prod(shape[1:]), shape[-1])
    return as_numpy(array_at(ptr, shape, "float32"))


def _delta(spec: BackwardSpec, p: Any) -> NDArray[Any]:
    """The second of each pair of the statistics, of which the first belongs to no row."""
    lse = _rows(spec, p, p.fwd.lse)
    return as_numpy(array_at(p.statistics, (1 + lse.size, 2), "float32"))[1:, 1].reshape(lse.shape)


def _dq_sum(p: Any) -> NDArray[Any]:
    return as_numpy(array_at(p.dq_sum, (p.tokens_q, p.fwd.heads, p.fwd.head_dim), "float32"))


def _owned(spec: BackwardSpec, p: Any, of: str) -> int:
    """Rows that belong to a sequence."""
    if not spec.varlen:
        return int(getattr(p, f"tokens_{of}"))
    return int(as_numpy(array_at(getattr(p.fwd, f"cu_seqlens_{of}"), (p.fwd.batch + 1,), "int32"))[-1])


def _described(array: NDArray[Any], name: str) -> Any:
    return replace(array_at(array.ctypes.data, array.shape, name), source=array)


def _check_alignment(spec: BackwardSpec, p: Any) -> None:
    if not spec.aligned:
        return
    addresses = (p.fwd.q, p.fwd.k, p.fwd.v, p.dout, p.dq, p.dk, p.dv)
    assert not any((ptr or 0) & 15 for ptr in addresses), "an aligned kernel was given an odd address"
    strides = (p.fwd.q_stride, p.fwd.k_stride, p.fwd.v_stride, p.dout_stride, p.dq_stride, p.dk_stride, p.dv_stride)
    for each in strides:
        assert not (each.batch | each.row | each.head) * spec.dtype.itemsize & 15, "an aligned kernel was given an odd stride"
