"""The oracle: attention in float64, written straight from docs/semantics.md with whole matrices and no tricks.

It shares no code with the package's CPU backend. float64 inputs are evaluated in the platform's long double, so that the rounding of a
float64 result can be judged too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from atomr_accel_flashattn.types import DType

from .inputs import NUMPY_DTYPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .inputs import Inputs, Sequence as InputSequence

    Array = NDArray[Any]

__all__ = [
    "LSE_TOLERANCE",
    "Precision",
    "Result",
    "Rows",
    "Tolerance",
    "evaluate",
    "keep_pattern",
    "keep_threshold",
    "oracle",
    "same_dtype",
    "sample_rows",
]

LSE_TOLERANCE = 1e-3  # absolute
SAMPLED_ROWS = 64


class Rows(NamedTuple):
    """Sampled rows: for each, the sequence, the query head and the query inside the sequence; int arrays of one length."""

    sequence: NDArray[np.int64]
    head: NDArray[np.int64]
    query: NDArray[np.int64]


class Result(NamedTuple):
    """o and LSE: of the whole call in its own shapes, or (n, Dv) and (n,) for n sampled rows."""

    out: Array
    lse: Array


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of an evaluation: of the arithmetic, and what probabilities and o are rounded to; and where it scales."""

    compute: np.dtype[Any]
    rounded: np.dtype[Any]
    scale_first: bool = False  # scale q instead of the products
    reverse: bool = False  # sum q.k from the last term to the first


def oracle(inputs: Inputs, rows: Rows | None = None) -> Result:
    """The right answer, unrounded: float64, or long double for float64 inputs."""
    exact = np.dtype(np.longdouble if inputs.dtype is DType.F64 else np.float64)
    return evaluate(inputs, Precision(exact, exact), rows)


def same_dtype(inputs: Inputs, rows: Rows | None = None) -> tuple[Result, ...]:
    """Plain NumPy evaluations in the input's type: float32 (float64) products and softmax; P and o rounded to the type.

    One for 16-bit types. Four for float32 and float64, scaling the products or scaling q, summing q.k forwards or backwards: there the
    error is only that of one order of operations, and one evaluation can be right by luck.
    """
    rounded = NUMPY_DTYPE[inputs.dtype]
    compute = np.dtype(np.float64 if inputs.dtype is DType.F64 else np.float32)
    choices = (False, True) if rounded == compute else (False,)
    precisions = [Precision(compute, rounded, scale_first, reverse) for scale_first in choices for reverse in choices]
    return tuple(evaluate(inputs, precision, rows) for precision in precisions)


def evaluate(inputs: Inputs, precision: Precision, rows: Rows | None = None) -> Result:
    """Evaluate the whole call, or some rows of it."""
    with np.errstate(all="ignore"):
        if rows is None:
            out = np.full(inputs.out_shape, np.nan, precision.rounded)
            lse = np.full(inputs.lse_shape, np.nan, precision.compute)
            for sequence in inputs.sequences():
                head, query = np.arange(inputs.heads), np.arange(len(sequence.q))
                o, row_lse = _attend(inputs, sequence, head, query, precision)
                out[sequence.out_rows], lse[sequence.lse_rows] = o.transpose(1, 0, 2), row_lse
            return Result(out, lse)
        out = np.full((len(rows.query), inputs.v.shape[-1]), np.nan, precision.rounded)
        lse = np.full(len(rows.query), np.nan, precision.compute)
        for index, head in sorted(set(zip(rows.sequence.tolist(), rows.head.tolist(), strict=True))):
            chosen = (rows.sequence == index) & (rows.head == head)
            o, row_lse = _attend(inputs, inputs.sequence(index), np.array([head]), rows.query[chosen], precision)
            out[chosen], lse[chosen] = o[0], row_lse[0]
        return Result(out, lse)


def _attend(inputs: Inputs, sequence: InputSequence, head: NDArray[np.int64], query: NDArray[np.int64], precision: Precision) -> Result:
    """o (len(head), len(query), Dv) and LSE (len(head), len(query)) of some heads and queries of a sequence."""
    seqlen_q, seqlen_k = len(sequence.q), len(sequence.k)
    kv_head = head // (inputs.heads // inputs.heads_kv)
    kind = precision.compute
    q = sequence.q[query][:, head].transpose(1, 0, 2).astype(kind)
    k = sequence.k[:, kv_head].transpose(1, 0, 2).astype(kind)
    v = sequence.v[:, kv_head].transpose(1, 0, 2).astype(kind)
    if precision.reverse:
        q, k = q[..., ::-1].copy(), k[..., ::-1].copy()
    unseen = ~_seen_by_any(inputs, seqlen_q, seqlen_k)
    k[:, unseen] = 0
    v[:, unseen] = 0

    key = np.arange(seqlen_k)
    p = query[:, None] + seqlen_k - seqlen_q
    scale = kind.type(inputs.softmax_scale)
    score = (q * scale) @ k.transpose(0, 2, 1) if precision.scale_first else scale * (q @ k.transpose(0, 2, 1))
    if inputs.softcap:
        score = kind.type(inputs.softcap) * np.tanh(score / kind.type(inputs.softcap))
    if inputs.alibi_slopes is not None:
        slope = inputs.alibi_slopes if inputs.alibi_slopes.ndim == 1 else inputs.alibi_slopes[sequence.index]
        score = score - slope[head].astype(kind)[:, None, None] * np.abs(p - key).astype(kind)
    score = np.where(_visible(inputs, p, key), score, -np.inf)

    sink = np.full(len(head), -np.inf, kind) if inputs.learned_sink is None else inputs.learned_sink[head].astype(kind)
    top = np.maximum(score.max(axis=-1, initial=-np.inf), sink[:, None])
    lse = np.where(np.isneginf(top), top, top + np.log(np.exp(score - top[..., None]).sum(axis=-1) + np.exp(sink[:, None] - top)))
    probability = np.where(np.isneginf(score), 0, np.exp(score - lse[..., None]))
    if inputs.dropout_p:
        keep = keep_pattern(inputs, sequence.index, head, query, key)
        probability = probability * keep * kind.type(256 / keep_threshold(inputs.dropout_p))
    out = probability.astype(precision.rounded).astype(kind) @ v
    return Result(out.astype(precision.rounded), lse)


def _visible(inputs: Inputs, p: NDArray[np.int64], key: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each key is visible to a query aligned to key position p."""
    below = np.True_ if inputs.right is None else key <= p + inputs.right
    above = np.True_ if inputs.left is None else (key >= p - inputs.left) | (key < inputs.sink_tokens)
    return np.broadcast_to(below & above, np.broadcast_shapes(p.shape, key.shape))


def _seen_by_any(inputs: Inputs, seqlen_q: int, seqlen_k: int) -> NDArray[np.bool_]:
    """Whether some query of the sequence sees each key: p runs over an interval and so do the p that see the key; do they meet?"""
    key = np.arange(seqlen_k)
    first, last = np.full(seqlen_k, seqlen_k - seqlen_q), np.full(seqlen_k, seqlen_k - 1)
    if inputs.right is not None:
        first = np.maximum(first, key - inputs.right)
    if inputs.left is not None:
        last = np.where(key < inputs.sink_tokens, last, np.minimum(last, key + inputs.left))
    return (first <= last) & (seqlen_q > 0)


def keep_threshold(p: float) -> int:
    """T of docs/semantics.md; Python rounds halves to even."""
    return max(1, min(255, round(256 * (1 - p))))


def keep_pattern(
    inputs: Inputs, sequence: int, head: NDArray[np.int64], query: NDArray[np.int64], key: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Kept elements (len(head), len(query), len(key)) of a sequence, one generator call for each of them."""
    assert inputs.rng is not None
    seed, offset = (int(word) for word in inputs.rng)
    i, j = query.astype(np.uint64)[:, None], key.astype(np.uint64)
    stream = (sequence * inputs.heads + head).astype(np.uint64).reshape(-1, 1, 1)
    counter = [(i >> 4) * 8 + (i & 7), (j >> 5) * 4 + ((j & 7) >> 1), stream, np.full((1, 1, 1), offset % 2**32, np.uint64)]
    words = _philox(counter, (seed % 2**32, ((seed >> 32) ^ (offset >> 32)) % 2**32))
    byte = ((i >> 3) & 1) * 8 + ((j >> 3) & 3) * 2 + (j & 1)
    word = np.select([byte >> 2 == index for index in range(4)], words)
    return np.asarray((word >> (8 * (byte & 3))) & 255 < keep_threshold(inputs.dropout_p))


def _philox(counter: list[Any], key: tuple[int, int]) -> list[Any]:
    """Philox4x32-10 as its paper writes it, on uint64 arrays that hold 32-bit words."""
    left, right = counter[:2], counter[2:]
    for step in range(10):
        k0, k1 = (key[0] + step * 0x9E3779B9) % 2**32, (key[1] + step * 0xBB67AE85) % 2**32
        first, second = left[0] * 0xD2511F53, right[0] * 0xCD9E8D57
        left, right = [(second >> 32) ^ left[1] ^ k0, second % 2**32], [(first >> 32) ^ right[1] ^ k1, first % 2**32]
    return [*left, *right]


def sample_rows(inputs: Inputs, seed: int = 0, count: int = SAMPLED_ROWS) -> Rows:
    """Rows to judge a large call by: the first and last query of sequences at both ends, the rest at random over the whole call."""
    lengths = np.array([len(sequence.q) for sequence in inputs.sequences()])
    sequences = np.flatnonzero(lengths)
    if sequences.size == 0:
        return Rows(*(np.zeros(0, np.int64) for _ in range(3)))
    random = np.random.default_rng(seed)
    sequence, head = random.choice(sequences, count), random.integers(inputs.heads, size=count)
    query = (random.random(count) * lengths[sequence]).astype(np.int64)
    sequence[:2], sequence[2:4] = sequences[0], sequences[-1]
    head[0], head[3] = 0, inputs.heads - 1
    query[[0, 2]], query[[1, 3]] = 0, lengths[sequence[[1, 3]]] - 1
    return Rows(sequence, head, query)


class Tolerance(NamedTuple):
    """The bound on |ours - oracle| and where it comes from (docs/semantics.md, Tolerance)."""

    bound: float
    plain_error: float
    floor: float

    @classmethod
    def of_output(cls, dtype: DType, exact: Array, plain: Sequence[Array], factor: float = 2.0) -> Tolerance:
        """``factor`` times the largest error of the same-type evaluations plus the rounding floor; 2 for o, 3 for gradients."""
        kind = NUMPY_DTYPE[dtype]
        wide = np.dtype(np.float64) if dtype is DType.F64 else np.dtype(np.float32)
        with np.errstate(all="ignore"):
            rounded: Array = exact.astype(kind)
            moved: Array = (rounded.astype(wide) + np.array(0.3, wide)).astype(kind)
            back: Array = (moved.astype(wide) - np.array(0.3, wide)).astype(kind)
            floor = 2 * _largest_finite(back.astype(exact.dtype) - rounded.astype(exact.dtype))
            error = max(_largest_finite(each.astype(exact.dtype) - exact) for each in plain)
        return cls(factor * error + floor, error, floor)


def _largest_finite(difference: Array) -> float:
    """Largest magnitude among the finite elements; 0 when there are none."""
    finite = np.abs(difference[np.isfinite(difference)])
    return float(finite.max(initial=0))
