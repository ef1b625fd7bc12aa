"""Chunked prefill: any chunks give what one call gives, contiguous and paged, beside decodes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.types import DType
from tests.kv_cache.cases import download, upload

LENGTHS, HEADS, KV, D = (100, 37, 64), 4, 2, 32
RNG = np.random.default_rng(3)
PROMPTS = [tuple(RNG.standard_normal((length, heads, D)).astype(np.float32) for heads in (HEADS, KV, KV)) for length in LENGTHS]
MASKS = {"causal": fa.MaskKind.causal(), "window": fa.MaskKind.sliding_causal(20)}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def at_once(index: int, mask: fa.MaskKind, **asked: Any) -> np.ndarray:
    q, k, v = (x[None] for x in PROMPTS[index])
    return download(fa.run(fa.DenseFwdRequest(q, k, v, mask=mask, **asked)).out)[0]


@pytest.mark.parametrize("chunk", [1, 7, 64, 2048])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_chunks_equal_one_call(chunk: int, mask: str, kind: str):
    """Prompts of unequal length, whose chunks are sent together until each is at its end."""
    made: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    plans = [fa.ChunkLayout.cut(length, chunk) for length in LENGTHS]
    k_cache, v_cache = (upload(np.full((5, 128, KV, D), np.nan, np.float32)) for _ in range(2))
    pages = fa.PagedKvCache(32, 16, KV, D, dtype=DType.F32)
    ids = [pages.allocate() for _ in LENGTHS]
    for step in range(max(map(len, plans))):
        chosen = [index for index, plan in enumerate(plans) if step < len(plan)]
        chunks = [plans[index][step] for index in chosen]
        parts = [slice(each.prefix_kv_tokens, each.prefix_kv_tokens + each.chunk_q_tokens) for each in chunks]
        q, k, v = (np.concatenate([PROMPTS[index][n][part] for index, part in zip(chosen, parts, strict=True)]) for n in range(3))
        counts = [each.chunk_q_tokens for each in chunks]
        if kind == "contiguous":
            rows = upload(np.array([4 - index for index in chosen], np.int32))
            request = fa.ChunkedPrefillRequest(
                *map(upload, (q, k, v)), k_cache, v_cache, chunks=chunks, cache_batch_idx=rows, mask=MASKS[mask]
            )  # fmt: skip
        else:
            used = [ids[index] for index in chosen]
            pages.append(used, k, v, counts)
            request = pages.request(q, used, cu_seqlens_q=fa.CumulativeSeqlens.from_lengths(counts), mask=MASKS[mask])
        out = download(fa.run(request).out)
        for index, part in zip(chosen, np.split(out, np.cumsum(counts)[:-1]), strict=True):
            made[index].append(part)
    for index, parts in enumerate(made):
        np.testing.assert_allclose(np.concatenate(parts), at_once(index, MASKS[mask]), **TOLERANCE)


def test_a_batch_invariant_prompt_in_chunks_has_the_bits_of_one_call():
    options = fa.AttentionOptions(batch_invariant=True)
    expected = at_once(0, MASKS["causal"], options=options)
    k_cache, v_cache = (np.full((1, 100, KV, D), np.nan, np.float32) for _ in range(2))
    q, k, v = PROMPTS[0]
    for each in fa.ChunkLayout.cut(100, 33):
        part = slice(each.prefix_kv_tokens, each.prefix_kv_tokens + each.chunk_q_tokens)
        made = fa.run(fa.ChunkedPrefillRequest(q[part], k[part], v[part], k_cache, v_cache, chunks=[each], options=options)).out
        np.testing.assert_array_equal(made, expected[part])


def test_rotary_goes_by_the_slot_of_the_cache():
    table = RNG.uniform(-3, 3, (100, D // 2))
    cos, sin = np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
    q, k, v = PROMPTS[0]
    outs = []
    for chunk in (100, 9):
        caches = [np.full((1, 100, KV, D), np.nan, np.float32) for _ in range(2)]
        made = [
            fa.run(
                fa.ChunkedPrefillRequest(
                    *(x[each.prefix_kv_tokens :][: each.chunk_q_tokens] for x in (q, k, v)), *caches, chunks=[each], rotary_cos=cos,
                    rotary_sin=sin, rotary_interleaved=False,
                )
            ).out
            for each in fa.ChunkLayout.cut(100, chunk)
        ]  # fmt: skip
        outs.append(np.concatenate(made))
    np.testing.assert_allclose(*outs, **TOLERANCE)
    assert abs(outs[0] - at_once(0, MASKS["causal"])).max() > 0.1


def test_a_prompt_beside_decodes():
    """One sequence decodes behind 36 tokens, the other two are prompts."""
    caches = [np.full((3, 128, KV, D), np.nan, np.float32) for _ in range(2)]
    for cache, tokens in zip(caches, PROMPTS[1][1:], strict=True):
        cache[1, :36] = tokens[:36]
    parts = [PROMPTS[0], tuple(x[36:] for x in PROMPTS[1]), PROMPTS[2]]
    q, k, v = (np.concatenate([part[n] for part in parts]) for n in range(3))
    chunks = [fa.ChunkLayout(100), fa.ChunkLayout(1, 36), fa.ChunkLayout(64)]
    out = fa.run(fa.ChunkedPrefillRequest(q, k, v, *caches, chunks=chunks)).out
    np.testing.assert_allclose(out[:100], at_once(0, MASKS["causal"]), **TOLERANCE)
    np.testing.assert_allclose(out[100], at_once(1, MASKS["causal"])[36], **TOLERANCE)
    np.testing.assert_allclose(out[101:], at_once(2, MASKS["causal"]), **TOLERANCE)


def test_the_chunks_of_a_prompt():
    assert fa.ChunkLayout.cut(10, 4, 3) == (fa.ChunkLayout(4, 3, 3, 0), fa.ChunkLayout(4, 7, 3, 1), fa.ChunkLayout(2, 11, 3, 2))
    assert [each.is_last for each in fa.ChunkLayout.cut(10, 4)] == [False, False, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0,), "chunk_q_tokens: got 0; allowed is an integer in 1"),
        ((1, -1), "prefix_kv_tokens: got -1"),
        ((1, 0, 0), "total_chunks: got 0"),
        ((1, 5, 2, 2), r"chunk_index: got 2 of 2 chunks; allowed are 0..1"),
        ((1, 1, 3, 2), "prefix_kv_tokens: got 1 before chunk 2"),
        ((1.0,), "chunk_q_tokens: got 1.0"),
    ],
    ids=str,
)
def test_layouts_that_make_no_sense(given: Any, message: str):
    with pytest.raises(fa.ChunkLayoutError, match=message):
        fa.ChunkLayout(*given)


@pytest.mark.parametrize("given", [(0, 4), (4, 0), (4, 1.5), (4, 4, -1), (4, 4, "1"), (4, 4, True)], ids=str)
def test_prompts_that_cannot_be_cut(given: Any):
    with pytest.raises(fa.ChunkLayoutError, match=r"allowed is an integer >= [01]"):
        fa.ChunkLayout.cut(*given)


def test_requests_that_do_not_fit():
    q, k, v = PROMPTS[1]
    caches = [np.zeros((1, 40, KV, D), np.float32) for _ in range(2)]
    for asked, error, message in (
        ({"chunks": [fa.ChunkLayout(36)]}, fa.ChunkLayoutError, "chunks: got 36 tokens in 1 chunks for 37 rows of q"),
        ({"chunks": fa.ChunkLayout(37)}, fa.ChunkLayoutError, "allowed is a ChunkLayout for each sequence, in a list"),
        ({"chunks": None}, fa.ChunkLayoutError, "got None; allowed is a ChunkLayout for each sequence, in a list"),
        ({"chunks": {fa.ChunkLayout(37)}}, fa.ChunkLayoutError, "allowed is a ChunkLayout for each sequence, in a list"),
        ({"chunks": [fa.ChunkLayout(37, 4)]}, fa.SeqLensError, "got 4 tokens and 37 new tokens in sequence 0"),
        ({"chunks": [fa.ChunkLayout(30, 10), fa.ChunkLayout(7)]}, fa.ShapeError, "k_cache: got 1 rows for 2 sequences"),
        ({"chunks": [fa.ChunkLayout(37)], "mask": fa.MaskKind.full()}, fa.WindowError, "which shows tokens of later chunks"),
        ({"chunks": [fa.ChunkLayout(37)], "options": fa.AttentionOptions(dropout_p=0.5)}, fa.DropoutError, "got 0.5 with a KV cache"),
    ):
        with pytest.raises(error, match=message):
            fa.ChunkedPrefillRequest(q, k, v, *caches, **asked)
        assert not caches[0].any()
    with pytest.raises(fa.ShapeError, match=r"q: got shape \(\) of rank 0; allowed is rank 3"):
        fa.ChunkedPrefillRequest(np.array(1.0), k, v, *caches, chunks=[fa.ChunkLayout(37)])


def test_a_list_of_chunks_that_changes_does_not_change_the_request():
    q, k, v = PROMPTS[1]
    chunks = [fa.ChunkLayout(37)]
    request = fa.ChunkedPrefillRequest(q, k, v, *(np.zeros((1, 40, KV, D), np.float32) for _ in range(2)), chunks=chunks)
    chunks.clear()
    np.testing.assert_array_equal(fa.run(copy.copy(request)).out, fa.run(request).out)
