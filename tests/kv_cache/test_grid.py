"""Every feature on contiguous and paged caches against the oracle, and what usually goes wrong, each under its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.types import DType
from tests.case_lists import MASKS
from tests.cases import Alibi, Case, build
from tests.inputs import Inputs
from tests.kv_cache.cases import DEVICE, CacheCase, check_cached, download, fill, request_of
from tests.pairwise import covering_rows

NAN, INF = float("nan"), float("inf")
DTYPES = (DType.F16, DType.BF16) if DEVICE.startswith("cuda") else (DType.F16, DType.BF16, DType.F32, DType.F64)
CAUSAL: dict[str, Any] = {"right": 0}
AXES: dict[str, tuple[dict[str, Any], ...]] = {
    "dtype": tuple({"dtype": dtype} for dtype in DTYPES),
    "lengths": (
        {"lengths_q": (1, 1, 1), "lengths_k": (65, 1, 300)},
        {"lengths_q": (3, 3), "lengths_k": (130, 47)},
        {"lengths_q": (65, 0, 1, 9), "lengths_k": (65, 40, 200, 0)},
        {"lengths_q": (1, 31, 8), "lengths_k": (310, 31, 108)},
    ),
    "heads": tuple({"heads": q, "heads_kv": kv} for q, kv in ((2, 2), (4, 1), (10, 2), (6, 1), (7, 1), (8, 1))),
    "mask": MASKS,
    "width": tuple({"head_dim": d, "v_head_dim": dv} for d, dv in ((64, 64), (128, 128), (192, 128), (40, 24), (64, 136))),
    "sink": ({}, {"learned_sink": True}),
    "alibi": tuple({"alibi": alibi} for alibi in Alibi),
    "softcap": ({}, {"softcap": 5.0}),
    "scale": ({}, {"softmax_scale": 0.3}, {"softmax_scale": -0.2}),
    "cache": (
        *({"block_size": size} for size in (1, 3, 16, 64, 256)),
        {"block_size": 16, "layout": fa.KvLayout.HND},
        {"block_size": 7, "layout": fa.KvLayout.HND},
        {"block_size": 0},
        {"block_size": 0, "left_pad": True},
        {"block_size": 0, "batch_idx": True},
        {"block_size": 0, "left_pad": True, "batch_idx": True},
    ),
    "poison": ({"poison": NAN}, {"poison": INF}),
    "order": (
        {},
        {"num_splits": 1},
        {"num_splits": 2},
        {"num_splits": 7},
        {"num_splits": 128},
        {"batch_invariant": True},
        {"planned": True},
    ),
}
OF_CACHE = ("cache", "poison", "order")


def case_of(row: dict[str, dict[str, Any]]) -> CacheCase:
    call = Case(**{key: value for axis, options in row.items() if axis not in OF_CACHE for key, value in options.items()})
    return CacheCase(call=call, **{key: value for axis in OF_CACHE for key, value in row[axis].items()})


@pytest.mark.parametrize("case", [case_of(row) for row in covering_rows(AXES)], ids=str)
def test_every_pair_of_features(case: CacheCase):
    check_cached(case)


PAIR = Case(lengths_q=(1, 1), lengths_k=(1, 3))
HAZARDS = {
    "length_of_a_page_and_its_neighbours": [
        CacheCase(call=Case(lengths_q=(1,) * 5, lengths_k=(15, 16, 17, 32, 33), **mask), poison=poison)
        for mask in ({}, CAUSAL)
        for poison in (NAN, INF)
    ],
    "past_the_length": [CacheCase(call=PAIR, block_size=3, poison=poison) for poison in (NAN, INF)],
    "empty_sequences_among_full_ones": [
        CacheCase(call=Case(lengths_q=(1, 1, 1, 1), lengths_k=(0, 200, 0, 5), learned_sink=sink), num_splits=splits)
        for sink in (False, True)
        for splits in (0, 3)
    ],
    "all_sequences_empty": [CacheCase(call=Case(lengths_q=(1, 1), lengths_k=(0, 0)), block_size=size) for size in (0, 16)],
    "no_sequences": [CacheCase(call=Case(lengths_q=(), lengths_k=()), block_size=16)],
    "more_queries_than_keys": [CacheCase(call=Case(lengths_q=(9, 9), lengths_k=(3, 0), **CAUSAL), block_size=size) for size in (0, 2)],
    "a_window_that_empties_a_split": [
        CacheCase(call=Case(lengths_q=(1, 2), lengths_k=(2000, 700), left=50, right=0, sink_tokens=sinks), num_splits=5) for sinks in (0, 4)
    ],
    "sinks_of_a_streaming_cache": [
        CacheCase(call=Case(lengths_q=(1, 4), lengths_k=(900, 300), left=20, right=0, sink_tokens=4, learned_sink=True), block_size=size)
        for size in (1, 16, 64)
    ],
    "one_to_nine_queries": [
        CacheCase(call=Case(lengths_q=(n,) * batch, lengths_k=tuple(range(120, 120 + batch)), heads=8, heads_kv=2, **CAUSAL))
        for n in range(1, 10)
        for batch in (1, 5)
    ],
}


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=f"{name}-{case}") for name, each in HAZARDS.items() for case in each]
)
def test_hazard(name: str, case: CacheCase):
    check_cached(case)


@pytest.mark.parametrize("splits", [1, 2, 3, 16, 128])
def test_lengths_and_splits(splits: int):
    lengths = tuple(range(1 + splits, 5000, 701))
    call = Case(lengths_q=(1,) * len(lengths), lengths_k=lengths, heads=2, heads_kv=1, learned_sink=True)
    check_cached(CacheCase(call=call, num_splits=splits))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random(data: st.DataObject):
    check_cached(case_of({axis: data.draw(st.sampled_from(options)) for axis, options in AXES.items()}))


def run_of(case: CacheCase, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    output = fa.run(request_of(case, inputs, fill(case, inputs))[0])
    return download(output.out), download(output.lse)


def test_entries_past_the_length_and_left_of_the_window_are_not_followed():
    case = CacheCase(call=Case(lengths_q=(2,), lengths_k=(300,), left=40, right=0, sink_tokens=3))
    inputs = build(case.call)
    cache = fill(case, inputs)
    expected = fa.run(request_of(case, inputs, cache)[0])
    table = cache.table.copy()
    table[0, 1 : (300 - 42) // 16] = 2**31 - 1  # between the sinks and the window
    made = fa.run(request_of(case, inputs, replace(cache, table=table))[0])
    np.testing.assert_array_equal(download(made.out), download(expected.out))
    np.testing.assert_array_equal(download(made.lse), download(expected.lse))


@pytest.mark.parametrize("entry", [-1, 2**31 - 1, -(2**31), 1000])
@pytest.mark.parametrize("splits", [0, 3])
def test_an_entry_that_is_no_page_is_no_keys(entry: int, splits: int):
    """Its keys are nowhere, and those behind them keep their places."""
    case = CacheCase(call=Case(dtype=DTYPES[0], lengths_q=(4,), lengths_k=(100,), alibi=Alibi.HEADS, right=0), num_splits=splits)
    inputs = build(case.call)
    cache = fill(case, inputs)
    k, v, table = cache.k.copy(), cache.v.copy(), cache.table.copy()
    k[table[0, 2]] = -INF  # the same by another way: a score of -inf with a value of 0
    hidden = np.full(100, 0.0)
    hidden[32:48] = -INF
    table[0, 2] = entry
    made = fa.run(request_of(case, inputs, replace(cache, k=k, v=v, table=table))[0])
    q, keys, values = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v))
    p = np.arange(96, 100)
    distance = np.abs(p[:, None] - np.arange(100))
    scores = np.einsum("qhd,khd->hqk", q, keys) * inputs.softmax_scale - inputs.alibi_slopes[:, None, None] * distance
    scores = np.where(np.arange(100) <= p[:, None], scores + hidden, -INF)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(download(made.out)[0].astype(np.float64), expected, atol=4e-3)


def test_a_cache_without_pages_has_no_keys():
    q = np.ones((2, 1, 2, 8), np.float16)
    empty = np.empty((0, 4, 2, 8), np.float16)
    output = fa.run(fa.PagedAttentionRequest(q, empty, empty, np.zeros((2, 3), np.int32), np.array([12, 1], np.int32)))
    assert (output.out == 0).all()
    assert np.isneginf(output.lse).all()


class TestBatchInvariance:
    """A row's bits depend on its q, its position and what it sees."""

    CALL = Case(lengths_q=(5, 1, 40), lengths_k=(300, 77, 540), heads=6, heads_kv=2, left=200, right=0, sink_tokens=3, learned_sink=True)

    def row(self, case: CacheCase, inputs: Inputs, sequence: int, row: int) -> tuple[bytes, bytes]:
        out, lse = run_of(case, inputs)
        at = int(inputs.cu_seqlens_q[sequence]) + row
        out, lse = out.reshape(-1, *out.shape[-2:]), lse.transpose(1, 0, 2).reshape(lse.shape[1], -1) if lse.ndim == 3 else lse
        return out[at].tobytes(), lse[:, at].tobytes()

    def test_batch_pages_length_of_q_and_chunks(self):
        inputs = build(self.CALL)
        plain = CacheCase(call=self.CALL, batch_invariant=True)
        expected = self.row(plain, inputs, 2, 39)
        for change in ({"block_size": 1}, {"block_size": 64, "layout": fa.KvLayout.HND}, {"block_size": 0, "left_pad": True}):
            assert self.row(replace(plain, **change), inputs, 2, 39) == expected
        last = inputs.sequence(2)
        for queries in (1, 3, 40):
            offsets = [np.array([0, n], np.int32) for n in (queries, 540)]
            alone = replace(inputs, q=last.q[-queries:], k=last.k, v=last.v, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])
            case = CacheCase(call=replace(self.CALL, lengths_q=(queries,), lengths_k=(540,)), batch_invariant=True)
            assert self.row(case, alone, 0, queries - 1) == expected

    def test_later_keys_and_neighbours_change_nothing(self):
        """Of query 10 of 40 in one call, and as the last query of a shorter sequence."""
        inputs = build(self.CALL)
        expected = self.row(CacheCase(call=self.CALL, batch_invariant=True), inputs, 2, 10)
        last, end = inputs.sequence(2), 540 - 29
        offsets = [np.array([0, n], np.int32) for n in (1, end)]
        alone = replace(inputs, q=last.q[10:11], k=last.k[:end], v=last.v[:end], cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])
        case = CacheCase(call=replace(self.CALL, lengths_q=(1,), lengths_k=(end,)), batch_invariant=True)
        assert self.row(case, alone, 0, 0) == expected

    def test_identical_requests_give_identical_rows(self):
        """In any mode: the same pages, named five times."""
        case = CacheCase(call=Case(lengths_q=(3,), lengths_k=(333,), heads=4, heads_kv=2, right=0))
        inputs = build(case.call)
        cache = fill(case, inputs)
        q = np.repeat(inputs.q[None], 5, 0)
        table, lengths = np.repeat(cache.table, 5, 0), np.repeat(cache.lengths, 5)
        out = fa.run(fa.PagedAttentionRequest(q, cache.k, cache.v, table, lengths, mask=fa.MaskKind.causal())).out
        assert len({each.tobytes() for each in out}) == 1

    def test_dense_and_packed_requests_too(self):
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((3, n, 4, 32)).astype(np.float32) for n in (70, 300, 300))
        options = fa.AttentionOptions(batch_invariant=True)
        whole = fa.run(fa.DenseFwdRequest(q, k, v, mask=fa.MaskKind.causal(), options=options)).out
        one = fa.run(fa.DenseFwdRequest(q[1:2, -1:], k[1:2], v[1:2], mask=fa.MaskKind.causal(), options=options)).out
        np.testing.assert_array_equal(whole[1, -1], one[0, 0])
        plain = fa.run(fa.DenseFwdRequest(q, k, v, mask=fa.MaskKind.causal())).out
        np.testing.assert_allclose(whole, plain, atol=1e-5)

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_splits_are_refused(self, count: int):
        case = CacheCase(call=PAIR, num_splits=count, batch_invariant=True)
        if count < 2:
            check_cached(case)
            return
        with pytest.raises(fa.SplitError, match=r"num_splits: got 2 with batch_invariant=True; allowed are 0 and 1"):
            check_cached(case)
