"""What the kernels over a KV cache are asked, by the tests on a card and by those in the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.types import DType
from tests.kv_cache import cases
from tests.kv_cache.test_grid import AXES, case_of
from tests.pairwise import covering_rows

__all__ = ["APPENDS", "GRID", "HALF", "check_append", "check_entries_outside", "check_pages", "close", "with_new_tokens"]

HALF: dict[str, float] = {"rtol": 4e-3, "atol": 4e-3}

_GPU_AXES = AXES | {
    "dtype": ({"dtype": DType.F16}, {"dtype": DType.BF16}),
    "order": ({}, {"num_splits": 1}, {"num_splits": 2}, {"num_splits": 7}, {"batch_invariant": True}),
}
GRID = [case_of(row) for row in covering_rows(_GPU_AXES)]


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


def check_entries_outside() -> None:
    """Entries of a table that name no page count as no keys, as on the CPU backend."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(shape).astype(np.float16) for shape in ((2, 1, 4, 32), (6, 16, 2, 32), (6, 16, 2, 32)))
    table, lengths = np.array([[0, -5, 2], [1 << 20, 4, 5]], np.int32), np.array([40, 48], np.int32)
    expected = fa.run(fa.PagedAttentionRequest(q, k, v, table, lengths))
    made = fa.run(fa.PagedAttentionRequest(*map(cases.upload, (q, k, v, table, lengths))))
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
