"""Forward attention on the CPU, blockwise with an online softmax (FlashAttention-2, arXiv 2307.08691, Algorithm 1).

Memory beyond the outputs is one float copy of the K and V of one KV head plus a few tiles: O(N). The two products are BLAS calls, for
all query heads of a KV head at once, so K is never repeated. All types accumulate in float32, except float64, which does in float64.
With ``num_splits`` the tiles of a block of rows go to so many softmaxes, which are then merged. With ``batch_invariant`` each query goes
alone over whole tiles of keys, cut at multiples of the tile from the first key, so that every sum has the same terms in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.read import as_numpy
from .cache import Slots, keys_of, read_values, write_new_tokens
from .fp8 import round_probabilities
from .mask import BandMask
from .scores import (
    TILE_COLS,
    TILE_ROWS,
    Call,
    Pattern,
    bias_and_mask,
    blocks,
    cap,
    products,
    read_call,
    read_head,
    read_offsets,
    rows_of_a_tile,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from ..problem import AttentionProblem

    Array = NDArray[Any]

__all__ = ["forward"]


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One sequence: q (Sq, Hq, D), k (Sk, Hkv, D), v (Sk, Hkv, Dv), out (Sq, Hq, Dv), lse (Hq, Sq): views, or slots of a cache."""

    index: int
    q: Array
    k: Array | Slots
    v: Array | Slots
    out: Array
    lse: Array | None


class _OnlineSoftmax:
    """Running maximum, denominator and unnormalised output of a block of rows, (heads, queries)."""

    def __init__(self, heads: int, queries: int, v_head_dim: int, dtype: np.dtype[Any]) -> None:
        self.maximum: Array = np.full((heads, queries), -np.inf, dtype)
        self.total: Array = np.zeros((heads, queries), dtype)
        self.output: Array = np.zeros((heads, queries, v_head_dim), dtype)

    def update(self, scores: Array, v: Array, keep: Array | None, round_to: np.dtype[Any]) -> None:
        """Take in a tile: ``scores`` (heads, queries, keys) with -inf where hidden, overwritten; ``v`` (keys, Dv)."""
        maximum = np.maximum(self.maximum, scores.max(axis=-1))
        shift = np.where(np.isneginf(maximum), 0, maximum)  # a row that has seen no key yet: exp(-inf - 0) is 0, not NaN
        scores -= shift[..., None]
        probabilities = np.exp(scores, out=scores)
        decay = np.exp(self.maximum - shift)
        self.total = self.total * decay + probabilities.sum(axis=-1)
        if keep is not None:
            probabilities *= keep
        if round_to != probabilities.dtype:
            probabilities = round_probabilities(probabilities, round_to)
        self.output *= decay[..., None]
        heads, queries, keys = probabilities.shape
        self.output += (probabilities.reshape(heads * queries, keys) @ v).reshape(self.output.shape)
        self.maximum = maximum

    def merge(self, other: _OnlineSoftmax) -> None:
        """Take in what another one has seen of other keys."""
        maximum = np.maximum(self.maximum, other.maximum)
        shift = np.where(np.isneginf(maximum), 0, maximum)
        decay, weight = np.exp(self.maximum - shift), np.exp(other.maximum - shift)
        self.total = self.total * decay + other.total * weight
        self.output = self.output * decay[..., None] + other.output * weight[..., None]
        self.maximum = maximum

    def finish(self, sink: Array | None, rescale: float) -> tuple[Array, Array]:
        """Normalised output (heads, queries, Dv) and LSE (heads, queries); ``sink`` (heads,) joins the denominator only."""
        if sink is not None:
            maximum = np.maximum(self.maximum, sink[:, None])
            shift = np.where(np.isneginf(maximum), 0, maximum)
            decay = np.exp(self.maximum - shift)
            self.total = self.total * decay + np.exp(sink[:, None] - shift)
            self.output *= decay[..., None]
            self.maximum = maximum
        divisor = np.where(self.total == 0, 1, self.total)  # no key and no sink: the output is 0, the maximum and so the LSE -inf
        return self.output * (rescale / divisor)[..., None], self.maximum + np.log(divisor)


def forward(problem: AttentionProblem, out: Array, lse: Array | None, dropout_mask: NDArray[np.bool_] | None) -> None:
    """Write o, and where given the float32 LSE and the bool keep pattern, of a problem whose arrays are in host memory.

    Shapes are ``problem.out_shape``, ``lse_shape`` and ``dropout_mask_shape``; strides are free. NaN and infinity follow docs/semantics.md.
    """
    call = read_call(problem)
    if dropout_mask is not None and call.pattern is not None:
        dropout_mask[...] = False
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        for sequence in _sequences(problem, out, lse):
            for kv_head in range(problem.heads_kv):
                _attend_kv_head(call, sequence, kv_head)
            if dropout_mask is not None and call.pattern is not None:
                _write_pattern(call, call.pattern, sequence, dropout_mask[sequence.index])


def _sequences(problem: AttentionProblem, out: Array, lse: Array | None) -> Iterator[_Sequence]:
    """Views of each sequence, packed or dense, or in a cache."""
    ends_q: list[int] = []
    if problem.cu_seqlens_q is not None:  # before anything is written
        ends_q = read_offsets(problem.cu_seqlens_q, "cu_seqlens_q", problem.q.shape[0], problem.seqlen_q)
    q, keys = _read_keys(problem)
    if not ends_q:
        for index in range(problem.batch):
            k, v = keys(index)
            yield _Sequence(index, q[index], k, v, out[index], None if lse is None else lse[index])
        return
    out[ends_q[-1] :] = 0  # rows that no sequence owns
    if lse is not None:
        lse[:, ends_q[-1] :] = -np.inf
    for index in range(problem.batch):
        rows = slice(ends_q[index], ends_q[index + 1])
        k, v = keys(index)
        yield _Sequence(index, q[rows], k, v, out[rows], None if lse is None else lse[:, rows])


def _read_keys(problem: AttentionProblem) -> tuple[Array, Callable[[int], tuple[Array | Slots, Array | Slots]]]:
    """q, and what gives the K and V of a sequence. New tokens of a cache have been written, and q is turned."""
    if problem.cache is not None:
        values = read_values(problem)
        return write_new_tokens(problem, values), lambda index: keys_of(problem, values, index)
    q, k, v = (as_numpy(info) for info in (problem.q, problem.k, problem.v))
    if problem.cu_seqlens_k is None:
        return q, lambda index: (k[index], v[index])
    ends = read_offsets(problem.cu_seqlens_k, "cu_seqlens_k", len(k), problem.seqlen_k)
    return q, lambda index: (k[ends[index] : ends[index + 1]], v[ends[index] : ends[index + 1]])


def _attend_kv_head(call: Call, sequence: _Sequence, kv_head: int) -> None:
    """All query heads that read one KV head of one sequence."""
    problem, ratio = call.problem, call.problem.heads // call.problem.heads_kv
    group = range(kv_head * ratio, (kv_head + 1) * ratio)
    queries = range(len(sequence.q))
    mask = BandMask(len(sequence.q), len(sequence.k), problem.band)
    seen = mask.key_ranges(queries)
    if isinstance(sequence.k, Slots):
        mask = replace(mask, absent=sequence.k.absent(seen))
    step = TILE_COLS if problem.batch_invariant else 1
    keys, values = (read_head(array, kv_head, seen, call.compute, step) for array in (sequence.k, sequence.v))
    if problem.descales is not None:
        for of_head, factors, array in zip((keys, values), call.factors[1:], (sequence.k, sequence.v), strict=True):
            for tokens in seen:
                of_head[tokens.start : tokens.stop] *= 1 if factors is None else factors.of(sequence.index, kv_head, tokens, array)
    for rows in blocks(queries, 1 if problem.batch_invariant else rows_of_a_tile(ratio)):
        _attend_rows(call, sequence, mask, group, rows, keys, values)


def _attend_rows(call: Call, sequence: _Sequence, mask: BandMask, group: range, rows: range, keys: Array, values: Array) -> None:
    """One block of queries, for every head of ``group``, against all the keys that it sees."""
    problem, round_to = call.problem, sequence.v.dtype if sequence.q.dtype.itemsize == 1 else sequence.q.dtype
    heads, span = slice(group.start, group.stop), slice(rows.start, rows.stop)
    q = sequence.q[span, heads].transpose(1, 0, 2).astype(call.compute, order="C")
    if call.factors[0] is not None:
        q *= call.factors[0].of(sequence.index, group.start // len(group), rows, sequence.q)
    q = q.reshape(len(group) * len(rows), problem.head_dim)

    def visit(tiles: list[range]) -> _OnlineSoftmax:
        state = _OnlineSoftmax(len(group), len(rows), problem.v_head_dim, call.compute)
        for cols in tiles:
            tile = slice(cols.start, cols.stop)
            scores = products(q, keys[tile]).reshape(len(group), len(rows), len(cols))
            cap(call, scores)
            hidden = bias_and_mask(call, sequence.index, mask, group, rows, cols, scores)
            keep = call.pattern.keep(sequence.index, problem.heads, group, rows, cols) if call.pattern else None
            v = values[tile]
            if problem.batch_invariant and hidden is not None:  # there is one row
                v = np.where(hidden.T, 0, v)
            state.update(scores, v, keep, round_to)
        return state

    first, *others = _parts(_key_tiles(problem, mask, rows), problem.num_splits)
    state = visit(first)
    for part in others:
        state.merge(visit(part))
    output, lse = state.finish(None if call.sink is None else call.sink[heads], call.pattern.rescale if call.pattern else 1.0)
    sequence.out[span, heads] = output.transpose(1, 0, 2).astype(sequence.out.dtype)
    if sequence.lse is not None:
        sequence.lse[heads, span] = lse


def _key_tiles(problem: AttentionProblem, mask: BandMask, rows: range) -> list[range]:
    """The tiles of keys that a block of rows visits."""
    seen = mask.key_ranges(rows)
    if not problem.batch_invariant:
        return [cols for keys in seen for cols in blocks(keys, TILE_COLS)]
    numbers = sorted({number for keys in seen for number in range(keys.start // TILE_COLS, (keys.stop - 1) // TILE_COLS + 1)})
    return [range(number * TILE_COLS, (number + 1) * TILE_COLS) for number in numbers]


def _parts(tiles: list[range], splits: int) -> list[list[range]]:
    """The tiles cut into parts of nearly equal size; 0 splits is one part. Some may be empty."""
    count = max(splits, 1)
    ends = [len(tiles) * part // count for part in range(count + 1)]
    return [tiles[start:end] for start, end in pairwise(ends)]


def _write_pattern(call: Call, pattern: Pattern, sequence: _Sequence, keep: NDArray[np.bool_]) -> None:
    """Fill keep (Hq, max Sq, max Sk) inside the sequence's own lengths, a tile at a time."""
    for head in range(call.problem.heads):
        for rows in blocks(range(len(sequence.q)), TILE_ROWS):
            for cols in blocks(range(len(sequence.k)), 16 * TILE_COLS):
                tile = pattern.keep(sequence.index, call.problem.heads, range(head, head + 1), rows, cols)
                keep[head, rows.start : rows.stop, cols.start : cols.stop] = tile[0]
