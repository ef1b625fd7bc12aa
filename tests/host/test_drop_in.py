"""Where users of flash-attn trip: lengths and windows that are tensors, odd last strides, cu_seqlens that end early."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import functional, with_kvcache

Q = np.random.default_rng(0).standard_normal((2, 9, 4, 16), np.float32)
FLAT = Q.reshape(18, 4, 16)
ENDS = np.array([0, 7, 18], np.int32)


def same(one: Any, other: Any) -> None:
    for left, right in zip(one[:2], other[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def packed(*lengths: Any, **options: Any) -> Any:
    return fa.flash_attn_varlen_func(FLAT, FLAT, FLAT, ENDS, ENDS, *lengths, return_attn_probs=True, **options)


class TestLengths:
    @pytest.mark.parametrize("kind", [np.array, np.int64, np.uint8, lambda value: np.array(value, np.int32)])
    def test_integers_and_arrays_without_dimensions(self, kind: Any):
        expected = packed(11, 12)
        same(packed(kind(11), kind(12)), expected)
        qkv = np.stack([FLAT] * 3, 1)
        for call, lengths in (
            (fa.flash_attn_varlen_qkvpacked_func, (qkv, ENDS, kind(12))),
            (fa.flash_attn_varlen_kvpacked_func, (FLAT, qkv[:, 1:], ENDS, ENDS, kind(11), kind(12))),
        ):
            same(call(*lengths, return_attn_probs=True), expected)
        assert fa.CumulativeSeqlens(ENDS, kind(11)).max_seqlen == 11

    @pytest.mark.parametrize("wrong", [np.array(11.0), np.array([11]), np.array(True), True, 11.0, "11", np.array(-1)], ids=repr)
    def test_others_are_refused(self, wrong: Any):
        for lengths in ((wrong, 11), (11, wrong)):
            with pytest.raises(fa.CuSeqlensError, match=r"max_seqlen of cu_seqlens_[qk]: got .*; allowed is an integer in 0"):
                packed(*lengths)
        with pytest.raises(fa.CuSeqlensError, match="allowed is an integer"):
            fa.CumulativeSeqlens(ENDS, wrong)

    def test_one_that_is_too_short_is_refused_as_an_array_too(self):
        with pytest.raises(fa.CuSeqlensError, match="got 10, and a sequence has 11 rows"):
            packed(np.array(10), 11)


class TestWindow:
    @pytest.mark.parametrize(
        "window", [[3, 1], np.array([3, 1]), (np.int64(3), np.array(1)), [np.array(3, np.int32), 1], range(3, 0, -2)], ids=repr
    )
    def test_pairs_of_every_kind(self, window: Any):
        expected = fa.flash_attn_func(Q, Q, Q, window_size=(3, 1), return_attn_probs=True)
        same(fa.flash_attn_func(Q, Q, Q, window_size=window, return_attn_probs=True), expected)
        same(packed(11, 11, window_size=window), packed(11, 11, window_size=(3, 1)))
        causal = fa.flash_attn_func(Q, Q, Q, causal=True, window_size=window)
        np.testing.assert_array_equal(causal, fa.flash_attn_func(Q, Q, Q, window_size=(3, 0)))

    @pytest.mark.parametrize(
        "wrong",
        [
            np.array([True, False]),
            np.array([3.0, 1.0]),
            np.array([3, 1, 0]),
            np.array(3),
            np.array([[3, 1]]),
            (np.True_, 1),
            3,
            None,
            "31",
            {3, 1},
            {3: 1, 1: 3},
            (3,),
        ],
        ids=repr,
    )
    def test_others_are_refused(self, wrong: Any):
        with pytest.raises(fa.WindowError, match="window_size: got "):
            fa.flash_attn_func(Q, Q, Q, window_size=wrong)

    def test_requests_take_them_too(self):
        mask = fa.MaskKind.window(np.array(3), np.array(-1))
        assert (mask.left, mask.right) == (3, None)
        assert fa.MaskKind.sliding_causal(np.array(4)) == fa.MaskKind.sliding_causal(4)
        assert hash(fa.MaskKind(np.int64(3), 0)) == hash(fa.MaskKind(3, 0))
        assert type(fa.MaskKind(np.int64(3), 0).left) is int


def stretched(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)[..., ::2]


STRIDES = {
    "two": stretched,
    "reversed": lambda array: np.ascontiguousarray(array[..., ::-1])[..., ::-1],
    "column major": np.asfortranarray,
    "zero": lambda array: np.broadcast_to(array[..., :1], array.shape),
}


class TestLastStrides:
    @pytest.mark.parametrize("name", STRIDES)
    @pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
    @pytest.mark.parametrize("head_dim", [16, 13])
    def test_functional_calls_copy(self, name: str, which: str, head_dim: int):
        arrays = {each: STRIDES[name](Q[..., :head_dim]) if each in which else Q[..., :head_dim] for each in "qkv"}
        assert all(arrays[each].strides[-1] != 4 for each in which)
        before = {each: array.copy() for each, array in arrays.items()}
        options = {"causal": True, "softcap": 5.0, "return_attn_probs": True}
        plain = fa.flash_attn_func(**{each: np.ascontiguousarray(array) for each, array in arrays.items()}, **options)
        same(fa.flash_attn_func(**arrays, **options), plain)
        out = np.full((*Q.shape[:-1], head_dim), np.nan, np.float32)
        made = fa.flash_attn_func(**arrays, **options, out=out)
        assert made[0] is out
        same(made, plain)
        flat = [array[0] for array in arrays.values()]
        ends = np.array([0, 4, 9], np.int32)
        same(
            fa.flash_attn_varlen_func(*flat, ends, ends, 5, 5, **options),
            fa.flash_attn_varlen_func(*map(np.ascontiguousarray, flat), ends, ends, 5, 5, **options),
        )
        for each, array in arrays.items():
            np.testing.assert_array_equal(array, before[each])

    def test_packed_forms_copy(self):
        qkv = np.stack([Q] * 3, 2)
        expected = fa.flash_attn_func(Q, Q, Q)
        np.testing.assert_array_equal(fa.flash_attn_qkvpacked_func(stretched(qkv)), expected)
        np.testing.assert_array_equal(fa.flash_attn_kvpacked_func(stretched(Q), stretched(qkv[:, :, 1:])), expected)

    @pytest.mark.parametrize("name", STRIDES)
    def test_requests_and_outputs_refuse(self, name: str):
        with pytest.raises(fa.StrideError, match=r"k: got strides .*allowed is a last stride of 1"):
            fa.DenseFwdRequest(Q, STRIDES[name](Q), Q)
        with pytest.raises(fa.OutputError):
            fa.flash_attn_func(Q, Q, Q, out=STRIDES[name](Q))

    def test_a_head_dim_of_one_has_any_stride(self):
        q = Q[..., ::16]
        assert q.shape[-1] == 1
        fa.DenseFwdRequest(q, q, q)


class TestSpareRows:
    @pytest.mark.parametrize("ends_q", [[0, 5, 11], [0, 0, 4], [0, 0, 0], [0, 18, 18], [0, 9, 18]], ids=str)
    @pytest.mark.parametrize("ends_k", [[0, 6, 13], [0, 0, 0], [0, 9, 18]], ids=str)
    @pytest.mark.parametrize("sink", [None, np.array([0.5, 1, -1, 2], np.float32)], ids=["", "learned sink"])
    def test_they_get_zero_and_minus_infinity_and_are_not_read(self, ends_q: list[int], ends_k: list[int], sink: Any):
        q, k, v = FLAT.copy(), FLAT.copy() + 1, FLAT.copy() - 1
        end_q, end_k = ends_q[-1], ends_k[-1]
        offsets = [np.array(each, np.int32) for each in (ends_q, ends_k)]
        longest = [int(np.diff(each).max()) for each in offsets]
        options = {"causal": True, "learned_sink": sink, "return_attn_probs": True}
        expected = fa.flash_attn_varlen_func(q[:end_q], k[:end_k], v[:end_k], *offsets, *longest, **options)
        q[end_q:] = k[end_k:] = v[end_k:] = np.nan
        out = np.full_like(q, np.nan)
        made, lse, _ = fa.flash_attn_varlen_func(q, k, v, *offsets, *longest, **options, out=out)
        assert made is out
        same((made[:end_q], lse[:, :end_q]), expected)
        assert (made[end_q:] == 0).all()
        assert np.isneginf(lse[:, end_q:]).all()

    def test_lengths_know_their_longest_without_being_told(self):
        lengths = fa.CumulativeSeqlens.from_lengths([0, 0])
        output = fa.run(fa.VarlenFwdRequest(FLAT, FLAT, FLAT, cu_seqlens_q=lengths))
        assert (output.out == 0).all()
        assert np.isneginf(output.lse).all()

    def test_the_dropout_pattern_does_not_see_them(self):
        offsets = np.array([0, 5, 11], np.int32)
        patterns = []
        for rows in (11, 18):
            lengths = fa.CumulativeSeqlens(offsets)
            options = fa.AttentionOptions(dropout_p=0.5, rng=np.array([1, 2]))
            request = fa.VarlenFwdRequest(*[FLAT[:rows]] * 3, cu_seqlens_q=lengths, options=options)
            patterns.append(fa.run(request, dropout_mask=True).dropout_mask)
        np.testing.assert_array_equal(*patterns)

    @given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 5))
    @settings(max_examples=40, deadline=None)
    def test_any_number_of_them(self, lengths: list[tuple[int, int]], spare_q: int, spare_k: int):
        ends = [np.concatenate([[0], np.cumsum([pair[side] for pair in lengths])]).astype(np.int32) for side in (0, 1)]
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((rows, 2, 16), np.float32) for rows in (ends[0][-1] + spare_q, *[ends[1][-1] + spare_k] * 2))
        cut = q[: ends[0][-1]], k[: ends[1][-1]], v[: ends[1][-1]]
        made, lse, _ = fa.flash_attn_varlen_func(q, k, v, *ends, 6, 6, return_attn_probs=True)
        same((made[: len(cut[0])], lse[:, : len(cut[0])]), fa.flash_attn_varlen_func(*cut, *ends, 6, 6, return_attn_probs=True))
        assert (made[len(cut[0]) :] == 0).all()
        assert np.isneginf(lse[:, len(cut[0]) :]).all()


PAGE = (Path(__file__).parents[2] / "docs" / "flash-attn-differences.md").read_text(encoding="utf-8")


CALLS = [*functional.__all__, *with_kvcache.__all__]


@pytest.mark.parametrize("name", CALLS)
def test_the_page_of_differences_names_every_argument(name: str):
    for argument in inspect.signature(getattr(fa, name)).parameters:
        assert re.search(rf"`{argument}[`,]|`[^`]*, {argument}`|`{argument}=", PAGE), f"{argument} of {name} is not on the page"


def test_the_page_of_differences_names_every_call():
    for name in CALLS:
        assert f"`{name}`" in PAGE
