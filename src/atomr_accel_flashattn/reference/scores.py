"""What forward and backward on the CPU share: the numbers of a call, how it is cut into tiles, and the scores of a tile."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.read import as_numpy
from ..errors import CuSeqlensError
from ..types import DType
from .fp8 import factors_of
from .philox import keep_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..problem import ArrayInfo, AttentionProblem
    from .cache import Slots
    from .fp8 import Factors
    from .mask import BandMask

    Array = NDArray[Any]

__all__ = [
    "TILE_COLS",
    "TILE_ROWS",
    "Call",
    "Pattern",
    "bias_and_mask",
    "blocks",
    "cap",
    "products",
    "read_call",
    "read_head",
    "read_offsets",
    "rows_of_a_tile",
]

# Tile sizes: scores of 256 x 256 floats are 256 KiB and stay in a core's L2 through the dozen passes over them.
TILE_ROWS = 256  # rows of the score tile: queries times the query heads that share a KV head
TILE_COLS = 256
_SUM_LENGTH = 32  # terms of q.k that BLAS sums in one go: half the float32 error at head dim 128, for no measurable time
_MIN_QUERIES = 16  # so that a large GQA ratio does not cut the queries into single rows


@dataclass(frozen=True, slots=True)
class Pattern:
    """The dropout of a call, with its generator state read."""

    seed: int
    offset: int
    threshold: int
    rescale: float

    def keep(self, sequence: int, heads: int, group: range, rows: range, cols: range) -> NDArray[np.bool_]:
        """Kept elements, bool (len(group), len(rows), len(cols)), for the query heads of ``group``."""
        streams = [sequence * heads + head for head in group]
        return keep_mask(self.seed, self.offset, streams=streams, rows=rows, cols=cols, threshold=self.threshold)


@dataclass(frozen=True, slots=True)
class Call:
    """What all sequences of a call share, as NumPy values; `compute` is the type of the accumulators."""

    problem: AttentionProblem
    compute: np.dtype[Any]
    slopes: Array | None  # (B, Hq)
    sink: Array | None  # (Hq,)
    pattern: Pattern | None
    factors: tuple[Factors | None, Factors | None, Factors | None]  # of q, k and v


def read_call(problem: AttentionProblem) -> Call:
    """Convert what is not q, k or v."""
    compute = np.dtype(np.float64 if problem.q.dtype is DType.F64 else np.float32)
    slopes = sink = pattern = None
    if problem.alibi_slopes is not None:
        slopes = np.broadcast_to(as_numpy(problem.alibi_slopes).astype(compute), (problem.batch, problem.heads))
    if problem.learned_sink is not None:
        sink = as_numpy(problem.learned_sink).astype(compute)
    if problem.dropout is not None:
        seed, offset = (int(word) for word in as_numpy(problem.dropout.rng))
        pattern = Pattern(seed, offset, problem.dropout.keep_threshold, problem.dropout.rescale)
    return Call(problem, compute, slopes, sink, pattern, factors_of(problem))


def blocks(span: range, size: int) -> Iterator[range]:
    """Cut a range into pieces of at most ``size``."""
    for start in range(span.start, span.stop, size):
        yield range(start, min(start + size, span.stop))


def rows_of_a_tile(ratio: int) -> int:
    """How many queries a tile has when each brings ``ratio`` heads."""
    return max(_MIN_QUERIES, TILE_ROWS // ratio)


def read_head(array: Array | Slots, head: int, ranges: tuple[range, ...], dtype: np.dtype[Any], step: int = 1) -> Array:
    """One KV head (Sk, D) of k or v as floats. Outside of ``ranges`` it stays zero: NaN in a key that nobody sees is never read.

    ``step``: its length is rounded up to a multiple of that.
    """
    rows: Array = np.zeros((-(-len(array) // step) * step, array.shape[-1]), dtype)
    for seen in ranges:
        rows[seen.start : seen.stop] = array[seen.start : seen.stop, head]
    return rows


def read_offsets(array: ArrayInfo, name: str, rows: int, longest: int) -> list[int]:
    """Where sequences begin and end. They were checked when the request was made, and may have been written to since."""
    ends: list[int] = as_numpy(array).tolist()
    if ends[0] != 0 or ends[-1] > rows or not all(0 <= end - start <= longest for start, end in pairwise(ends)):
        raise CuSeqlensError(
            f"{name}: got {ends}, other values than were checked; allowed are values that start at 0, never decrease, end at {rows} or "
            f"before, and make no sequence longer than {longest}"
        )
    return ends


def products(q: Array, k: Array) -> Array:
    """``q @ k.T``, summed in pieces: BLAS adds term after term, so its error grows with the number of terms it is given."""
    result: Array = q[:, :_SUM_LENGTH] @ k[:, :_SUM_LENGTH].T
    for start in range(_SUM_LENGTH, q.shape[1], _SUM_LENGTH):
        result += q[:, start : start + _SUM_LENGTH] @ k[:, start : start + _SUM_LENGTH].T
    return result


def cap(call: Call, scores: Array) -> None:
    """From products to scaled scores with softcap, in place."""
    problem = call.problem
    scores *= call.compute.type(problem.softmax_scale / (problem.softcap or 1))
    if problem.softcap:
        np.tanh(scores, out=scores)
        scores *= call.compute.type(problem.softcap)


def bias_and_mask(
    call: Call, index: int, mask: BandMask, group: range, rows: range, cols: range, scores: Array
) -> NDArray[np.bool_] | None:
    """From capped scores (heads, queries, keys) to those of the softmax, in place: ALiBi, and -inf where hidden. Returns what is hidden."""
    if call.slopes is not None:
        p = mask.positions(rows)
        distance = np.abs(np.arange(p.start, p.stop)[:, None] - np.arange(cols.start, cols.stop)).astype(call.compute)
        scores -= call.slopes[index, group.start : group.stop, None, None] * distance
    hidden = mask.hidden(rows, cols)
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    return hidden
