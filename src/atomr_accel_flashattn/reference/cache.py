"""K and V in a cache, on the CPU: the values of lengths and tables, new tokens, rotary embedding, and pages read as if they were rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.read import as_numpy
from ..errors import BlockTableError, RotaryError, SeqLensError
from ..types import KvLayout
from .fp8 import factors_of, quantise_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ..problem import ArrayInfo, AttentionProblem, KvCache, Rotary

    Array = NDArray[Any]
    Ints = NDArray[np.int64]

__all__ = ["CacheValues", "Slots", "check_lengths", "keys_of", "read_values", "rotate", "write_new_tokens"]


@dataclass(frozen=True, slots=True)
class CacheValues:
    """What lengths and tables say, each (B,): slots before new tokens and after, and slots of left padding."""

    before: Ints
    after: Ints
    left_pad: Ints


def read_values(problem: AttentionProblem, read: Callable[[ArrayInfo], Array] = as_numpy) -> CacheValues:
    """Look at lengths, rows and padding of a call on a KV cache, and check them. Entries of a block table are not looked at.

    Raises:
        SeqLensError: a length that is negative, shorter than its padding, or beyond the slots.
        BlockTableError: a row that the contiguous cache does not have.
        RotaryError: fewer rows of cos and sin than there are positions.
    """
    cache = problem.cache
    assert cache is not None  # noqa: S101 - callers have looked
    if cache.lengths is not None:
        name, before = cache.lengths_name, read(cache.lengths).astype(np.int64)
    else:
        assert problem.cu_seqlens_k is not None  # noqa: S101 - one of them is there
        ends = read(problem.cu_seqlens_k).astype(np.int64)
        name, before = "cu_seqlens_k", ends[1:] - ends[:-1]
    left_pad = np.zeros_like(before) if cache.left_pad is None else read(cache.left_pad).astype(np.int64)
    added = _new_tokens(cache, problem.batch, read)
    after = before + added
    pages = (
        f" ({cache.capacity // cache.block_size} blocks of {cache.block_size}); reserve more" if cache.paged else "; make a longer cache"
    )
    check_lengths(before, added, left_pad, name=name, capacity=cache.capacity, advice=f"{pages}, or shorten it")
    if cache.blocks is not None and not cache.paged:
        rows = read(cache.blocks)
        wrong = np.flatnonzero((rows < 0) | (rows >= cache.num_blocks))
        if wrong.size:
            raise BlockTableError(
                f"cache_batch_idx: got {rows[wrong[0]]} for sequence {wrong[0]}; "
                f"allowed are 0..{cache.num_blocks - 1}, the rows of the cache"
            )
    _check_rotary(problem, before, added)
    return CacheValues(before, after, left_pad)


def check_lengths(before: Ints, added: Ints, left_pad: Ints, *, name: str, capacity: int, advice: str) -> None:
    """Lengths, new tokens and padding, each (B,), within the ``capacity`` slots of a sequence. ``advice`` ends the message on a length.

    Raises:
        SeqLensError: a length that is negative, shorter than its padding, or beyond the slots.
    """
    for index, (used, new, pad) in enumerate(zip(before.tolist(), added.tolist(), left_pad.tolist(), strict=True)):
        if used < 0 or used + new > capacity:
            more = f" and {new} new tokens" if new else ""
            raise SeqLensError(
                f"{name}: got {used} tokens{more} in sequence {index}; allowed are 0..{capacity} tokens, the slots of a sequence{advice}"
            )
        if not 0 <= pad <= used:
            raise SeqLensError(
                f"cache_leftpad: got {pad} slots in sequence {index} with {used} in use; allowed is at most the length, which counts them"
            )


def _new_tokens(cache: KvCache, batch: int, read: Callable[[ArrayInfo], Array]) -> Ints:
    """New tokens of each sequence."""
    if cache.new is None:
        return np.zeros(batch, np.int64)
    if cache.new.cu_seqlens is None:
        return np.full(batch, cache.new.longest, np.int64)
    ends = read(cache.new.cu_seqlens).astype(np.int64)
    lengths: Ints = ends[1:] - ends[:-1]
    if ends[0] != 0 or ends[-1] > cache.new.k.shape[0] or (lengths < 0).any():
        raise SeqLensError(
            f"cu_seqlens of new tokens: got {ends.tolist()}; allowed are values that start at 0, never decrease, and end at or before "
            f"{cache.new.k.shape[0]}, the rows of k"
        )
    return lengths


def _check_rotary(problem: AttentionProblem, before: Ints, added: Ints) -> None:
    new = None if problem.cache is None else problem.cache.new
    if new is None or new.rotary is None or not before.size:
        return
    last_query = problem.seqlen_q if _turns_by_query(problem) else 1
    needed = int((before + np.maximum(added, last_query)).max())
    rows = new.rotary.cos.shape[0]
    if needed > rows:
        raise RotaryError(f"rotary_cos: got {rows} rows; allowed are at least {needed}, a row for every slot up to the last new token")


def _turns_by_query(problem: AttentionProblem) -> bool:
    """Whether each query is turned by its own position: with a mask; otherwise all by that of the first new token, as in flash-attn."""
    return problem.band.left is not None or problem.band.right is not None


@dataclass(frozen=True, slots=True)
class Slots:
    """The keys or the values of one sequence in a cache, which look like an array (Sk, Hkv, D)."""

    blocks: Array  # (blocks, slots, Hkv, D)
    table: Array  # int32, blocks of the sequence
    first: int  # slot of the first key
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.blocks.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: tuple[slice, int]) -> Array:
        """A copy (keys, D) of some keys of one head; 0 where the table names no block."""
        keys, head = where
        block, slot, there = self._places(keys)
        rows: Array = np.zeros((len(slot), self.shape[2]), self.dtype)
        rows[there] = self.blocks[block[there], slot[there], head]
        return rows

    def __setitem__(self, keys: slice, values: Array) -> None:
        """Write (keys, Hkv, D); nothing where the table names no block."""
        block, slot, there = self._places(keys)
        self.blocks[block[there], slot[there]] = values[there]

    def beside(self, values: Array, head: int, keys: slice) -> Array:
        """Elements (keys,) of an array (blocks, slots, Hkv) that lies beside this one; 1 where the table names no block."""
        block, slot, there = self._places(keys)
        found: Array = np.ones(len(slot), values.dtype)
        found[there] = values[block[there], slot[there], head]
        return found

    def put_beside(self, values: Array, rows: Array) -> None:
        """Write (keys, Hkv) to the places of all keys in such an array."""
        block, slot, there = self._places(slice(0, len(self)))
        values[block[there], slot[there]] = rows[there]

    def absent(self, ranges: tuple[range, ...]) -> NDArray[np.bool_] | None:
        """Which of the keys in ``ranges`` have no block, bool (Sk,); None where all have one. Other entries are not read."""
        missing = np.zeros(len(self), np.bool_)
        for seen in ranges:
            missing[seen.start : seen.stop] = ~self._places(slice(seen.start, seen.stop))[2]
        return missing if missing.any() else None

    def _places(self, keys: slice) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Block and slot of each key, and whether the cache has that block."""
        slots = np.arange(self.first + keys.start, self.first + keys.stop)
        block = self.table[slots // self.blocks.shape[1]] if slots.size else slots
        return block, slots % max(self.blocks.shape[1], 1), (block >= 0) & (block < len(self.blocks))


def keys_of(problem: AttentionProblem, values: CacheValues, index: int) -> tuple[Slots, Slots]:
    """K and V of one sequence, new tokens among them."""
    pad = int(values.left_pad[index])
    k, v = _slots(problem, index, pad, int(values.after[index]) - pad)
    return k, v


def _slots(problem: AttentionProblem, index: int, first: int, length: int) -> tuple[Slots, ...]:
    cache = problem.cache
    assert cache is not None  # noqa: S101 - callers have looked
    table = np.array([index]) if cache.blocks is None else np.atleast_1d(as_numpy(cache.blocks)[index])
    arrays = (as_numpy(problem.k), as_numpy(problem.v))
    if cache.layout is KvLayout.HND:
        arrays = (arrays[0].swapaxes(1, 2), arrays[1].swapaxes(1, 2))
    return tuple(Slots(array, table, first, (length, problem.heads_kv, array.shape[-1])) for array in arrays)


def write_new_tokens(problem: AttentionProblem, values: CacheValues) -> Array:
    """Write the new keys and values of all sequences, quantised for a cache of fp8. Returns q, turned where there is a rotary embedding."""
    cache, q = problem.cache, as_numpy(problem.q)
    new = None if cache is None else cache.new
    if new is None:
        return q
    k, v = as_numpy(new.k), as_numpy(new.v)
    _, *factors_of_kv = factors_of(problem)
    turned = None if new.rotary is None else np.array(q)
    rows_q = _rows(problem.cu_seqlens_q, problem.batch)
    rows_k = _rows(new.cu_seqlens, problem.batch)
    for index in range(problem.batch):
        first, last = int(values.before[index]), int(values.after[index])
        own_k, own_v = k[rows_k[index]], v[rows_k[index]]
        if new.rotary is not None and turned is not None:
            own_k = rotate(own_k, new.rotary, np.arange(first, last))
            own_q = turned[rows_q[index]]
            steps = np.arange(len(own_q)) if _turns_by_query(problem) else np.zeros(len(own_q), np.int64)
            own_q[...] = rotate(own_q, new.rotary, first + steps)
        before = first - int(values.left_pad[index])
        for slots, rows, factors in zip(_slots(problem, index, first, last - first), (own_k, own_v), factors_of_kv, strict=True):
            same = rows.dtype == slots.dtype
            slots[0 : last - first] = rows if same else quantise_rows(rows, slots, factors, index, before)
    return q if turned is None else turned


def _rows(offsets: ArrayInfo | None, batch: int) -> list[Any]:
    """Where the rows of each sequence lie: dense or packed."""
    return list(range(batch)) if offsets is None else [slice(start, end) for start, end in pairwise(as_numpy(offsets).tolist())]


def rotate(x: Array, rotary: Rotary, positions: Ints) -> Array:
    """``x`` (n, heads, D) turned by the rows ``positions`` (n,) of cos and sin: in float32, or in x's type if that is wider."""
    compute = np.promote_types(np.float32, x.dtype) if x.dtype == np.float64 else np.dtype(np.float32)
    cos, sin = (as_numpy(table)[positions, None].astype(compute) for table in (rotary.cos, rotary.sin))
    half = cos.shape[-1]
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if rotary.interleaved else (slice(0, half), slice(half, 2 * half))
    first, second = (x[..., part].astype(compute) for part in pairs)
    made = np.array(x)
    made[..., pairs[0]] = (first * cos - second * sin).astype(x.dtype)
    made[..., pairs[1]] = (first * sin + second * cos).astype(x.dtype)
    return made
