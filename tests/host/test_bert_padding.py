from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa

RNG = np.random.default_rng(0)
STATES = RNG.standard_normal((3, 5, 2, 4), np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], np.int32)


def test_signatures_are_those_of_flash_attn():
    assert list(inspect.signature(fa.pad_input).parameters) == ["hidden_states", "indices", "batch", "seqlen"]
    assert [(p.name, p.default) for p in inspect.signature(fa.unpad_input).parameters.values()][2] == ("unused_mask", None)


@pytest.mark.parametrize("mask", [MASK, MASK.astype(bool), MASK.astype(np.int64)])
def test_unpad_packs_the_valid_tokens(mask: np.ndarray):
    rows, indices, cu_seqlens, longest, used = fa.unpad_input(STATES, mask)
    np.testing.assert_array_equal(rows, STATES[MASK.astype(bool)])
    np.testing.assert_array_equal(indices, np.flatnonzero(MASK))
    np.testing.assert_array_equal(cu_seqlens, [0, 3, 3, 6])
    np.testing.assert_array_equal(used, [3, 0, 3])
    assert (cu_seqlens.dtype, used.dtype, longest) == (np.int32, np.int32, 3)
    assert isinstance(longest, int)


def test_pad_undoes_unpad():
    rows, indices, *_ = fa.unpad_input(STATES, MASK)
    np.testing.assert_array_equal(fa.pad_input(rows, indices, 3, 5), STATES * MASK[:, :, None, None])


def test_unused_tokens_are_kept_and_not_counted_as_valid():
    unused = np.array([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], np.int32)
    rows, _, cu_seqlens, longest, used = fa.unpad_input(STATES, MASK, unused)
    assert len(rows) == 8
    np.testing.assert_array_equal(cu_seqlens, [0, 4, 4, 8])
    np.testing.assert_array_equal(used, [3, 0, 3])
    assert longest == 4


def test_an_empty_batch_and_an_empty_mask():
    rows, indices, cu_seqlens, longest, _ = fa.unpad_input(STATES[:0], MASK[:0])
    assert (len(rows), len(indices), cu_seqlens.tolist(), longest) == (0, 0, [0], 0)
    rows, indices, cu_seqlens, longest, _ = fa.unpad_input(STATES, np.zeros_like(MASK))
    assert (len(rows), cu_seqlens.tolist(), longest) == (0, [0, 0, 0, 0], 0)
    assert not fa.pad_input(rows, indices, 3, 5).any()


def test_index_first_axis():
    np.testing.assert_array_equal(fa.index_first_axis(STATES, np.array([2, 0, 2])), STATES[[2, 0, 2]])


def test_the_way_through_attention_equals_padded_attention():
    q = RNG.standard_normal((2, 6, 2, 8), np.float32)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
    rows, indices, cu_seqlens, longest, _ = fa.unpad_input(q, mask)
    out = fa.pad_input(fa.flash_attn_varlen_func(rows, rows, rows, cu_seqlens, cu_seqlens, longest, longest), indices, 2, 6)
    np.testing.assert_allclose(out[0], fa.flash_attn_func(q[:1], q[:1], q[:1])[0], rtol=1e-5, atol=1e-6)
    short = q[1:, :4]
    np.testing.assert_allclose(out[1, :4], fa.flash_attn_func(short, short, short)[0], rtol=1e-5, atol=1e-6)
    assert not out[1, 4:].any()


@pytest.mark.parametrize(
    ("call", "got", "allowed"),
    [
        (lambda: fa.unpad_input(STATES, MASK[:2]), "attention_mask: got shape (2, 5)", "allowed is (3, 5)"),
        (lambda: fa.unpad_input(STATES, MASK, MASK[:, :4]), "unused_mask: got shape (3, 4)", "allowed is (3, 5)"),
        (lambda: fa.unpad_input(STATES[0, 0, 0], MASK), "hidden_states: got shape (4,)", "(batch, length, ...)"),
        (lambda: fa.pad_input(STATES[0], np.arange(4), 1, 5), "got 4 of them for 5 rows", "one index for each row"),
        (lambda: fa.pad_input(STATES[0], np.arange(5), -1, 5), "batch: got -1", ">= 0"),
        (lambda: fa.pad_input(STATES[0], np.arange(5), 1, 2.5), "seqlen: got 2.5", "an integer"),
        (lambda: fa.index_first_axis(STATES, MASK), "indices: got shape (3, 5)", "flat"),
        (lambda: fa.index_first_axis(STATES, np.array([0, 3])), "indices: got values from 0 to 3", "allowed are 0..2"),
        (lambda: fa.index_first_axis(STATES, np.array([-1, 0])), "indices: got values from -1 to 0", "allowed are 0..2"),
        (lambda: fa.pad_input(STATES[0], np.arange(5) + 6, 2, 5), "indices: got values from 6 to 10", "allowed are 0..9"),
    ],
)
def test_bad_sizes_are_refused(call: Callable[[], Any], got: str, allowed: str):
    with pytest.raises(fa.ShapeError) as raised:
        call()
    assert got in str(raised.value)
    assert allowed in str(raised.value)


def test_indices_that_are_no_integers_and_no_mask_are_refused():
    with pytest.raises(fa.DTypeError, match="indices: got type float64; allowed are integers"):
        fa.index_first_axis(STATES, np.array([0.0, 1.0]))
    with pytest.raises(fa.ArrayTypeError, match=r"attention_mask: got builtins.NoneType"):
        fa.unpad_input(STATES, None)


@pytest.mark.torch
def test_torch_equals_numpy_and_gradients_flow():
    import torch

    states = torch.from_numpy(STATES).requires_grad_()
    rows, indices, cu_seqlens, longest, used = fa.unpad_input(states, torch.from_numpy(MASK))
    expected = fa.unpad_input(STATES, MASK)
    for left, right in zip((rows, indices, cu_seqlens, used), (expected[0], expected[1], expected[2], expected[4]), strict=True):
        np.testing.assert_array_equal(left.detach().numpy(), right)
    assert (cu_seqlens.dtype, longest) == (torch.int32, 3)
    fa.pad_input(rows, indices, 3, 5).sum().backward()
    np.testing.assert_array_equal(states.grad.numpy(), np.broadcast_to(MASK[:, :, None, None], STATES.shape))


@pytest.mark.torch
def test_devices_have_to_agree():
    import torch

    with pytest.raises(fa.DeviceMismatchError, match="got a torch tensor on meta"):
        fa.unpad_input(torch.from_numpy(STATES), torch.from_numpy(MASK).to("meta"))


@pytest.mark.parametrize("value", [2, -1])
def test_a_mask_of_other_values_than_0_and_1_is_refused(value: int):
    with pytest.raises(fa.ShapeError, match="a value other than 0 and 1"):
        fa.unpad_input(np.zeros((2, 3, 4), np.float32), np.full((2, 3), value))
