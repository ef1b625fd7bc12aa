"""The oracle: attention and its gradients in float64, written straight from docs/semantics.md with whole matrices and no tricks.

It shares no code with the package's CPU backend. float64 inputs are evaluated in the platform's long double, so that the rounding of a
float64 result can be judged too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from atomr_accel_flashattn.types import DType

from .inputs import NUMPY_DTYPE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .inputs import Inputs, Sequence as InputSequence

    Array = NDArray[Any]

__all__ = [
    "LSE_TOLERANCE",
    "Gradients",
    "Precision",
    "Result",
    "Rows",
    "Tolerance",
    "Upstream",
    "cancellation_floor",
    "differentiate",
    "evaluate",
    "keep_pattern",
    "keep_threshold",
    "oracle",
    "oracle_gradients",
    "same_dtype",
    "same_dtype_gradients",
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


class Upstream(NamedTuple):
    """What a backward call is given: the gradients of o (shaped like it) and of the LSE (float32, like it); None is zero."""

    dout: Array | None
    dlse: Array | None = None


class Gradients(NamedTuple):
    """What a backward call gives, shaped like q, k, v and the learned sink; None without one."""

    dq: Array
    dk: Array
    dv: Array
    dsink: Array | None = None


class _Softmax(NamedTuple):
    """A forward evaluation up to the product with v, for some heads and queries of a sequence: matrices are (heads, queries, keys)."""

    q: Array
    k: Array  # (heads, keys, D), 0 where nobody looks; so is v
    v: Array
    visible: NDArray[np.bool_]  # (queries, keys)
    cap_slope: Array  # derivative of the softcap; a scalar 1 without one
    sink: Array  # (heads,), -inf without one
    lse: Array
    probability: Array
    factor: Array  # of dropout: 0 or 256 / T; a scalar 1 without


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of an evaluation: of the arithmetic, and what probabilities and o are rounded to; and where it scales."""

    compute: np.dtype[Any]
    rounded: np.dtype[Any]
    scale_first: bool = False  # scale q instead of the products
    reverse: bool = False  # sum q.k from the last term to the first
    mean_by_output: bool = False  # in a backward: rowsum(dO * O) for rowsum(P * dP), as kernels do, which do not hold a row of P


def oracle(inputs: Inputs, rows: Rows | None = None) -> Result:
    """The right answer, unrounded: float64, or long double for float64 inputs."""
    return evaluate(inputs, _exact(inputs.dtype), rows)


def _exact(dtype: DType) -> Precision:
    wide = np.dtype(np.longdouble if dtype is DType.F64 else np.float64)
    return Precision(wide, wide)


def same_dtype(inputs: Inputs, rows: Rows | None = None) -> tuple[Result, ...]:
    """Plain NumPy evaluations in the input's type: float32 (float64) products and softmax; P and o rounded to the type.

    One for 16-bit types. Four for float32 and float64, scaling the products or scaling q, summing q.k forwards or backwards: there the
    error is only that of one order of operations, and one evaluation can be right by luck.
    """
    return tuple(evaluate(inputs, precision, rows) for precision in _precisions(inputs.dtype))


def _precisions(dtype: DType) -> list[Precision]:
    rounded = NUMPY_DTYPE[dtype]
    compute = np.dtype(np.float64 if dtype is DType.F64 else np.float32)
    choices = (False, True) if rounded == compute else (False,)
    return [Precision(compute, rounded, scale_first, reverse) for scale_first in choices for reverse in choices]


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
    made = _softmax(inputs, sequence, head, query, precision)
    out = (made.probability * made.factor).astype(precision.rounded).astype(precision.compute) @ made.v
    return Result(out.astype(precision.rounded), made.lse)


def _softmax(
    inputs: Inputs,
    sequence: InputSequence,
    head: NDArray[np.int64],
    query: NDArray[np.int64],
    precision: Precision,
    products: Array | None = None,
) -> _Softmax:
    """Scores, LSE and probabilities of some heads and queries of a sequence. ``products``: their q.k, made in another way."""
    seqlen_q, seqlen_k = len(sequence.q), len(sequence.k)
    kv_head = head // (inputs.heads // inputs.heads_kv)
    kind = precision.compute
    q = sequence.q[query][:, head].transpose(1, 0, 2).astype(kind)
    k = sequence.k[:, kv_head].transpose(1, 0, 2).astype(kind)
    v = sequence.v[:, kv_head].transpose(1, 0, 2).astype(kind)
    unseen = ~_seen_by_any(inputs, seqlen_q, seqlen_k)
    k[:, unseen] = 0
    v[:, unseen] = 0

    key = np.arange(seqlen_k)
    p = query[:, None] + seqlen_k - seqlen_q
    scale = kind.type(inputs.softmax_scale)
    left, right = (q[..., ::-1].copy(), k[..., ::-1].copy()) if precision.reverse else (q, k)
    if products is not None:
        score = scale * products.astype(kind)
    else:
        score = (left * scale) @ right.transpose(0, 2, 1) if precision.scale_first else scale * (left @ right.transpose(0, 2, 1))
    cap_slope = np.ones((), kind)
    if inputs.softcap:
        tanh = np.tanh(score / kind.type(inputs.softcap))
        score, cap_slope = kind.type(inputs.softcap) * tanh, 1 - tanh * tanh
    if inputs.alibi_slopes is not None:
        slope = inputs.alibi_slopes if inputs.alibi_slopes.ndim == 1 else inputs.alibi_slopes[sequence.index]
        score = score - slope[head].astype(kind)[:, None, None] * np.abs(p - key).astype(kind)
    visible = _visible(inputs, p, key)
    score = np.where(visible, score, -np.inf)

    sink = np.full(len(head), -np.inf, kind) if inputs.learned_sink is None else inputs.learned_sink[head].astype(kind)
    top = np.maximum(score.max(axis=-1, initial=-np.inf), sink[:, None])
    lse = np.where(np.isneginf(top), top, top + np.log(np.exp(score - top[..., None]).sum(axis=-1) + np.exp(sink[:, None] - top)))
    probability = np.where(np.isneginf(score), 0, np.exp(score - lse[..., None]))
    factor = np.ones((), kind)
    if inputs.dropout_p:
        keep = keep_pattern(inputs, sequence.index, head, query, key)
        factor = keep * kind.type(256 / keep_threshold(inputs.dropout_p))
    return _Softmax(q, k, v, visible, cap_slope, sink, lse, probability, factor)


def oracle_gradients(inputs: Inputs, upstream: Upstream) -> Gradients:
    """The right gradients, unrounded: float64, or long double for float64 inputs."""
    return differentiate(inputs, upstream, _exact(inputs.dtype))


def same_dtype_gradients(inputs: Inputs, upstream: Upstream) -> tuple[Gradients, ...]:
    """Plain NumPy gradients in the input's type: P, dP, dS, o and the results are rounded to it, the gradient of the sink to float32.

    That is what autograd of PyTorch does in this type, except that scores are not rounded. Of two evaluations one takes the mean of dP
    from o. There are four for float32 and float64, as in :func:`same_dtype`.
    """
    plain = _precisions(inputs.dtype)
    plain = (
        [replace(each, mean_by_output=each.reverse) for each in plain]
        if len(plain) > 1
        else [*plain, replace(plain[0], mean_by_output=True)]
    )
    every = [differentiate(inputs, upstream, precision) for precision in plain]
    return tuple(each._replace(dsink=None if each.dsink is None else each.dsink.astype(np.float32)) for each in every)


def differentiate(inputs: Inputs, upstream: Upstream, precision: Precision) -> Gradients:
    """The gradients of sum(o * dout) + sum(lse * dlse), one head after the other, by the Jacobian of the softmax."""
    kind, rounded = precision.compute, precision.rounded
    dq, dk, dv = (np.zeros(array.shape, kind) for array in (inputs.q, inputs.k, inputs.v))
    dsink = np.zeros(inputs.heads, kind)
    with np.errstate(all="ignore"):
        for sequence, head, made, dout, dlse in _heads(inputs, upstream, precision):
            kv_head, keys = head // (inputs.heads // inputs.heads_kv), _key_rows(inputs, sequence)
            dropped = (made.probability * made.factor).astype(rounded).astype(kind)
            probability = made.probability.astype(rounded).astype(kind)
            dprobability = ((dout @ made.v.transpose(0, 2, 1)).astype(rounded).astype(kind) * made.factor).astype(rounded).astype(kind)
            if precision.mean_by_output:
                mean = (dout * (dropped @ made.v).astype(rounded).astype(kind)).sum(axis=-1)
            else:
                mean = np.where(made.visible, probability * dprobability, 0).sum(axis=-1)
            dscore = probability * (dprobability - mean[..., None] + dlse[..., None])
            dscore = np.where(made.visible, dscore, 0).astype(rounded).astype(kind)
            dproduct = kind.type(inputs.softmax_scale) * (dscore * made.cap_slope)
            dq[sequence.out_rows][:, head] = (dproduct @ made.k)[0]
            dk[keys][:, kv_head] += (dproduct.transpose(0, 2, 1) @ made.q)[0]
            dv[keys][:, kv_head] += (dropped.transpose(0, 2, 1) @ dout)[0]
            weight = np.where(np.isneginf(made.sink[:, None]), 0, np.exp(made.sink[:, None] - made.lse))
            dsink[head] += (weight * (dlse - mean)).sum()
    made_sink = None if inputs.learned_sink is None else dsink
    return Gradients(dq.astype(rounded), dk.astype(rounded), dv.astype(rounded), made_sink)


def cancellation_floor(inputs: Inputs, upstream: Upstream) -> tuple[float, float, float, float]:
    """What two roundings of dP and of its mean may do to dq, dk, dv and dsink where the two cancel, as in a row that sees one key.

    There a plain evaluation may be right by luck. Roundings are those of the accumulator: float32, float64 for float64 inputs. A dsink
    is one number, and with few rows it may be right by luck, too: its floor has the rounding of o, with random signs.
    """
    half_unit = float(ml_dtypes.finfo(NUMPY_DTYPE[inputs.dtype]).eps) / 2
    rounding_of_out = np.zeros(inputs.heads)  # variance
    unit = float(np.finfo(np.float64 if inputs.dtype is DType.F64 else np.float32).eps)
    dq, dk, dv = (np.zeros(array.shape) for array in (inputs.q, inputs.k, inputs.v))
    dsink = np.zeros(inputs.heads)
    wide = Precision(np.dtype(np.float64), np.dtype(np.float64))
    with np.errstate(all="ignore"):
        for sequence, head, made, dout, _ in _heads(inputs, upstream, wide):
            kv_head, keys = head // (inputs.heads // inputs.heads_kv), _key_rows(inputs, sequence)
            dprobability = (np.abs(dout) @ np.abs(made.v).transpose(0, 2, 1)) * made.factor
            mean = (made.probability * dprobability).sum(axis=-1)
            dproduct = 2 * unit * abs(inputs.softmax_scale) * made.probability * (dprobability + mean[..., None]) * made.cap_slope
            dq[sequence.out_rows][:, head] = (dproduct @ np.abs(made.k))[0]
            dk[keys][:, kv_head] += (dproduct.transpose(0, 2, 1) @ np.abs(made.q))[0]
            dsink[head] += 2 * unit * mean.sum()
            weight = np.exp(made.sink[:, None] - made.lse)
            moved = dout * ((made.probability * made.factor) @ made.v) * half_unit
            rounding_of_out[head] += ((weight[..., None] * moved) ** 2)[np.isfinite(moved)].sum()
    dsink += np.sqrt(rounding_of_out)
    return _largest_finite(dq), _largest_finite(dk), _largest_finite(dv), _largest_finite(dsink)


def _heads(inputs: Inputs, upstream: Upstream, precision: Precision) -> Iterator[tuple[InputSequence, int, _Softmax, Array, Array]]:
    """Each head of each sequence: forward evaluation, dout (1, Sq, Dv) and dlse (1, Sq). Rows without keys have q and dout 0."""
    kind = precision.compute
    for sequence in inputs.sequences():
        query = np.arange(len(sequence.q))
        for head in range(inputs.heads):
            made = _softmax(inputs, sequence, np.array([head]), query, precision)
            has_keys = made.visible.any(axis=-1)[:, None]
            dout, dlse = np.zeros((1, len(query), inputs.v.shape[-1]), kind), np.zeros((1, len(query)), kind)
            if upstream.dout is not None:
                dout[0] = np.where(has_keys, upstream.dout[sequence.out_rows][:, head], 0)
            if upstream.dlse is not None:
                dlse[0] = upstream.dlse[sequence.lse_rows][head]
            yield sequence, head, made._replace(q=np.where(has_keys, made.q, 0)), dout, dlse


def _key_rows(inputs: Inputs, sequence: InputSequence) -> tuple[int | slice, ...]:
    """Where the rows of a sequence lie in k and v."""
    if inputs.cu_seqlens_k is None:
        return (sequence.index,)
    return (slice(int(inputs.cu_seqlens_k[sequence.index]), int(inputs.cu_seqlens_k[sequence.index + 1])),)


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
