"""flash_attn_with_kvcache: what is written to the cache, what is rotated, and that o is that of the whole sequence."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from tests.kv_cache.cases import download, upload

RNG = np.random.default_rng(1)
SLOTS, HEADS, KV, D, DV = 48, 4, 2, 32, 24


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float16)


def test_the_signature_is_that_of_flash_attn():
    given = inspect.signature(fa.flash_attn_with_kvcache).parameters
    positional = {name: each.default for name, each in given.items() if each.kind is each.POSITIONAL_OR_KEYWORD}
    assert " ".join(positional) == (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale causal "
        "window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    )
    defaults = {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True, "num_splits": 0}
    assert {name: positional[name] for name in defaults} == defaults
    assert all(positional[name] is None for name in list(positional)[3:12])


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """``x`` (n, heads, D) by rows of cos and sin (n, r / 2), outside of the package."""
    half = cos.shape[1]
    c, s = (table[:, None].astype(np.float32) for table in (cos, sin))
    wide, made = x.astype(np.float32), x.copy()
    if interleaved:
        a, b = wide[..., 0 : 2 * half : 2], wide[..., 1 : 2 * half : 2]
        made[..., 0 : 2 * half : 2], made[..., 1 : 2 * half : 2] = a * c - b * s, a * s + b * c
    else:
        a, b = wide[..., :half], wide[..., half : 2 * half]
        made[..., :half], made[..., half : 2 * half] = a * c - b * s, a * s + b * c
    return made


class Contiguous:
    """A cache of 4 rows for 3 sequences; everything outside of them is NaN."""

    rows = np.array([2, 0, 3], np.int32)

    def __init__(self, lengths: list[int], pads: list[int]) -> None:
        self.lengths, self.pads = lengths, pads
        self.k = np.full((4, SLOTS, KV, D), np.nan, np.float16)
        self.v = np.full((4, SLOTS, KV, DV), np.nan, np.float16)
        for row, length, pad in zip(self.rows, lengths, pads, strict=True):
            self.k[row, pad:length], self.v[row, pad:length] = normal(length - pad, KV, D), normal(length - pad, KV, DV)

    def asked(self) -> dict[str, Any]:
        return {"cache_batch_idx": upload(self.rows), "cache_leftpad": upload(np.array(self.pads, np.int32))}

    def read(self, index: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.k[self.rows[index], self.pads[index] : stop], self.v[self.rows[index], self.pads[index] : stop]

    def write(self, index: int, slot: int, k: np.ndarray, v: np.ndarray) -> None:
        self.k[self.rows[index], slot], self.v[self.rows[index], slot] = k, v


class Paged(Contiguous):
    """The same in pages of 16, without padding."""

    def __init__(self, lengths: list[int], _pads: list[int]) -> None:
        self.lengths, self.pads = lengths, [0] * len(lengths)
        self.k, self.v = np.full((12, 16, KV, D), np.nan, np.float16), np.full((12, 16, KV, DV), np.nan, np.float16)
        self.table = RNG.permutation(12)[:9].reshape(3, 3).astype(np.int32)
        for index, length in enumerate(lengths):
            for slot in range(length):
                self.write(index, slot, normal(KV, D), normal(KV, DV))

    def asked(self) -> dict[str, Any]:
        return {"block_table": upload(self.table)}

    def read(self, index: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(x[self.table[index]].reshape(-1, *x.shape[2:])[:stop] for x in (self.k, self.v))

    def write(self, index: int, slot: int, k: np.ndarray, v: np.ndarray) -> None:
        page = self.table[index, slot // 16]
        self.k[page, slot % 16], self.v[page, slot % 16] = k, v


MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (9, 0)}, "right": {"window_size": (-1, 2)}}


@pytest.mark.parametrize("kind", [Contiguous, Paged])
@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rotary", ["none", "interleaved", "halves"])
def test_new_tokens_are_written_as_if_rotated_outside_and_attended_to(kind: Any, new: int, mask: str, rotary: str):
    """At lengths 0, a page less one and a page, among others; cos and sin are exactly long enough."""
    for lengths in ([0, 1, 15], [16, 17, 31], [33, 4, 43]):
        cache = kind(lengths, [0, 1, 3] if lengths[0] else [0, 0, 3])
        q, k, v = normal(3, new, HEADS, D), normal(3, new, KV, D), normal(3, new, KV, DV)
        before = cache.k.copy(), cache.v.copy()
        table = RNG.uniform(-3, 3, (max(lengths) + new, 5))
        cos, sin = np.cos(table).astype(np.float16), np.sin(table).astype(np.float16)
        asked = {} if rotary == "none" else {"rotary_cos": upload(cos), "rotary_sin": upload(sin), "rotary_interleaved": rotary != "halves"}
        held_k, held_v = upload(cache.k.copy()), upload(cache.v.copy())
        out, lse = fa.flash_attn_with_kvcache(
            upload(q), held_k, held_v, upload(k), upload(v), cache_seqlens=upload(np.array(lengths, np.int32)), **cache.asked(), **asked,
            **MASKS[mask], softcap=9.0, return_softmax_lse=True,
        )  # fmt: skip
        for index, length in enumerate(lengths):
            positions = np.arange(length, length + new)
            own_q, own_k = q[index], k[index]
            if rotary != "none":
                own_k = rotated(own_k, cos[positions], sin[positions], interleaved=rotary != "halves")
                at = positions if mask != "full" else np.full(new, length)
                own_q = rotated(own_q, cos[at], sin[at], interleaved=rotary != "halves")
            for token in range(new):
                cache.write(index, length + token, own_k[token], v[index, token])
            keys, values = cache.read(index, length + new)
            expected = fa.flash_attn_func(own_q[None], keys[None], values[None], **MASKS[mask], softcap=9.0, return_attn_probs=True)
            np.testing.assert_array_equal(download(out)[index], expected[0][0])
            np.testing.assert_array_equal(download(lse)[index], expected[1][0])
        assert download(held_k).tobytes() == cache.k.tobytes() != before[0].tobytes()
        assert download(held_v).tobytes() == cache.v.tobytes() != before[1].tobytes()


def test_without_new_tokens_nothing_is_written_and_lengths_may_be_a_number_or_all():
    cache = Contiguous([48, 48, 48], [0, 0, 0])
    q = upload(normal(3, 2, HEADS, D))
    k, v = upload(cache.k[:3].copy()), upload(cache.v[:3].copy())
    before = download(k).tobytes()
    rows = upload(np.array([0, 2, 0], np.int32))
    made = [fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=n, cache_batch_idx=rows) for n in (None, 48, np.int64(48))]
    assert len({download(each).tobytes() for each in made}) == 1
    shorter = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=7, cache_batch_idx=rows)
    expected = fa.flash_attn_func(q[1:2], k[2:3, :7], v[2:3, :7])
    np.testing.assert_array_equal(download(shorter)[1:2], download(expected))
    assert download(k).tobytes() == before


def test_every_argument_moves_the_result_as_it_moves_that_of_a_plain_call():
    cache = Paged([20, 33, 1], [])
    q, sink = normal(3, 4, HEADS, D), np.array([1.0, 0, -1, 2], np.float32)
    slopes = np.array([0.1, 0.2, 0.3, 0.5], np.float32)
    for change in (
        {"softmax_scale": 0.5},
        {"causal": True, "alibi_slopes": slopes},
        {"window_size": (3, 1), "sink_tokens": 2},
        {"softcap": 2.0, "learned_sink": sink},
    ):
        up = {name: upload(value) if isinstance(value, np.ndarray) else value for name, value in change.items()}
        made = [
            fa.flash_attn_with_kvcache(
                upload(q), upload(cache.k), upload(cache.v), cache_seqlens=upload(np.array(cache.lengths, np.int32)), **cache.asked(), **up,
                num_splits=splits, batch_invariant=invariant,
            )
            for splits, invariant in ((0, False), (3, False), (0, True))
        ]  # fmt: skip
        for index, length in enumerate(cache.lengths):
            keys, values = cache.read(index, length)
            expected = fa.flash_attn_func(q[index : index + 1], keys[None], values[None], **change)[0]
            np.testing.assert_array_equal(download(made[0])[index], expected)
            for other in made[1:]:
                np.testing.assert_allclose(download(other)[index], expected, atol=2e-3)


def test_out_is_written_and_returned():
    cache = Paged([20, 33, 1], [])
    q, lengths = upload(normal(3, 1, HEADS, D)), upload(np.array(cache.lengths, np.int32))
    out = upload(np.full((3, 1, HEADS, DV), np.nan, np.float16))
    arrays = upload(cache.k), upload(cache.v)
    made = fa.flash_attn_with_kvcache(q, *arrays, cache_seqlens=lengths, **cache.asked(), out=out)
    assert made is out
    np.testing.assert_array_equal(download(made), download(fa.flash_attn_with_kvcache(q, *arrays, cache_seqlens=lengths, **cache.asked())))


def test_varlen_with_a_block_table_is_varlen_on_the_gathered_keys():
    cache = Paged([20, 33, 0], [])
    ends_q, ends_k = np.array([0, 5, 6, 9], np.int32), np.array([0, 20, 53, 53], np.int32)
    q = normal(11, HEADS, D)  # two rows that no sequence owns
    keys, values = (np.concatenate(parts) for parts in zip(*(cache.read(i, n) for i, n in enumerate(cache.lengths)), strict=True))
    for asked in ({"causal": True}, {"window_size": (4, 2), "sink_tokens": 1, "softcap": 3.0}):
        made = fa.flash_attn_varlen_func(
            upload(q), upload(cache.k), upload(cache.v), upload(ends_q), upload(ends_k), 5, 33, **asked, return_attn_probs=True,
            block_table=upload(cache.table),
        )  # fmt: skip
        expected = fa.flash_attn_varlen_func(q, keys, values, ends_q, ends_k, 5, 33, **asked, return_attn_probs=True)
        np.testing.assert_array_equal(download(made[0]), expected[0])
        np.testing.assert_array_equal(download(made[1]), expected[1])
        assert made[2] is None


@pytest.mark.torch
def test_tensors_of_torch_in_and_out_and_autograd_is_told():
    torch = pytest.importorskip("torch")
    k_cache, v_cache = torch.zeros(2, 8, 2, 16), torch.zeros(2, 8, 2, 16)
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    version = k_cache._version
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    made = fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
    assert isinstance(made, torch.Tensor)
    assert torch.equal(k_cache[0, 3], k[0, 0])
    assert torch.equal(v_cache[1, 0], v[1, 0])
    assert k_cache._version > version
    torch.testing.assert_close(made[1, 0, 0], v[1, 0, 0])
    said = "{0} requires grad, and calls on a KV cache have no gradients; use torch.no_grad() or {0}.detach()"
    leaves = {name: torch.ones(4, requires_grad=True) for name in ("alibi_slopes", "learned_sink")}
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, leaf in {**leaves, **{name: x.clone().requires_grad_() for name, x in given.items()}}.items():
        with pytest.raises(fa.FeatureNotBuiltError, match=re.escape(said.format(name))) as caught:
            fa.flash_attn_with_kvcache(**given | {name: leaf}, cache_seqlens=lengths)
        assert caught.value.feature == "cache_gradients"
    with pytest.raises(fa.FeatureNotBuiltError, match=re.escape(said.format("q"))):
        fa.PagedAttentionRequest(q.requires_grad_(), k_cache, v_cache, torch.arange(2, dtype=torch.int32)[:, None], lengths)
    table = torch.zeros(2, 1, dtype=torch.int32)
    ends = torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(fa.FeatureNotBuiltError, match="block_table"):
        fa.flash_attn_varlen_func(q[:, 0], k_cache, v_cache, ends, ends, 1, 1, block_table=table)
