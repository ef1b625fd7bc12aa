"""The functional calls mean the same in every form: dense, packed, qkv-packed, kv-packed; NumPy, torch, DLPack; padded or not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.types import DType
from tests.cases import Case
from tests.check import Run, check_case
from tests.inputs import Inputs
from tests.strategies import random_cases

# The public signatures of flash-attn 2.8: names, order and defaults.
COMMON = (
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
)
OURS = (("out", None), ("learned_sink", None), ("sink_tokens", 0), ("q_descale", None), ("k_descale", None), ("v_descale", None))
REQUIRED = {
    "flash_attn_func": ("q", "k", "v"),
    "flash_attn_qkvpacked_func": ("qkv",),
    "flash_attn_kvpacked_func": ("q", "kv"),
    "flash_attn_varlen_func": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    "flash_attn_varlen_qkvpacked_func": ("qkv", "cu_seqlens", "max_seqlen"),
    "flash_attn_varlen_kvpacked_func": ("q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
}


@pytest.mark.parametrize("name", REQUIRED)
def test_signature_is_that_of_flash_attn(name: str):
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [(argument, inspect.Parameter.empty) for argument in REQUIRED[name]]
    last = [("block_table", None)] if name == "flash_attn_varlen_func" else []
    assert positional == [*required, *COMMON, *last]
    assert tuple((p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY) == OURS


def options_of(inputs: Inputs) -> dict[str, Any]:
    return {
        "softmax_scale": inputs.softmax_scale,
        "window_size": tuple(-1 if side is None else side for side in (inputs.left, inputs.right)),
        "softcap": inputs.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "return_attn_probs": True,
        "learned_sink": inputs.learned_sink,
        "sink_tokens": inputs.sink_tokens,
    }


def run_functional(inputs: Inputs) -> Run:
    out = np.full(inputs.out_shape, np.nan, inputs.q.dtype)
    if inputs.cu_seqlens_q is None:
        return Run(*fa.flash_attn_func(inputs.q, inputs.k, inputs.v, out=out, **options_of(inputs)))
    packing = inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.max_seqlen_q, inputs.max_seqlen_k
    return Run(*fa.flash_attn_varlen_func(inputs.q, inputs.k, inputs.v, *packing, out=out, **options_of(inputs)))


def run_request(inputs: Inputs) -> Run:
    options = fa.AttentionOptions(
        softmax_scale=inputs.softmax_scale,
        softcap=inputs.softcap,
        learned_sink=inputs.learned_sink,
        dropout_p=inputs.dropout_p,
        rng=inputs.rng,
    )
    common: dict[str, Any] = {
        "mask": fa.MaskKind(inputs.left, inputs.right),
        "bias": fa.PositionBias(inputs.alibi_slopes),
        "sink_tokens": inputs.sink_tokens,
        "options": options,
        "out": np.full(inputs.out_shape, np.nan, inputs.q.dtype),
    }
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        common["cu_seqlens_q"] = fa.CumulativeSeqlens(inputs.cu_seqlens_q)
        common["cu_seqlens_k"] = fa.CumulativeSeqlens(inputs.cu_seqlens_k)
        request: Any = fa.VarlenFwdRequest(inputs.q, inputs.k, inputs.v, **common)
    else:
        request = fa.Fa2FwdRequest(inputs.q, inputs.k, inputs.v, **common)
    output = fa.run(request, dropout_mask=True)
    assert output.out is common["out"]
    return Run(output.out, output.lse, output.dropout_mask)


@given(case=random_cases([DType.F16, DType.BF16, DType.F32, DType.F64]))
@settings(max_examples=60, deadline=None)
def test_requests_agree_with_the_oracle(case: Case):
    check_case(case, run_request)


@given(case=random_cases([DType.F32, DType.BF16]).filter(lambda case: not case.dropout_p))
@settings(max_examples=60, deadline=None)
def test_functional_calls_agree_with_the_oracle(case: Case):
    check_case(case, run_functional)


@dataclass(frozen=True)
class Shape:
    """Sizes of a self-attention call, with what changes its meaning."""

    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool
    window: tuple[int, int]
    softcap: float

    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window_size": self.window, "softcap": self.softcap, "return_attn_probs": True}

    def array(self, seed: int, heads: int | None = None) -> np.ndarray:
        size = (self.batch, self.length, self.heads if heads is None else heads, self.head_dim)
        return np.random.default_rng(seed).standard_normal(size, np.float32)


shapes = st.builds(
    Shape,
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.sampled_from([1, 2, 4]),
    head_dim=st.integers(1, 40),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
    softcap=st.sampled_from([0.0, 5.0, -1.0]),
)


def same(one: Any, other: Any) -> None:
    """Out and LSE, bit for bit."""
    for left, right in zip(one[:2], other[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_packed_forms_equal_the_plain_form(shape: Any):
    q, k, v = (shape.array(seed) for seed in range(3))
    plain = fa.flash_attn_func(q, k, v, **shape.options())
    same(fa.flash_attn_qkvpacked_func(np.stack([q, k, v], 2), **shape.options()), plain)
    same(fa.flash_attn_kvpacked_func(q, np.stack([k, v], 2), **shape.options()), plain)


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_sequences_of_one_length_equal_a_batch(shape: Any):
    q, k, v = (shape.array(seed) for seed in range(3))
    out, lse, _ = fa.flash_attn_func(q, k, v, **shape.options())
    offsets = np.arange(shape.batch + 1, dtype=np.int32) * shape.length
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    plain = out.reshape(-1, *out.shape[2:]), lse.transpose(1, 0, 2).reshape(shape.heads, -1)
    same(fa.flash_attn_varlen_func(*flat, offsets, offsets, shape.length, shape.length, **shape.options()), plain)
    same(fa.flash_attn_varlen_qkvpacked_func(np.stack(flat, 1), offsets, shape.length, **shape.options()), plain)
    kv = np.stack(flat[1:], 1)
    same(fa.flash_attn_varlen_kvpacked_func(flat[0], kv, offsets, offsets, shape.length, shape.length, **shape.options()), plain)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_packed_sequence_equals_its_own_dense_call(lengths: list[tuple[int, int]], causal: bool):
    rng = np.random.default_rng(0)
    total_q, total_k = (sum(pair[side] for pair in lengths) for side in (0, 1))
    q, k, v = (rng.standard_normal((rows, 2, 16), np.float32) for rows in (total_q, total_k, total_k))
    seqlens = [fa.CumulativeSeqlens.from_lengths([pair[side] for pair in lengths]) for side in (0, 1)]
    mask = fa.MaskKind.causal() if causal else fa.MaskKind.full()
    packed = fa.run(fa.VarlenFwdRequest(q, k, v, cu_seqlens_q=seqlens[0], cu_seqlens_k=seqlens[1], mask=mask))
    row = key = 0
    for rows, keys in lengths:
        one = [x[None] for x in (q[row : row + rows], k[key : key + keys], v[key : key + keys])]
        dense = fa.run(fa.Fa2FwdRequest(*one, mask=mask))
        np.testing.assert_allclose(packed.out[row : row + rows], dense.out[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(packed.lse[:, row : row + rows], dense.lse[0], rtol=1e-5, atol=1e-6)
        row, key = row + rows, key + keys


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(1, 1), (7, 7), (12, 20), (64, 13), (13, 64), (255, 9)])
@pytest.mark.parametrize("given_out", [False, True])
def test_odd_head_dims_are_padded_and_cut_back(head_dim: int, v_head_dim: int, given_out: bool):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 9, 2, size), np.float32) for size in (head_dim, head_dim, v_head_dim))
    out = np.full((2, 9, 2, v_head_dim), np.nan, np.float32) if given_out else None
    made, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, out=out)
    exact = fa.run(fa.Fa2FwdRequest(q, k, v, mask=fa.MaskKind.causal()))  # the CPU backend needs no padding
    assert made.shape == (2, 9, 2, v_head_dim)
    assert (made is out) == given_out
    np.testing.assert_allclose(made, exact.out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-5, atol=1e-6)


def test_the_default_scale_is_that_of_the_head_dim_before_padding():
    q = np.random.default_rng(2).standard_normal((1, 6, 1, 5), np.float32)
    given_scale = fa.flash_attn_func(q, q, q, softmax_scale=5**-0.5)
    np.testing.assert_array_equal(fa.flash_attn_func(q, q, q), given_scale)


def test_return_attn_probs_gives_the_dropout_pattern_and_else_nothing():
    q = np.random.default_rng(3).standard_normal((2, 33, 2, 16), np.float32)
    assert isinstance(fa.flash_attn_func(q, q, q), np.ndarray)
    out, lse, pattern = fa.flash_attn_func(q, q, q, return_attn_probs=True)
    assert (out.shape, lse.shape, lse.dtype, pattern) == (q.shape, (2, 2, 33), np.float32, None)
    np.random.seed(5)  # noqa: NPY002 - the generator that dropout draws from
    out, lse, pattern = fa.flash_attn_func(q, q, q, 0.5, return_attn_probs=True)
    assert (pattern.shape, pattern.dtype) == ((2, 2, 33, 33), np.bool_)
    assert 0.4 < pattern.mean() < 0.6
    np.random.seed(5)  # noqa: NPY002
    again = fa.flash_attn_func(q, q, q, 0.5)
    np.testing.assert_array_equal(out, again)
    assert not np.array_equal(out, fa.flash_attn_func(q, q, q, 0.5))


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_accepted_and_changes_nothing(deterministic: bool):
    q = np.random.default_rng(4).standard_normal((1, 20, 2, 16), np.float32)
    np.testing.assert_array_equal(fa.flash_attn_func(q, q, q, deterministic=deterministic), fa.flash_attn_func(q, q, q))


def test_causal_overrides_the_right_side_of_the_window():
    q = np.random.default_rng(6).standard_normal((1, 20, 2, 16), np.float32)
    np.testing.assert_array_equal(
        fa.flash_attn_func(q, q, q, causal=True, window_size=(5, 9)), fa.flash_attn_func(q, q, q, window_size=(5, 0))
    )


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_empty_batch_and_no_queries_give_empty_results(shape: Any):
    q, k = np.zeros(shape, np.float32), np.zeros((shape[0], 7, 2, 16), np.float32)
    out, lse, _ = fa.flash_attn_func(q, k, k, return_attn_probs=True)
    assert (out.shape, lse.shape) == (shape, (shape[0], 2, shape[1]))


def test_no_keys_give_zeros_and_minus_infinity():
    q, k = np.ones((1, 3, 2, 16), np.float32), np.zeros((1, 0, 2, 16), np.float32)
    out, lse, _ = fa.flash_attn_func(q, k, k, return_attn_probs=True, out=np.full_like(q, np.nan))
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_lse_is_made_only_when_asked_for():
    q = np.zeros((1, 3, 2, 16), np.float32)
    request = fa.Fa2FwdRequest(q, q, q)
    assert fa.run(request).lse.shape == (1, 2, 3)
    assert fa.run(request, lse=False).lse is None
    assert fa.run(request, dropout_mask=True).dropout_mask is None  # there is no dropout


def test_strided_inputs_and_outputs_are_used_in_place():
    storage = np.random.default_rng(7).standard_normal((2, 3, 2, 11, 16), np.float32)
    q, k, v = (storage[:, part].transpose(0, 2, 1, 3) for part in range(3))
    room = np.full((2, 11, 4, 32), np.nan, np.float32)
    out = room[:, :, 1:3, 8:24]
    made = fa.flash_attn_func(q, k, v, out=out)
    assert made is out
    np.testing.assert_array_equal(out, fa.flash_attn_func(*(np.ascontiguousarray(x) for x in (q, k, v))))
    assert np.isnan(room).sum() == room.size - out.size


class Lent:
    """An object that knows only DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_dlpack_objects_with_out_and_without():
    q, k, v = (np.random.default_rng(seed).standard_normal((1, 9, 2, 16), np.float32) for seed in range(3))
    out, plain = np.empty_like(q), fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    made, lse, _ = fa.flash_attn_func(Lent(q), Lent(k), Lent(v), causal=True, return_attn_probs=True, out=out)
    assert made is out
    same((made, lse), plain)
    packed = np.stack([q, k, v], 2)
    same((fa.flash_attn_qkvpacked_func(Lent(packed), causal=True, out=out), lse), plain)
    same(fa.flash_attn_func(Lent(q), Lent(k), Lent(v), causal=True, return_attn_probs=True), plain)
    lent = Lent(np.empty_like(q))
    output = fa.run(fa.Fa2FwdRequest(Lent(q), Lent(k), Lent(v), mask=fa.MaskKind.causal(), out=lent))
    assert output.out is lent
    same((lent.array, output.lse), plain)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_output_has_the_type_of_q(dtype: Any):
    q = np.ones((1, 3, 2, 16), dtype)
    assert fa.flash_attn_func(q, q, q).dtype == dtype


@pytest.mark.torch
class TestTorch:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("head_dim", [16, 13])
    def test_torch_equals_numpy(self, dtype: Any, head_dim: int):
        import torch

        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 12, 2, head_dim, generator=generator).to(getattr(torch, dtype)) for _ in "qkv")
        arrays = [numpy_of(x) for x in (q, k, v)]
        options = {"causal": True, "window_size": (5, 0), "sink_tokens": 2, "return_attn_probs": True}
        out, lse, _ = fa.flash_attn_func(q, k, v, **options)
        assert isinstance(out, torch.Tensor)
        assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
        same((numpy_of(out), lse), fa.flash_attn_func(*arrays, **options))

    def test_packed_torch_calls_equal_plain_ones(self):
        import torch

        q, k, v = torch.randn(3, 2, 12, 2, 16).unbind(0)
        plain = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        same(fa.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True, return_attn_probs=True), plain)
        same(fa.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True, return_attn_probs=True), plain)
        lengths = fa.CumulativeSeqlens.from_lengths([12, 12], like=q)
        assert isinstance(lengths.offsets, torch.Tensor)
        out = fa.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), lengths.offsets, lengths.offsets, 12, 12, causal=True)
        np.testing.assert_array_equal(out, plain[0].flatten(0, 1))

    def test_outputs_keep_the_order_of_dimensions_of_q(self):
        import torch

        q = torch.randn(2, 2, 12, 16).transpose(1, 2)
        out = fa.flash_attn_func(q, q, q)
        assert out.stride() == q.stride() == torch.empty_like(q).stride()

    def test_expanded_inputs_give_an_output_of_its_own(self):
        import torch

        k = torch.randn(1, 12, 1, 16)
        q = k.expand(3, 12, 4, 16)
        out = fa.flash_attn_func(q, q, q)
        assert out.stride(-1) == 1
        np.testing.assert_array_equal(out[2, :, 3], out[0, :, 0])
        assert len({out[b, 0, h].data_ptr() for b in range(3) for h in range(4)}) == 12

    def test_dropout_follows_torch_manual_seed(self):
        import torch

        q = torch.randn(1, 12, 2, 16)
        torch.manual_seed(3)
        first = fa.flash_attn_func(q, q, q, 0.3)
        torch.manual_seed(3)
        assert torch.equal(fa.flash_attn_func(q, q, q, 0.3), first)
        assert not torch.equal(fa.flash_attn_func(q, q, q, 0.3), first)

    def test_out_may_be_of_another_library(self):
        import torch

        q, out = torch.randn(1, 12, 2, 16), np.empty((1, 12, 2, 16), np.float32)
        assert fa.flash_attn_func(q, q, q, out=out) is out
        np.testing.assert_array_equal(out, fa.flash_attn_func(q, q, q))


def numpy_of(tensor: Any) -> np.ndarray:
    import torch

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype is torch.bfloat16 else tensor.numpy()
