"""What the kernels over a KV cache are asked, by the tests on a card and by those in the emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.types import DType
from tests.kv_cache import cases
from tests.kv_cache.test_grid import AXES, case_of
from tests.pairwise import covering_rows

__all__ = [
    "APPENDS",
    "FP8_APPENDS",
    "GRID",
    "HALF",
    "PLANNED",
    "PREFILL",
    "UNFIT",
    "check_append",
    "check_entries_outside",
    "check_fp8_append",
    "check_length",
    "check_new_tokens_without_room",
    "check_pages",
    "check_unfit",
    "close",
    "pages_of",
    "with_entries_outside",
    "with_new_tokens",
]

HALF: dict[str, float] = {"rtol": 4e-3, "atol": 4e-3}

# Of the wgmma family: rows of q that fill a warpgroup, and pages of whole boxes of TMA.
_PREFILL_AXES = AXES | {
    "dtype": ({"dtype": DType.F16}, {"dtype": DType.BF16}),
    "lengths": (
        {"lengths_q": (100, 1, 65), "lengths_k": (701, 77, 65)},
        {"lengths_q": (130, 130), "lengths_k": (1003, 131)},
        {"lengths_q": (257,), "lengths_k": (2099,)},
        {"lengths_q": (65, 0, 300), "lengths_k": (70, 33, 1299)},
        {"lengths_q": (90, 70), "lengths_k": (20, 0)},
    ),
    "heads": tuple({"heads": q, "heads_kv": kv} for q, kv in ((2, 2), (4, 1), (6, 2), (8, 1), (7, 1))),
    "cache": (
        *({"block_size": size} for size in (8, 16, 24, 64, 128, 256)),
        *({"block_size": size, "layout": fa.KvLayout.HND} for size in (16, 64)),
        {"block_size": 0},
        {"block_size": 0, "left_pad": True, "batch_idx": True},
    ),
    "order": tuple({"num_splits": splits} for splits in range(9)),
}
PREFILL = [case_of(row) for row in covering_rows(_PREFILL_AXES)]

_GPU_AXES = AXES | {
    "dtype": ({"dtype": DType.F16}, {"dtype": DType.BF16}),
    "order": ({}, {"num_splits": 1}, {"num_splits": 2}, {"num_splits": 7}, {"batch_invariant": True}),
}
GRID = [case_of(row) for row in covering_rows(_GPU_AXES)]
PLANNED = [replace(case, num_splits=0, planned=True) for case in GRID if not case.batch_invariant]  # in the blocks of a StepPlan


def with_new_tokens(
    *, paged: bool, new: int, rotary_dim: int = 0, interleaved: bool = True, wide: bool = False, q_len: int = 0, seed: int = 0
) -> Any:
    """Arguments of ``flash_attn_with_kvcache``, NumPy: 3 sequences of unequal length, 4 / 2 heads, head dim 32."""
    random = np.random.default_rng((seed, new, rotary_dim))
    normal = lambda *shape: random.standard_normal(shape).astype(np.float16)  # noqa: E731
    lengths = np.array([0, 15, 40], np.int32)
    asked: dict[str, Any] = {
        "q": normal(3, q_len or new, 4, 32),
        "k": normal(3, new, 2, 32),
        "v": normal(3, new, 2, 32),
        "cache_seqlens": lengths,
    }
    if paged:
        table = random.permutation(16).astype(np.int32)[:15].reshape(3, 5)
        asked |= {"k_cache": normal(16, 16, 2, 32), "v_cache": normal(16, 16, 2, 32), "block_table": table}
    else:
        asked |= {"k_cache": normal(5, 64, 2, 32), "v_cache": normal(5, 64, 2, 32), "cache_batch_idx": np.array([4, 0, 2], np.int32)}
        asked["cache_leftpad"] = np.array([0, 3, 1], np.int32)
    if rotary_dim:
        angle = random.uniform(0, 6, (48 + max(new, q_len), rotary_dim // 2))
        kind = np.float32 if wide else np.float16
        asked |= {"rotary_cos": np.cos(angle).astype(kind), "rotary_sin": np.sin(angle).astype(kind), "rotary_interleaved": interleaved}
    return asked


APPENDS: dict[str, dict[str, Any]] = {
    "one token, paged": {"paged": True, "new": 1},
    "one token": {"paged": False, "new": 1},
    "across pages": {"paged": True, "new": 20},
    "rotary": {"paged": True, "new": 5, "rotary_dim": 32},
    "rotary of a part, halves": {"paged": False, "new": 5, "rotary_dim": 12, "interleaved": False},
    "rotary in float32": {"paged": True, "new": 2, "rotary_dim": 6, "interleaved": False, "wide": True},
    "more queries than new tokens": {"paged": True, "new": 2, "rotary_dim": 8, "q_len": 7},
}


def check_append(asked: dict[str, Any], *, causal: bool) -> None:
    """A call of ``flash_attn_with_kvcache`` on the device of the tests gives what the CPU backend gives, and the cache has equal bits."""
    host, device = ({key: place(x) if isinstance(x, np.ndarray) else x for key, x in asked.items()} for place in (np.copy, cases.upload))
    expected, lse = fa.flash_attn_with_kvcache(**host, causal=causal, return_softmax_lse=True)
    made, made_lse = fa.flash_attn_with_kvcache(**device, causal=causal, return_softmax_lse=True)
    for cache in ("k_cache", "v_cache"):
        np.testing.assert_array_equal(cases.download(device[cache]), host[cache], err_msg="bits of the cache")
    close(made, expected, **HALF)
    close(made_lse, lse, rtol=1e-3, atol=1e-3)


FP8_APPENDS: dict[str, dict[str, Any]] = {
    "of heads": {"unit": fa.ScaleUnit.HEAD, "paged": True, "new": 3},
    "of blocks, contiguous": {"unit": fa.ScaleUnit.BLOCK, "paged": False, "new": 3, "kind": ml_dtypes.float8_e5m2},
    "of several blocks, left padding": {"unit": fa.ScaleUnit.BLOCK, "paged": False, "new": 3, "longer": True},
    "of tokens": {"unit": fa.ScaleUnit.TOKEN, "paged": True, "new": 5},
    "of tokens with NaN, and of the smallest numbers": {"unit": fa.ScaleUnit.TOKEN, "paged": True, "new": 5, "odd": True},
    "of tokens, rotary": {"unit": fa.ScaleUnit.TOKEN, "paged": True, "new": 5, "rotary_dim": 12, "q_len": 7},
    "of one number, rotary of halves": {"unit": fa.ScaleUnit.TENSOR, "paged": False, "new": 2, "rotary_dim": 32, "interleaved": False},
    "without one": {"unit": None, "paged": True, "new": 1, "rotary_dim": 6, "wide": True},
    "copied": {"unit": fa.ScaleUnit.HEAD, "paged": True, "new": 20, "copied": True},
    "copied, contiguous": {"unit": None, "paged": False, "new": 2, "copied": True},
}


def check_fp8_append(
    *,
    unit: fa.ScaleUnit | None,
    kind: Any = ml_dtypes.float8_e4m3fn,
    copied: bool = False,
    longer: bool = False,
    odd: bool = False,
    **kind_of_call: Any,
) -> None:
    """As :func:`check_append` with a cache of fp8; descales of tokens have equal bits, too.

    Args:
        unit: of descales.
        kind: of the cache.
        copied: whether new tokens are fp8, too.
        longer: 320 slots; those of new tokens of one sequence lie in another block of 128 than with its padding.
        odd: bf16, with an element of NaN and a token of the smallest numbers.
        kind_of_call: for :func:`with_new_tokens`.
    """
    asked, random = with_new_tokens(**kind_of_call), np.random.default_rng(7)
    asked["k"][..., 20], asked["v"][..., 3] = 0, -0.0
    if longer:
        asked |= {name: np.tile(asked[name], (1, 5, 1, 1)) for name in ("k_cache", "v_cache")}
        asked["cache_seqlens"] += 241
    if odd:
        asked |= {name: asked[name].astype(ml_dtypes.bfloat16) for name in "qkv"}
        asked["k"][0, -1, 0, 3] = np.nan
        asked["v"][1, 0] = ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_subnormal
    for name in ("k_cache", "v_cache", *(("k", "v") if copied else ())):
        asked[name] = asked[name].astype(kind)
    pages = asked["k_cache"].shape[:2]
    slots = asked["block_table"].shape[1] * pages[1] if "block_table" in asked else pages[1]
    shapes = {
        fa.ScaleUnit.TENSOR: (),
        fa.ScaleUnit.HEAD: (3, 2),
        fa.ScaleUnit.BLOCK: (3, 2, -(-slots // 128)),
        fa.ScaleUnit.TOKEN: (*pages, 2),
    }
    if unit is not None:
        asked |= {f"{name}_descale": np.asarray(random.uniform(0.3, 2, shapes[unit]), np.float32) for name in "kv"}
    host, device = ({key: place(x) if isinstance(x, np.ndarray) else x for key, x in asked.items()} for place in (np.copy, cases.upload))
    expected = fa.flash_attn_with_kvcache(**host, causal=True)
    made = fa.flash_attn_with_kvcache(**device, causal=True)
    for name in ("k_cache", "v_cache", *(("k_descale", "v_descale") if unit is not None else ())):
        bits = np.float32 if name.endswith("descale") else np.uint8
        np.testing.assert_array_equal(cases.download(device[name]).view(bits), host[name].view(bits), err_msg=name)
    close(made, expected, **(HALF if not odd else {"rtol": 1.6e-2, "atol": 1.6e-2}))


def with_entries_outside(queries: int, page: int) -> tuple[Any, ...]:
    """q, K, V, table and lengths, NumPy, of 2 sequences; two of the entries that are read name no page."""
    random = np.random.default_rng(0)
    slots = (6, page, 2, 32)
    q, k, v = (random.standard_normal(shape).astype(np.float16) for shape in ((2, queries, 4, 32), slots, slots))
    table, lengths = np.array([[0, -5, 2], [1 << 20, 4, 5]], np.int32), np.array([3 * page - page // 2, 3 * page], np.int32)
    k[[1, 3]], v[[1, 3]] = np.nan, np.nan  # pages that no entry names
    return q, k, v, table, lengths


def check_entries_outside(*, queries: int = 1, page: int = 16, softcap: float = 0.0, num_splits: int = 0) -> None:
    """Entries of a table that name no page count as no keys, as on the CPU backend."""
    arrays = with_entries_outside(queries, page)
    asked: dict[str, Any] = {"options": fa.AttentionOptions(softcap=softcap), "num_splits": num_splits}
    expected = fa.run(fa.PagedAttentionRequest(*arrays, **asked))
    made = fa.run(fa.PagedAttentionRequest(*map(cases.upload, arrays), **asked))
    close(made.out, expected.out, **HALF)
    close(made.lse, expected.lse, atol=1e-3)


def check_pages(layout: fa.KvLayout) -> None:
    """A fork of a partial page, and what both append to it: the answers are those of a cache in host memory."""
    random = np.random.default_rng(3)
    tokens = [random.standard_normal((2, 2, 3, 2, 32)).astype(np.float16) for _ in range(3)]
    q = random.standard_normal((2, 1, 4, 32)).astype(np.float16)
    answers = []
    for place in (np.copy, cases.upload):
        cache = fa.PagedKvCache(8, 4, 2, 32, layout=layout, like=place(q))
        first = cache.allocate()
        cache.append(first, *(place(x[:1]) for x in tokens[0]))
        sequences = [first, cache.fork(first)]
        for k, v in tokens[1:]:
            cache.append(sequences, place(k), place(v))
        answers.append(fa.run(cache.request(place(q), sequences)).out)
    close(answers[1], answers[0], **HALF)


def close(made: Any, expected: Any, **allowed: float) -> None:
    """An array of the device against one in host memory."""
    np.testing.assert_allclose(cases.download(made).astype(np.float32), np.asarray(expected, np.float32), **allowed)


def pages_of(random: np.random.Generator) -> tuple[Any, ...]:
    """K and V in 10 pages of 16, and a table of 4 pages for each of 2 sequences; 2 KV heads, head dim 32."""
    k, v = (random.standard_normal((10, 16, 2, 32)).astype(np.float16) for _ in "kv")
    return k, v, random.permutation(10).astype(np.int32)[:8].reshape(2, 4)


def check_length(length: int) -> None:
    """A sequence of ``length`` tokens in 4 pages of 16: up to 64 pass, 65 count as 64, and ``check`` names the sequence once."""
    random = np.random.default_rng(0)
    k, v, table = pages_of(random)
    q = random.standard_normal((2, 3, 4, 32)).astype(np.float16)
    causal = fa.MaskKind.causal()
    expected = fa.run(fa.PagedAttentionRequest(q, k, v, table, np.array([9, min(length, 64)], np.int32), mask=causal))
    arrays = map(cases.upload, (q, k, v, table, np.array([9, length], np.int32)))
    made = fa.run(fa.PagedAttentionRequest(*arrays, mask=causal))
    _check_error(1 if length > 64 else None)
    close(made.out, expected.out, **HALF)
    close(made.lse, expected.lse, atol=1e-3)
    with pytest.raises(fa.SeqLensError, match=r"seq_lens: got 65 tokens in sequence 1; allowed are 0..64 tokens"):
        fa.run(fa.PagedAttentionRequest(q, k, v, table, np.array([9, 65], np.int32)))
    fa.check()


def check_new_tokens_without_room(*, interleaved: bool) -> None:
    """62 + 3 tokens in 64 slots: two are written, the others' page is as it was, and attention covers 64."""
    random = np.random.default_rng(1)
    k, v, table = pages_of(random)
    q, new_k, new_v = (random.standard_normal((2, 3, heads, 32)).astype(np.float16) for heads in (4, 2, 2))
    angle = random.uniform(0, 6, (70, 8))
    rotary = {"rotary_cos": np.cos(angle).astype(np.float16), "rotary_sin": np.sin(angle).astype(np.float16)}
    asked: dict[str, Any] = {"causal": True, "return_softmax_lse": True, "rotary_interleaved": interleaved}
    on_host = [k.copy(), v.copy()]
    expected = []
    for b, (length, fits) in enumerate(((62, 2), (5, 3))):
        row = slice(b, b + 1)
        lengths = {"cache_seqlens": np.array([length], np.int32), "block_table": table[row]}
        expected.append(fa.flash_attn_with_kvcache(q[row], *on_host, new_k[row, :fits], new_v[row, :fits], **lengths, **rotary, **asked))
    lengths = np.array([62, 5], np.int32)
    with pytest.raises(fa.SeqLensError, match="cache_seqlens: got 62 tokens and 3 new tokens in sequence 0"):
        fa.flash_attn_with_kvcache(q, k, v, new_k, new_v, cache_seqlens=lengths, block_table=table, **rotary, **asked)
    device = [cases.upload(x) for x in (q, k, v, new_k, new_v)]
    more = {name: cases.upload(x) for name, x in rotary.items()}
    more |= {"cache_seqlens": cases.upload(lengths), "block_table": cases.upload(table)}
    out, lse = fa.flash_attn_with_kvcache(*device, **more, **asked)
    _check_error(0)
    for cache, host in zip(device[1:3], on_host, strict=True):
        np.testing.assert_array_equal(cases.download(cache), host, err_msg="bits of the cache")
    close(out, np.concatenate([each[0] for each in expected]), **HALF)
    close(lse, np.concatenate([each[1] for each in expected]), atol=1e-3, rtol=1e-3)


UNFIT: dict[str, dict[str, list[int]]] = {
    "more tokens than slots": {"cache_seqlens": [5, 64, 3]},
    "a negative length": {"cache_seqlens": [5, -1, 3]},
    "more padding than tokens": {"cache_leftpad": [0, 41, 0]},
    "negative padding": {"cache_leftpad": [0, -1, 0]},
    "a row beyond the cache": {"cache_batch_idx": [1, 5, 2]},
    "a negative row": {"cache_batch_idx": [1, -1, 2]},
}


def check_unfit(name: str) -> None:
    """What the CPU backend refuses, values on a GPU show in ``check``, with and without new tokens."""
    random = np.random.default_rng(2)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float16)  # noqa: E731
    asked: dict[str, Any] = {"cache_seqlens": [5, 40, 3]} | UNFIT[name]
    arrays = {key: np.array(values, np.int32) for key, values in asked.items()}
    q, caches, new = normal(3, 1, 4, 32), [normal(5, 64, 2, 32) for _ in "kv"], [normal(3, 1, 2, 32) for _ in "kv"]
    for more in ([], new) if name != "more tokens than slots" else (new,):
        with pytest.raises((fa.SeqLensError, fa.BlockTableError)):
            fa.flash_attn_with_kvcache(q, *map(np.copy, caches), *more, **arrays)
        uploaded = {key: cases.upload(x) for key, x in arrays.items()}
        out = fa.flash_attn_with_kvcache(*map(cases.upload, (q, *caches, *more)), **uploaded)
        _check_error(1)
        assert np.isfinite(cases.download(out).astype(np.float32)).all()


def _check_error(sequence: int | None) -> None:
    if sequence is not None:
        with pytest.raises(fa.CacheOverflowError, match=f"sequence {sequence} of a call over a KV cache on GPU . did not fit") as caught:
            fa.check()
        assert caught.value.sequence == sequence
    fa.check()
