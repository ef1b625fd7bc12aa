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
    assert list(inspect.signature(fa.index_put_first_axis).parameters) == ["values", "indices", "first_axis_dim"]
    assert list(inspect.signature(fa.unpad_input_for_concatenated_sequences).parameters) == ["hidden_states", "attention_mask_in_length"]
    assert len(inspect.signature(fa.index_first_axis_residual).parameters) == len(inspect.signature(fa.index_first_axis).parameters) == 2
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


def test_index_first_axis_residual():
    rows, residual = fa.index_first_axis_residual(STATES, np.array([2, 0]))
    np.testing.assert_array_equal(rows, STATES[[2, 0]])
    assert residual is STATES


def test_index_put_first_axis_undoes_index_first_axis():
    put = fa.index_put_first_axis(STATES, np.array([4, 0, 2]), 6)
    np.testing.assert_array_equal(put[[4, 0, 2]], STATES)
    assert not put[[1, 3, 5]].any()
    assert (put.shape, put.dtype) == ((6, *STATES.shape[1:]), STATES.dtype)
    assert fa.index_put_first_axis(STATES[:0], np.array([], np.int64), 0).shape == (0, *STATES.shape[1:])


LENGTHS = np.array([[2, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 4, 0, 0]], np.int32)  # the zero between two lengths says nothing


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int8, np.uint16])
def test_concatenated_sequences_are_unpacked_each_by_itself(dtype: type):
    rows, indices, cu_seqlens, longest = fa.unpad_input_for_concatenated_sequences(STATES, LENGTHS.astype(dtype))
    np.testing.assert_array_equal(indices, [0, 1, 2, 10, 11, 12, 13, 14])
    np.testing.assert_array_equal(rows, STATES.reshape(15, 2, 4)[indices])
    np.testing.assert_array_equal(cu_seqlens, [0, 2, 3, 4, 8])
    assert (cu_seqlens.dtype, longest) == (np.int32, 4)
    assert isinstance(longest, int)
    valid = np.arange(5) < LENGTHS.sum(-1)[:, None]
    np.testing.assert_array_equal(fa.pad_input(rows, indices, 3, 5), STATES * valid[:, :, None, None])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 5)])
def test_a_batch_without_any_sequence(shape: tuple[int, int]):
    states, lengths = np.zeros((*shape, 2), np.float32), np.zeros(shape, np.int32)
    rows, indices, cu_seqlens, longest = fa.unpad_input_for_concatenated_sequences(states, lengths)
    assert (rows.shape, len(indices), cu_seqlens.tolist(), longest) == ((0, 2), 0, [0], 0)


def test_concatenated_sequences_do_not_see_each_other():
    q = RNG.standard_normal((2, 6, 2, 8), np.float32)
    rows, indices, cu_seqlens, longest = fa.unpad_input_for_concatenated_sequences(q, np.array([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]]))
    out = fa.flash_attn_varlen_func(rows, rows, rows, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    out = fa.pad_input(out, indices, 2, 6)
    for row, begin, end in ((0, 0, 2), (0, 2, 5), (1, 0, 6)):
        part = q[row : row + 1, begin:end]
        np.testing.assert_allclose(out[row : row + 1, begin:end], fa.flash_attn_func(part, part, part, causal=True), rtol=1e-5, atol=1e-6)


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
        (lambda: fa.index_first_axis_residual(STATES, MASK), "indices: got shape (3, 5)", "flat"),
        (lambda: fa.index_put_first_axis(STATES, np.arange(2), 9), "indices: got 2 of them for 3 rows", "each row of values"),
        (lambda: fa.index_put_first_axis(STATES, np.arange(3), 2), "indices: got values from 0 to 2", "allowed are 0..1"),
        (lambda: fa.index_put_first_axis(STATES, np.arange(3), -1), "first_axis_dim: got -1", ">= 0"),
        (lambda: fa.index_put_first_axis(STATES[0, 0, 0], np.arange(4), 4), "values: got shape (4,)", "(rows, ...)"),
        (lambda: fa.unpad_input_for_concatenated_sequences(STATES, LENGTHS[:2]), "attention_mask_in_length: got shape (2, 5)", "(3, 5)"),
        (lambda: fa.unpad_input_for_concatenated_sequences(STATES, LENGTHS + 1), "a row of more than 5 tokens", "what fits in a row"),
        (lambda: fa.unpad_input_for_concatenated_sequences(STATES, LENGTHS - 1), "got a negative length", "what fits in a row"),
        (lambda: fa.unpad_input_for_concatenated_sequences(STATES, np.full((3, 5), 2**62)), "a row of more than 5", "what fits in a row"),
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
    with pytest.raises(fa.DTypeError, match="attention_mask_in_length: got type bool; allowed are integers"):
        fa.unpad_input_for_concatenated_sequences(STATES, MASK.astype(bool))
    with pytest.raises(fa.ArrayTypeError, match=r"attention_mask: got builtins.NoneType"):
        fa.unpad_input(STATES, None)
    with pytest.raises(fa.ArrayTypeError, match=r"attention_mask_in_length: got builtins.NoneType"):
        fa.unpad_input_for_concatenated_sequences(STATES, None)


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


_INDEX_TYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]


@pytest.mark.torch
@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("dtype", _INDEX_TYPES)
def test_indices_of_any_integer_type_are_places_and_no_mask(dtype: str, library: str):
    import torch

    places = [1, 0, 1]  # as a mask: rows 0 and 2
    indices = torch.tensor(places).to(getattr(torch, dtype)) if library == "torch" else np.array(places, dtype)
    x = torch.from_numpy(STATES)
    assert torch.equal(fa.index_first_axis(x, indices), x[[1, 0, 1]])
    assert torch.equal(fa.index_first_axis_residual(x, indices)[0], x[[1, 0, 1]])
    put = fa.index_put_first_axis(x[:2], indices[:2], 3)
    assert torch.equal(put, torch.stack([x[1], x[0], torch.zeros_like(x[0])]))
    assert torch.equal(fa.pad_input(x[:2], indices[:2], 3, 1)[:, 0], put)
    np.testing.assert_array_equal(fa.index_first_axis(STATES, indices), STATES[places])


@pytest.mark.torch
def test_torch_equals_numpy_for_concatenated_sequences():
    import torch

    states = torch.from_numpy(STATES).requires_grad_()
    expected = fa.unpad_input_for_concatenated_sequences(STATES, LENGTHS)
    for dtype in (torch.int32, torch.int64, torch.uint8):
        rows, indices, cu_seqlens, longest = fa.unpad_input_for_concatenated_sequences(states, torch.from_numpy(LENGTHS).to(dtype))
        for left, right in zip((rows, indices, cu_seqlens), expected[:3], strict=True):
            np.testing.assert_array_equal(left.detach().numpy(), right)
        assert (cu_seqlens.dtype, longest) == (torch.int32, expected[3])
    rows.sum().backward()
    valid = np.arange(5) < LENGTHS.sum(-1)[:, None]
    np.testing.assert_array_equal(states.grad.numpy(), np.broadcast_to(valid[:, :, None, None], STATES.shape))


@pytest.mark.torch
def test_gradients_of_the_index_functions():
    import torch

    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    repeated, once = torch.tensor([2, 0, 2], dtype=torch.uint8), torch.tensor([3, 0], dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda t: fa.index_first_axis(t, repeated), x)
    assert torch.autograd.gradcheck(lambda t: fa.index_put_first_axis(t[:2], once, 5), x)
    assert torch.autograd.gradcheck(lambda t: fa.index_first_axis_residual(t, repeated), x)
    rows, residual = fa.index_first_axis_residual(x, repeated)
    (rows.sum() + 10 * residual.sum()).backward()
    np.testing.assert_array_equal(x.grad[:, 0, 0], [11, 10, 12, 10])


@pytest.mark.torch
def test_devices_have_to_agree():
    import torch

    with pytest.raises(fa.DeviceMismatchError, match="got a torch tensor on meta"):
        fa.unpad_input(torch.from_numpy(STATES), torch.from_numpy(MASK).to("meta"))


@pytest.mark.parametrize("value", [2, -1])
def test_a_mask_of_other_values_than_0_and_1_is_refused(value: int):
    with pytest.raises(fa.ShapeError, match="a value other than 0 and 1"):
        fa.unpad_input(np.zeros((2, 3, 4), np.float32), np.full((2, 3), value))
