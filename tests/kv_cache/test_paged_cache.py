"""PagedKvCache: pages against a model, copy-on-write, and errors that change nothing."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.types import DType

COUNT = 10_000  # of random operations; a run of 1,000,000 with each size passed, too (30 November 2026)


class Model:
    """What every sequence should hold: a list of numbers, one for each token."""

    def __init__(self, blocks: int, size: int, layout: fa.KvLayout = fa.KvLayout.NHD) -> None:
        self.cache = fa.PagedKvCache(blocks, size, 1, 1, v_head_dim=2, dtype=DType.F32, layout=layout)
        self.cache.k[...] = self.cache.v[...] = np.nan
        self.tokens: dict[int, list[float]] = {}
        self.reserved: dict[int, int] = {}
        self.written = 0.0

    def state(self) -> tuple[Any, ...]:
        cache = self.cache
        tables = tuple(cache.block_table(each).tobytes() for each in cache.sequences)
        return cache.k.tobytes(), cache.v.tobytes(), cache.free_blocks, cache.sequences, tables, cache.seq_lens(cache.sequences).tobytes()

    def append(self, sequences: list[int], counts: list[int]) -> None:
        numbers = self.written + np.arange(1, sum(counts) + 1, dtype=np.float32)
        k = numbers.reshape(-1, 1, 1)
        self.cache.append(sequences, k, np.concatenate([k, -k], -1), counts)
        self.written = float(numbers[-1]) if len(numbers) else self.written
        ends = np.cumsum([0, *counts])
        for sequence, (start, end) in zip(sequences, pairwise(ends), strict=True):
            self.tokens[sequence] += numbers[start:end].tolist()

    def check(self, sequences: list[int]) -> None:
        """Every token is where the table says; nobody's page beyond the shared ones is somebody else's."""
        cache, nhd = self.cache, self.cache.layout is fa.KvLayout.NHD
        for sequence in sequences:
            expected, table = np.array(self.tokens[sequence], np.float32), cache.block_table(sequence)[0]
            assert cache.length(sequence) == len(expected)
            k, v = (x[table] if nhd else x[table].swapaxes(1, 2) for x in (cache.k, cache.v))
            np.testing.assert_array_equal(k.reshape(-1)[: len(expected)], expected)
            np.testing.assert_array_equal(v.reshape(-1, 2)[: len(expected), 1], -expected)

    def check_pages(self) -> None:
        """Nothing is lost: pages are free or held, and only full prefixes or equal tokens are shared."""
        cache = self.cache
        tables = {each: cache.block_table(each)[0].tolist() for each in cache.sequences}
        held = {page for table in tables.values() for page in table}
        assert len(held) + cache.free_blocks == cache.num_blocks
        assert all(len(set(table)) == len(table) for table in tables.values())
        owners: dict[int, list[int]] = {}
        for each, table in tables.items():
            for page in table:
                owners.setdefault(page, []).append(each)
        for page, sharing in owners.items():
            if len(sharing) > 1:
                at = {each: tables[each].index(page) * cache.block_size for each in sharing}
                seen = {tuple(self.tokens[each][start : start + cache.block_size]) for each, start in at.items()}
                shortest = min(seen, key=len)
                assert shortest, "a page without tokens is shared"
                assert all(each[: len(shortest)] == shortest for each in seen)

    def allocate(self, _chosen: list[int], rng: np.random.Generator) -> None:
        self.tokens[self.cache.allocate(int(rng.integers(0, 3 * self.cache.block_size)))] = []

    def fork(self, chosen: list[int], _rng: np.random.Generator) -> None:
        self.tokens[self.cache.fork(chosen[0])] = list(self.tokens[chosen[0]])

    def free(self, chosen: list[int], _rng: np.random.Generator) -> None:
        self.cache.free(chosen)
        for each in chosen:
            del self.tokens[each]

    def append_some(self, chosen: list[int], rng: np.random.Generator) -> None:
        self.append(chosen, rng.integers(0, 2 * self.cache.block_size + 1, len(chosen)).tolist())

    def reserve(self, chosen: list[int], rng: np.random.Generator) -> None:
        self.cache.reserve(chosen, rng.integers(0, 2 * self.cache.block_size, len(chosen)).tolist())

    def truncate(self, chosen: list[int], rng: np.random.Generator) -> None:
        length = int(rng.integers(0, self.cache.length(chosen[0]) + 1))
        self.cache.truncate(chosen[0], length)
        del self.tokens[chosen[0]][length:]

    def write_as_a_kernel(self, chosen: list[int], _rng: np.random.Generator) -> None:
        cache = self.cache
        cache.reserve(chosen, 1)
        for row, each in zip(cache.block_table(chosen), chosen, strict=True):
            page, slot = row[cache.length(each) // cache.block_size], cache.length(each) % cache.block_size
            at = (page, slot, 0) if cache.layout is fa.KvLayout.NHD else (page, 0, slot)
            self.written += 1
            cache.k[at], cache.v[at] = self.written, (self.written, -self.written)
            self.tokens[each].append(self.written)
        cache.advance(chosen, 1)


OPERATIONS = (Model.allocate, Model.fork, Model.free, Model.append_some, Model.reserve, Model.truncate, Model.write_as_a_kernel)
OFTEN = (0.15, 0.15, 0.15, 0.3, 0.1, 0.1, 0.05)


@pytest.mark.parametrize(("size", "layout"), [(1, fa.KvLayout.NHD), (4, fa.KvLayout.HND), (16, fa.KvLayout.NHD)])
def test_random_operations_against_a_model(size: int, layout: fa.KvLayout):
    rng = np.random.default_rng(size)
    model = Model(40, size, layout)
    refused = 0
    for number in range(COUNT):
        alive = list(model.cache.sequences)
        operation = OPERATIONS[rng.choice(len(OPERATIONS), p=OFTEN)] if alive else Model.allocate
        chosen = rng.permutation(alive)[: rng.integers(1, 4)].tolist() if alive else []
        before = model.state() if number % 10 == 0 else None
        try:
            operation(model, chosen, rng)
        except fa.OutOfBlocksError:
            refused += 1
            assert before is None or model.state() == before
        model.check([each for each in chosen if each in model.tokens])
        if number % 50 == 0:
            model.check(list(model.tokens))
            model.check_pages()
    assert refused > COUNT // 100, "the cache was never full"
    model.cache.free(model.cache.sequences)
    assert model.cache.free_blocks == 40


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 12), st.integers(2, 4), st.integers(1, 6))
def test_all_forks_append_in_one_call(size: int, prefix: int, forks: int, new: int):
    """The last of those that share a page keeps it, and no page more is taken than is needed."""
    model = Model(100, size)
    parent = model.cache.allocate()
    model.tokens[parent] = []
    model.append([parent], [prefix])
    family = [parent, *(model.cache.fork(parent) for _ in range(forks))]
    model.tokens |= {each: list(model.tokens[parent]) for each in family}
    model.append(family, [new] * len(family))
    model.check(family)
    shared = prefix // size
    each = -(-(prefix + new) // size) - shared
    assert model.cache.free_blocks == 100 - shared - len(family) * each


def test_a_fork_shares_pages_and_copies_only_the_partial_one():
    model = Model(10, 4)
    parent = model.cache.allocate(16)
    model.tokens[parent] = []
    model.append([parent], [10])
    child = model.cache.fork(parent)
    model.tokens[child] = list(model.tokens[parent])
    assert model.cache.free_blocks == 6, "room that was reserved is not shared, and nothing has been copied"
    model.append([child], [1])
    assert model.cache.free_blocks == 5
    tables = [model.cache.block_table(each)[0, :3].tolist() for each in (parent, child)]
    assert tables[0][:2] == tables[1][:2]
    assert tables[0][2] != tables[1][2]
    model.append([parent], [1])  # alone by now
    assert model.cache.free_blocks == 5
    model.check([parent, child])


def test_out_of_blocks_is_an_error_before_anything_is_written():
    model = Model(4, 2)
    first, second = model.cache.allocate(), model.cache.allocate()
    model.tokens = {first: [], second: []}
    model.append([first, second], [3, 2])
    before = model.state()
    for call in (
        lambda: model.append([first, second], [2, 4]),
        lambda: model.cache.reserve([first, second], 3),
        lambda: model.cache.allocate(3),
    ):
        with pytest.raises(fa.OutOfBlocksError, match=r"blocks: got 1 free of 4 and a need for \d; .*nothing has been written"):
            call()
        assert model.state() == before
    model.append([first, second], [1, 2])


def test_a_copy_of_a_shared_page_needs_a_block_too():
    model = Model(2, 4)
    parent = model.cache.allocate()
    model.tokens[parent] = []
    model.append([parent], [3])
    child = model.cache.fork(parent)
    other = model.cache.allocate(1)
    with pytest.raises(fa.OutOfBlocksError):
        model.cache.reserve(child, 1)
    model.cache.free(other)
    model.cache.reserve(child, 1)


class TestSequencesThatAreNone:
    CALLS: ClassVar[dict[str, Any]] = {
        "free": lambda cache, s: cache.free(s),
        "fork": lambda cache, s: cache.fork(s),
        "append": lambda cache, s: cache.append(s, np.zeros((1, 1, 2, 8), np.float16), np.zeros((1, 1, 2, 8), np.float16)),
        "reserve": lambda cache, s: cache.reserve(s, 1),
        "advance": lambda cache, s: cache.advance(s, 0),
        "truncate": lambda cache, s: cache.truncate(s, 0),
        "length": lambda cache, s: cache.length(s),
        "block_table": lambda cache, s: cache.block_table(s),
        "seq_lens": lambda cache, s: cache.seq_lens(s),
        "request": lambda cache, s: cache.request(np.zeros((1, 1, 2, 8), np.float16), s),
    }

    @pytest.mark.parametrize("name", CALLS)
    def test_freed_ones_and_strangers(self, name: str):
        cache = fa.PagedKvCache(4, 4, 2, 8, dtype=DType.F16)
        sequence = cache.allocate()
        cache.free(sequence)
        again = cache.allocate()
        assert again != sequence
        for wrong, what in (
            (sequence, "which was freed; allowed are the sequences of this cache"),
            (7, "which was never allocated; allowed are the sequences of this cache"),
            (-1, "never allocated; allowed are the sequences of this cache"),
            ("0", "; allowed is an integer, or a list or an array of NumPy of some"),
            (None, "; allowed is an integer"),
            ({again}, "; allowed is an integer"),
            ([[again]], "; allowed is an integer"),
        ):
            with pytest.raises(fa.SequenceError, match=rf"sequence: got .*{what}"):
                self.CALLS[name](cache, wrong)
        assert cache.free_blocks == 4

    @pytest.mark.parametrize("name", ["free", "reserve", "advance", "block_table", "seq_lens"])
    def test_one_that_is_named_twice(self, name: str):
        cache = fa.PagedKvCache(4, 4, 2, 8, dtype=DType.F16)
        sequence = cache.allocate(1)
        with pytest.raises(fa.SequenceError, match="in which one stands twice; allowed is each once"):
            self.CALLS[name](cache, [sequence, sequence])
        assert cache.sequences == (sequence,)


def test_numbers_in_arrays_are_read_once():
    size, length = np.array(4), np.array(6)
    cache = fa.PagedKvCache(4, size, 2, 8, dtype=DType.F16)  # type: ignore[arg-type]
    tokens = np.zeros((1, 8, 2, 8), np.float16)
    parent = cache.allocate()
    cache.append(parent, tokens, tokens)
    cache.truncate(parent, length)  # type: ignore[arg-type]
    size[...], length[...] = 2, 3
    child = cache.fork(parent)
    cache.append(child, tokens[:, :3], tokens[:, :3])
    assert (cache.block_size, cache.length(parent), cache.length(child), int(length)) == (4, 6, 9, 3)


def test_a_request_has_a_table():
    pages, lengths = np.zeros((4, 4, 2, 8), np.float16), np.array([3], np.int32)
    with pytest.raises(fa.BlockTableError, match="block_table: got None; allowed is int32"):
        fa.PagedAttentionRequest(np.zeros((1, 1, 2, 8), np.float16), pages, pages, None, lengths)


REFUSED: dict[str, tuple[type[Exception], str, Any]] = {
    "blocks": (fa.ShapeError, "num_blocks: got -1; allowed is an integer in 0", lambda: fa.PagedKvCache(-1, 4, 2, 8, dtype=DType.F16)),
    "block size": (fa.ShapeError, "block_size: got 0; allowed", lambda: fa.PagedKvCache(4, 0, 2, 8, dtype=DType.F16)),
    "heads": (fa.ShapeError, "heads_kv: got 1.5; allowed", lambda: fa.PagedKvCache(4, 4, 1.5, 8, dtype=DType.F16)),
    "head dim": (fa.HeadDimError, "head_dim: got 264; allowed are 1..256", lambda: fa.PagedKvCache(4, 4, 2, 264, dtype=DType.F16)),
    "v head dim": (fa.ShapeError, "v_head_dim: got 0", lambda: fa.PagedKvCache(4, 4, 2, 8, v_head_dim=0, dtype=DType.F16)),
    "too many blocks": (fa.ShapeError, "num_blocks: got 1099511627776", lambda: fa.PagedKvCache(1 << 40, 4, 2, 8, dtype=DType.F16)),
    "no type": (fa.DTypeError, "dtype: got None with no like; allowed are DType.F16", lambda: fa.PagedKvCache(4, 4, 2, 8)),
    "type of like": (fa.DTypeError, "got None with a like of type int64", lambda: fa.PagedKvCache(4, 4, 2, 8, like=np.zeros(1, np.int64))),
    "fp8": (fa.HeadDimError, "head_dim: got 8 with fp8", lambda: fa.PagedKvCache(4, 4, 2, 8, dtype=DType.F8E4M3)),
    "layout": (
        fa.ShapeError,
        "layout: got 'HND'; allowed are KvLayout.NHD",
        lambda: fa.PagedKvCache(4, 4, 2, 8, dtype=DType.F16, layout="HND"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_cache_can_be(name: str):
    error, message, make = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def zeros(*shape: int, kind: Any = np.float16) -> np.ndarray:
    return np.zeros(shape, kind)


APPENDS: dict[str, tuple[type[Exception], str, tuple[Any, ...]]] = {
    "heads": (fa.ShapeError, r"k: got shape \(1, 2, 3, 8\); allowed is \(1, tokens, 2, 8\)", (zeros(1, 2, 3, 8), zeros(1, 2, 2, 8))),
    "tokens of v": (fa.ShapeError, r"v: got shape \(1, 3, 2, 8\)", (zeros(1, 2, 2, 8), zeros(1, 3, 2, 8))),
    "packed without tokens": (fa.ShapeError, r"k: got shape \(2, 2, 8\).*; give tokens=", (zeros(2, 2, 8), zeros(2, 2, 8))),
    "dense with tokens": (
        fa.ShapeError,
        r"k: got shape \(1, 2, 2, 8\); allowed is \(total, 2, 8\)",
        (zeros(1, 2, 2, 8), zeros(1, 2, 2, 8), [2]),
    ),
    "sum": (fa.ShapeError, "tokens: got 3 of them for 2 rows of k", (zeros(2, 2, 8), zeros(2, 2, 8), [3])),
    "number of tokens": (fa.ShapeError, "tokens: got 2 numbers for 1 sequences", (zeros(2, 2, 8), zeros(2, 2, 8), [1, 1])),
    "type": (fa.DTypeError, "v: got float32 on cpu; allowed is float16 on cpu", (zeros(1, 1, 2, 8), zeros(1, 1, 2, 8, kind=np.float32))),
}


@pytest.mark.parametrize("name", APPENDS)
def test_what_cannot_be_appended(name: str):
    error, message, given = APPENDS[name]
    cache = fa.PagedKvCache(4, 4, 2, 8, dtype=DType.F16)
    sequence = cache.allocate()
    with pytest.raises(error, match=message):
        cache.append(sequence, *given)
    assert (cache.length(sequence), cache.free_blocks) == (0, 4)


@pytest.mark.torch
def test_gradients_of_what_is_appended_are_refused():
    torch = pytest.importorskip("torch")
    cache = fa.PagedKvCache(4, 4, 2, 8, like=torch.empty(0))
    sequence = cache.allocate()
    wanting, plain = torch.zeros(1, 1, 2, 8, requires_grad=True), torch.zeros(1, 1, 2, 8)
    for k, v in ((wanting, plain), (plain, wanting)):
        with pytest.raises(fa.FeatureNotBuiltError, match="requires grad, and calls on a KV cache have no gradients; use torch"):
            cache.append(sequence, k, v)
        with torch.no_grad():
            cache.append(sequence, k, v)
    assert cache.length(sequence) == 2


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_cache_is_refused(take: Any):
    """Two caches would give the same number to two sequences, and the same page."""
    with pytest.raises(fa.ArrayTypeError, match="PagedKvCache: got a request to copy or pickle it"):
        take(fa.PagedKvCache(4, 4, 2, 8, dtype=DType.F16))


def test_counts_that_are_none():
    cache = fa.PagedKvCache(4, 4, 2, 8, dtype=DType.F16)
    sequence = cache.allocate(4)
    for call, message in (
        (lambda: cache.allocate(-1), "tokens: got -1; allowed is an integer in 0"),
        (lambda: cache.reserve(sequence, True), "tokens: got True; .*, or a list of one for each sequence"),
        (lambda: cache.advance(sequence, 5), "tokens: got 5 for sequence 0, which has room of its own for 4; reserve it first"),
        (lambda: cache.truncate(sequence, 1), "length: got 1 for a sequence of 0 tokens; allowed is at most that"),
        (lambda: cache.block_table(sequence, 0), "entries: got 0, and a sequence has 1 pages; allowed is at least that"),
    ):
        with pytest.raises(fa.ShapeError, match=message):
            call()


def test_tables_are_padded_with_what_is_no_page():
    cache = fa.PagedKvCache(8, 4, 2, 8, dtype=DType.F16)
    both = [cache.allocate(9), cache.allocate(1)]
    table = cache.block_table(both, 5)
    assert table.dtype == np.int32
    assert (table[0, 3:] == -1).all()
    assert (table[1, 1:] == -1).all()
    assert cache.seq_lens(both).dtype == np.int32
    assert "8 blocks of 4, 4 free, 2 sequences, NHD, float16 on cpu" in repr(cache)


@pytest.mark.torch
def test_a_cache_of_torch():
    torch = pytest.importorskip("torch")
    cache = fa.PagedKvCache(8, 4, 2, 16, layout=fa.KvLayout.HND, like=torch.empty(0, dtype=torch.bfloat16))
    assert cache.k.shape == (8, 2, 4, 16)
    assert cache.k.dtype is torch.bfloat16
    sequence = cache.allocate()
    k, v = torch.randn(2, 1, 7, 2, 16, dtype=torch.bfloat16)
    cache.append(sequence, k, v)
    child = cache.fork(sequence)
    cache.append(child, k[:, :2], v[:, :2])
    q = torch.randn(2, 1, 4, 16, dtype=torch.bfloat16)
    request = cache.request(q, [sequence, child], mask=fa.MaskKind.causal())
    assert isinstance(request, fa.PagedAttentionRequest)
    assert isinstance(request.block_table, torch.Tensor)
    out = fa.run(request).out
    for index, rows in enumerate((k, torch.cat([k, k[:, :2]], 1))):
        values = v if index == 0 else torch.cat([v, v[:, :2]], 1)
        assert torch.equal(out[index], fa.flash_attn_func(q[index : index + 1], rows, values, causal=True)[0])
