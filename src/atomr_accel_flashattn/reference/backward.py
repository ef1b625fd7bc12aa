"""Backward attention on the CPU, blockwise from the LSE of the forward (FlashAttention-2, arXiv 2307.08691, Algorithm 2).

Memory beyond the outputs is four float copies of one KV head (K, V, dK, dV) plus a few tiles, and o and the LSE where the forward runs
here: O(N). All query heads of a KV head go through a tile at once, so dK and dV of a group are sums of one product. Types and accumulators
are those of the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.read import as_numpy
from .attention import forward
from .mask import BandMask
from .scores import TILE_COLS, Call, bias_and_mask, blocks, cap, products, read_call, read_head, rows_of_a_tile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..problem import ArrayInfo, BackwardProblem

    Array = NDArray[Any]

__all__ = ["backward"]


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Views of one sequence, as in the forward: those of rows are (Sq, Hq, ...), those of keys (Sk, Hkv, ...), LSEs (Hq, Sq)."""

    index: int
    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array
    dout: Array
    dlse: Array
    dq: Array
    dk: Array
    dv: Array


@dataclass(frozen=True, slots=True)
class _Rows:
    """A block of queries for all heads of a group, as matrices of heads times queries, and (heads, queries) of what a row has one of."""

    q: Array
    dout: Array
    lse: Array  # +inf where the forward found no key, so that probabilities are 0
    shift: Array  # dLSE - delta, delta = rowsum(dO * O): what is added to dP


def backward(problem: BackwardProblem, dq: Array, dk: Array, dv: Array, dsink: Array | None) -> None:
    """Write the gradients of q, k and v, and of the learned sink (float32) where given, of a problem whose arrays are in host memory.

    Shapes are those of q, k, v and the sink; strides are free. NaN and infinity follow docs/semantics.md.
    """
    call = read_call(problem.forward)
    sink_sums = np.zeros(problem.forward.heads)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        for gradient in (dq, dk, dv):
            gradient[...] = 0  # rows that no sequence owns, and those without keys
        for arrays in _sequences(problem, call, (dq, dk, dv)):
            for kv_head in range(problem.forward.heads_kv):
                _differentiate_kv_head(call, arrays, kv_head, sink_sums)
    if dsink is not None:
        dsink[...] = sink_sums


def _sequences(problem: BackwardProblem, call: Call, gradients: tuple[Array, Array, Array]) -> Iterator[_Arrays]:
    """Views of each sequence, packed or dense."""
    known = problem.forward
    of_rows = (as_numpy(known.q), _or_zeros(problem.dout, known.out_shape), gradients[0])
    of_keys = (as_numpy(known.k), as_numpy(known.v), *gradients[1:])
    out, lse = _out_and_lse(problem, call)
    dlse = _or_zeros(problem.dlse, known.lse_shape)
    ends_q = None if known.cu_seqlens_q is None else as_numpy(known.cu_seqlens_q).tolist()
    ends_k = None if known.cu_seqlens_k is None else as_numpy(known.cu_seqlens_k).tolist()
    for index in range(known.batch):
        rows = index if ends_q is None else slice(ends_q[index], ends_q[index + 1])
        keys = index if ends_k is None else slice(ends_k[index], ends_k[index + 1])
        q, dout, dq = (array[rows] for array in of_rows)
        k, v, dk, dv = (array[keys] for array in of_keys)
        row_lse, row_dlse = (array[rows] if ends_q is None else array[:, rows] for array in (lse, dlse))
        yield _Arrays(index, q, k, v, out[rows], row_lse, dout, row_dlse, dq, dk, dv)


def _or_zeros(info: ArrayInfo | None, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.zeros((), np.float32), shape) if info is None else as_numpy(info)


def _out_and_lse(problem: BackwardProblem, call: Call) -> tuple[Array, Array]:
    """Those of the forward: given, or made here.

    A float64 call needs a float64 LSE. It is made here, and used where the one that was given is its rounding; another one is the
    caller's word, as that of a softmax over more keys than these.
    """
    known, out, lse = problem.forward, problem.out, problem.lse
    if out is not None and lse is not None and call.compute == np.float32:
        return as_numpy(out), as_numpy(lse)
    new_out = np.zeros(known.out_shape, as_numpy(known.q).dtype)
    new_lse = np.full(known.lse_shape, -np.inf, call.compute)
    forward(known, new_out, new_lse, None)
    if out is None or lse is None:
        return new_out, new_lse
    given = as_numpy(lse)
    return as_numpy(out), np.where(np.abs(new_lse - given) <= np.spacing(np.abs(given)), new_lse, given)


def _differentiate_kv_head(call: Call, arrays: _Arrays, kv_head: int, sink_sums: Array) -> None:
    """All query heads that read one KV head of one sequence."""
    problem, ratio = call.problem, call.problem.heads // call.problem.heads_kv
    group = range(kv_head * ratio, (kv_head + 1) * ratio)
    heads = slice(group.start, group.stop)
    mask = BandMask(len(arrays.q), len(arrays.k), problem.band)
    rows_with_keys = mask.rows_with_keys()
    seen = mask.key_ranges(rows_with_keys)
    keys, values = (read_head(array, kv_head, seen, call.compute) for array in (arrays.k, arrays.v))
    dkeys, dvalues = np.zeros_like(keys), np.zeros_like(values)
    if call.sink is not None:  # rows without keys, whose o is 0
        idle = slice(0, rows_with_keys.start)
        sink_sums[heads] += _sink_terms(call.sink[heads], arrays.lse[heads, idle], arrays.dlse[heads, idle])
    for rows in blocks(rows_with_keys, rows_of_a_tile(ratio)):
        block = _read_rows(call, arrays, group, rows)
        dq = _differentiate_rows(call, mask, (arrays.index, group, rows), block, (keys, values), (dkeys, dvalues))
        arrays.dq[rows.start : rows.stop, heads] = dq.transpose(1, 0, 2)
        if call.sink is not None:
            sink_sums[heads] += _sink_terms(call.sink[heads], block.lse, block.shift)
    dkeys *= call.compute.type(problem.softmax_scale)
    arrays.dk[:, kv_head], arrays.dv[:, kv_head] = dkeys, dvalues


def _read_rows(call: Call, arrays: _Arrays, group: range, rows: range) -> _Rows:
    """What is read of a block of queries. Where the forward found no key, q and dO are 0 and dLSE does not count."""
    heads, span = slice(group.start, group.stop), slice(rows.start, rows.stop)
    q, out, dout = (array[span, heads].transpose(1, 0, 2).astype(call.compute) for array in (arrays.q, arrays.out, arrays.dout))
    lse = arrays.lse[heads, span].astype(call.compute)
    shift = arrays.dlse[heads, span] - (dout * out).sum(axis=-1)
    idle = np.isneginf(lse)
    if idle.any():
        q[idle] = dout[idle] = shift[idle] = 0
        lse[idle] = np.inf
    rows_of_all = len(group) * len(rows)
    return _Rows(q.reshape(rows_of_all, -1), dout.reshape(rows_of_all, -1), lse, shift)


def _differentiate_rows(
    call: Call,
    mask: BandMask,
    where: tuple[int, range, range],
    block: _Rows,
    keys_values: tuple[Array, Array],
    gradients: tuple[Array, Array],
) -> Array:
    """DQ (heads, queries, D) of one block against all the keys that it sees; its parts of dK (without the scale) and dV are added."""
    index, group, rows = where
    (keys, values), (dkeys, dvalues) = keys_values, gradients
    problem, shape = call.problem, (len(group), len(rows))
    dq = np.zeros_like(block.q)
    for seen in mask.key_ranges(rows):
        for cols in blocks(seen, TILE_COLS):
            tile = slice(cols.start, cols.stop)
            scores = products(block.q, keys[tile]).reshape(*shape, len(cols))
            cap(call, scores)
            cap_slope = 1 - np.square(scores / call.compute.type(problem.softcap)) if problem.softcap else None
            hidden = bias_and_mask(call, index, mask, group, rows, cols, scores)
            scores -= block.lse[..., None]
            probabilities = np.exp(scores, out=scores)
            dscores = products(block.dout, values[tile]).reshape(scores.shape)
            dropped = probabilities
            if call.pattern is not None:
                kept = call.pattern.keep(index, problem.heads, group, rows, cols) * call.compute.type(call.pattern.rescale)
                dropped = probabilities * kept
                dscores *= kept
            dvalues[tile] += dropped.reshape(-1, len(cols)).T @ block.dout
            dscores += block.shift[..., None]
            dscores *= probabilities
            if cap_slope is not None:
                dscores *= cap_slope
            if hidden is not None:
                np.copyto(dscores, 0, where=hidden)  # a NaN in the value of a hidden key makes its dP one
            flat = dscores.reshape(-1, len(cols))
            dq += flat @ keys[tile]
            dkeys[tile] += flat.T @ block.q
    dq *= call.compute.type(problem.softmax_scale)
    return dq.reshape(*shape, -1)


def _sink_terms(sink: Array, lse: Array, shift: Array) -> Array:
    """Each head's part of its gradient: sum of exp(sink - lse) (dLSE - delta) over rows; ``lse`` and ``shift`` are (heads, queries)."""
    weight = np.exp(sink[:, None] - lse)
    terms: Array = np.where(weight == 0, 0, weight * shift).sum(axis=-1, dtype=np.float64)
    return terms
