"""Every argument that can be wrong: its own error, whose message says what was got and what is allowed, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.env import settings
from atomr_accel_flashattn.problem import ArrayInfo

B, SQ, SK, HQ, HKV, D = 2, 5, 7, 4, 2, 8


def make(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def qkv(**replaced: Any) -> dict[str, Any]:
    arrays = {"q": make(B, SQ, HQ, D), "k": make(B, SK, HKV, D), "v": make(B, SK, HKV, D)}
    return {**arrays, **replaced}


def packed(**replaced: Any) -> dict[str, Any]:
    arrays = {"q": make(SQ, HQ, D), "k": make(SK, HKV, D), "v": make(SK, HKV, D)}
    offsets = {"cu_seqlens_q": np.array([0, 2, SQ], np.int32), "cu_seqlens_k": np.array([0, 3, SK], np.int32)}
    return {**arrays, **offsets, "max_seqlen_q": SQ, "max_seqlen_k": SK, **replaced}


def on_gpu(array: np.ndarray, index: int = 0) -> ArrayInfo:
    """An array that says it is on a GPU; checks never touch its memory."""
    info = read_array(array, "array")
    return ArrayInfo(info.ptr, info.shape, info.strides, info.dtype, info.dtype_name, fa.Device("cuda", index), array)


@dataclass(frozen=True)
class Refusal:
    name: str
    call: Callable[[], Any]
    error: type[Exception]
    got: str
    allowed: str

    def __str__(self) -> str:
        return self.name


def dense(name: str, error: type[Exception], got: str, allowed: str, **replaced: Any) -> Refusal:
    return Refusal(name, lambda: fa.flash_attn_func(**qkv(**replaced)), error, got, allowed)


def varlen(name: str, error: type[Exception], got: str, allowed: str, **replaced: Any) -> Refusal:
    return Refusal(f"varlen_{name}", lambda: fa.flash_attn_varlen_func(**packed(**replaced)), error, got, allowed)


def gpu(name: str, error: type[Exception], got: str, allowed: str, **arrays: Any) -> Refusal:
    return Refusal(f"gpu_{name}", lambda: fa.Fa2FwdRequest(**arrays), error, got, allowed)


HALF = {"dtype": "float16"}
GPU_QKV = {"q": on_gpu(make(1, 2, 2, 8, **HALF)), "k": on_gpu(make(1, 2, 2, 8, **HALF)), "v": on_gpu(make(1, 2, 2, 8, **HALF))}
READ_ONLY = make(B, SQ, HQ, D)
READ_ONLY.flags.writeable = False
SAME = make(B, SQ, HQ, D)
SHIFTED = make(B * SQ + 1, HQ, D)
OVERLAPPING = SHIFTED[1:].reshape(B, SQ, HQ, D)

ARRAYS = [
    dense("no_array", fa.ArrayTypeError, "got builtins.list", "allowed are torch tensors", q=[[1.0]]),
    dense("masked_array", fa.ArrayTypeError, "masked array", "allowed are plain arrays", q=np.ma.masked_array(make(B, SQ, HQ, D))),
    dense("foreign_byte_order", fa.DTypeError, "foreign byte order", "native order", q=make(B, SQ, HQ, D).astype(">f4")),
    dense(
        "strides_between_elements",
        fa.StrideError,
        "in bytes",
        "multiples of the element size 4",
        q=np.zeros((B, SQ, HQ, D), [("a", "f4"), ("b", "i1")])["a"],
    ),
    dense("rank_of_q", fa.ShapeError, "shape (5, 4, 8) of rank 3", "x[None]", q=make(SQ, HQ, D)),
    dense("rank_of_v", fa.ShapeError, "v: got shape (7, 2, 8)", "rank 4", v=make(SK, HKV, D)),
    dense("batch_of_k", fa.ShapeError, "batch 3 with 2 in q", "equal batches", k=make(3, SK, HKV, D)),
    dense("batch_of_v", fa.ShapeError, "v: got batch 1", "equal batches", v=make(1, SK, HKV, D)),
    dense("length_of_v", fa.ShapeError, "length 6 with 7 in k", "equal lengths", v=make(B, 6, HKV, D)),
    dense(
        "length_over_the_limit",
        fa.ShapeError,
        "length 1073741824",
        "at most 1073741823",
        q=np.broadcast_to(make(1, 1, 1, 8), (B, 2**30, 2, 8)),
    ),
    dense("integers", fa.DTypeError, "type int32", "allowed are float16, bfloat16, float32, float64", q=make(B, SQ, HQ, D, dtype="int32")),
    dense("mixed_types", fa.DTypeError, "k: got type float64 with float32 in q", "one type", k=make(B, SK, HKV, D, dtype="float64")),
    dense("no_heads", fa.HeadCountError, "0 query heads and 2 KV heads", "multiple", q=make(B, SQ, 0, D)),
    dense("no_kv_heads", fa.HeadCountError, "0 KV heads", "multiple", k=make(B, SK, 0, D), v=make(B, SK, 0, D)),
    dense("heads_not_divisible", fa.HeadCountError, "4 query heads and 3 KV heads", "multiple", k=make(B, SK, 3, D), v=make(B, SK, 3, D)),
    dense("heads_of_v", fa.HeadCountError, "v: got 4 heads with 2 in k", "equal", v=make(B, SK, 4, D)),
    dense("head_dim_of_k", fa.HeadDimError, "head dim 16 with 8 in q", "equal head dims", k=make(B, SK, HKV, 16)),
    dense("odd_head_dim_of_k", fa.HeadDimError, "head dim 7 with 5 in q", "equal head dims", q=make(B, SQ, HQ, 5), k=make(B, SK, HKV, 7)),
    dense("head_dim_zero", fa.HeadDimError, "head dim 0", "1..256", q=make(B, SQ, HQ, 0), k=make(B, SK, HKV, 0)),
    dense("head_dim_large", fa.HeadDimError, "head dim 257", "1..256", q=make(B, SQ, HQ, 257), k=make(B, SK, HKV, 257)),
    dense("v_head_dim_large", fa.HeadDimError, "v: got head dim 264", "1..256", v=make(B, SK, HKV, 264)),
    Refusal(
        "last_stride",
        lambda: fa.DenseFwdRequest(**qkv(q=make(B, SQ, HQ, 2 * D)[..., ::2])),
        fa.StrideError,
        "q: got strides",
        "last stride of 1",
    ),
    Refusal(
        "packed_rank",
        lambda: fa.flash_attn_qkvpacked_func(make(B, SQ, HQ, D)),
        fa.ShapeError,
        "shape (2, 5, 4, 8)",
        "(batch, length, 3, heads",
    ),
    Refusal(
        "kvpacked_parts",
        lambda: fa.flash_attn_kvpacked_func(make(B, SQ, HQ, D), make(B, SK, 3, HKV, D)),
        fa.ShapeError,
        "(2, 7, 3, 2, 8)",
        "length, 2, heads",
    ),
    Refusal(
        "varlen_packed_parts",
        lambda: fa.flash_attn_varlen_qkvpacked_func(make(SQ, 2, HQ, D), np.array([0, SQ], np.int32), SQ),
        fa.ShapeError,
        "(5, 2, 4, 8)",
        "(total, 3, heads",
    ),
]

ON_GPU = [
    gpu(
        "float32",
        fa.DTypeError,
        "float32 on cuda:0",
        "float16, bfloat16 and fp8",
        q=on_gpu(make(1, 2, 2, 8)),
        k=on_gpu(make(1, 2, 2, 8)),
        v=on_gpu(make(1, 2, 2, 8)),
    ),
    gpu(
        "device_mix",
        fa.DeviceMismatchError,
        "k: got an array on cpu with q on cuda:0",
        "one device",
        **{**GPU_QKV, "k": make(1, 2, 2, 8, **HALF)},
    ),
    gpu(
        "two_gpus",
        fa.DeviceMismatchError,
        "v: got an array on cuda:1 with q on cuda:0",
        "one device",
        **{**GPU_QKV, "v": on_gpu(make(1, 2, 2, 8, **HALF), 1)},
    ),
    gpu(
        "head_dim",
        fa.HeadDimError,
        "head dim 12 on cuda:0",
        "multiples of 8 up to 256",
        **{name: on_gpu(make(1, 2, 2, 12, **HALF)) for name in "qkv"},
    ),
    gpu(
        "head_dim_large",
        fa.HeadDimError,
        "head dim 264 on cuda:0",
        "multiples of 8 up to 256",
        **{name: on_gpu(make(1, 2, 2, 264, **HALF)) for name in "qkv"},
    ),
    gpu(
        "slopes_on_the_host",
        fa.DeviceMismatchError,
        "alibi_slopes: got an array on cpu",
        "one device",
        **GPU_QKV,
        bias=fa.PositionBias.alibi(make(2)),
    ),
    gpu(
        "rng_on_the_host",
        fa.DropoutError,
        "on cpu",
        "on cuda:0",
        **GPU_QKV,
        options=fa.AttentionOptions(dropout_p=0.5, rng=make(2, dtype="int64")),
    ),
    gpu("out_on_the_host", fa.OutputError, "on cpu", "on cuda:0", **GPU_QKV, out=make(1, 2, 2, 8, **HALF)),
    Refusal(
        "gpu_cu_seqlens_on_the_host",
        lambda: fa.VarlenFwdRequest(
            *(on_gpu(make(4, 2, 8, **HALF)) for _ in "qkv"), cu_seqlens_q=fa.CumulativeSeqlens(np.array([0, 4], np.int32))
        ),
        fa.DeviceMismatchError,
        "cu_seqlens_q: got an array on cpu with q on cuda:0",
        "one device",
    ),
    Refusal(
        "gpu_cu_seqlens_without_a_maximum",
        lambda: fa.CumulativeSeqlens(on_gpu(np.array([0, 4], np.int32))),
        fa.CuSeqlensError,
        "got None",
        "None only for offsets in host memory",
    ),
]

NUMBERS = [
    dense("window_not_a_pair", fa.WindowError, "got 4", "(left, right)", window_size=4),
    dense("window_of_floats", fa.WindowError, "(1.5, 0)", "two integers", window_size=(1.5, 0)),
    Refusal("window_zero_causal", lambda: fa.MaskKind.sliding_causal(0), fa.WindowError, "got 0", ">= 1"),
    Refusal("window_zero_full", lambda: fa.MaskKind.sliding_full(0), fa.WindowError, "got 0", ">= 1"),
    Refusal("window_negative_side", lambda: fa.MaskKind(-1, 0), fa.WindowError, "left: got -1", ">= 0"),
    dense("sink_negative", fa.WindowError, "sink_tokens: got -1", ">= 0", sink_tokens=-1, window_size=(1, 1)),
    dense("sink_without_window", fa.SinkWithoutMaskError, "got 4 with a mask that has no left bound", "sliding window", sink_tokens=4),
    dense("sink_with_causal_only", fa.SinkWithoutMaskError, "got 1", "sliding window", sink_tokens=1, causal=True),
    dense("scale_nan", fa.ScaleError, "nan", "finite", softmax_scale=float("nan")),
    dense("scale_infinite", fa.ScaleError, "inf", "finite", softmax_scale=float("inf")),
    dense("scale_beyond_float32", fa.ScaleError, "1e+39", "float32", softmax_scale=1e39),
    dense("scale_text", fa.ScaleError, "'1'", "finite", softmax_scale="1"),
    dense("softcap_nan", fa.SoftcapError, "nan", ">= 0", softcap=float("nan")),
    dense("softcap_infinite", fa.SoftcapError, "inf", ">= 0", softcap=float("inf")),
    dense("softcap_tiny", fa.SoftcapError, "1e-300", "below 3.4e38", softcap=1e-300),
    Refusal("softcap_negative", lambda: fa.AttentionOptions(softcap=-1.0), fa.SoftcapError, "got -1.0", ">= 0"),
    dense("dropout_one", fa.DropoutError, "got 1.0", "0 <= p < 1", dropout_p=1.0),
    dense("dropout_negative", fa.DropoutError, "got -0.1", "0 <= p < 1", dropout_p=-0.1),
    dense("slopes_type", fa.SlopesError, "float64", "float32", alibi_slopes=make(HQ, dtype="float64")),
    dense("slopes_shape", fa.SlopesError, "(3,)", "(4,) or (2, 4)", alibi_slopes=make(3)),
    dense("slopes_stride", fa.SlopesError, "strides (2,)", "last stride of 1", alibi_slopes=make(2 * HQ)[::2]),
    dense("learned_sink_shape", fa.SlopesError, "learned_sink: got shape (2, 4)", "(4,)", learned_sink=make(B, HQ)),
    dense("learned_sink_type", fa.SlopesError, "float16", "float32", learned_sink=make(HQ, dtype="float16")),
    Refusal(
        "rng_shape",
        lambda: fa.Fa2FwdRequest(**qkv(), options=fa.AttentionOptions(dropout_p=0.5, rng=make(3, dtype="int64"))),
        fa.DropoutError,
        "int64 of shape (3,)",
        "shape (2,)",
    ),
    Refusal(
        "request_type",
        lambda: fa.run("q"),
        fa.ArrayTypeError,
        "got str",
        "CachedFwdRequest or ChunkedPrefillRequest",
    ),
    Refusal("request_class", lambda: fa.run(fa.Fa2FwdRequest), fa.ArrayTypeError, "got type", "VarlenFwdRequest"),
    dense("causal_string", fa.UnsupportedArgumentError, "causal: got 'False'", "True and False", causal="False"),
    dense("causal_mask", fa.UnsupportedArgumentError, "causal: got array", "True and False", causal=np.ones((SQ, SK), bool)),
    dense("return_attn_probs_string", fa.UnsupportedArgumentError, "got 'no'", "True and False", return_attn_probs="no"),
    dense("window_right_of_a_causal_call", fa.WindowError, "(3, 'x')", "two integers", causal=True, window_size=(3, "x")),
    dense("scale_beyond_every_float", fa.ScaleError, "got 1000", "finite float32", softmax_scale=10**400),
    dense("softcap_beyond_every_float", fa.SoftcapError, "got 1000", "finite float32", softcap=10**400),
    Refusal("mask_string", lambda: fa.Fa2FwdRequest(**qkv(), mask="causal"), fa.ArrayTypeError, "mask: got str", "MaskKind.causal()"),
    Refusal(
        "mask_not_called", lambda: fa.Fa2FwdRequest(**qkv(), mask=fa.MaskKind.causal), fa.ArrayTypeError, "mask: got method", "a MaskKind"
    ),
    Refusal("bias_array", lambda: fa.Fa2FwdRequest(**qkv(), bias=make(HQ)), fa.ArrayTypeError, "bias: got ndarray", "PositionBias"),
    Refusal("options_dict", lambda: fa.Fa3FwdRequest(**qkv(), options={}), fa.ArrayTypeError, "options: got dict", "AttentionOptions"),
    Refusal("persistent_bool", lambda: fa.Fa3FwdRequest(**qkv(), persistent=True), fa.ScheduleError, "got True", "a PersistentMode"),
    Refusal("persistent_string", lambda: fa.PersistentMode(persistent="yes"), fa.ScheduleError, "'yes'", "True, False"),
]

OUTPUTS = [
    dense("out_shape", fa.OutputError, "(2, 5, 4, 16)", "(2, 5, 4, 8)", out=make(B, SQ, HQ, 16)),
    dense("out_type", fa.OutputError, "float64", "float32", out=make(B, SQ, HQ, D, dtype="float64")),
    dense("out_read_only", fa.OutputError, "read-only", "writeable", out=READ_ONLY),
    dense("out_last_stride", fa.OutputError, "strides", "last stride of 1", out=make(B, SQ, HQ, 2 * D)[..., ::2]),
    dense(
        "out_overlaps_itself",
        fa.OutputError,
        "share memory",
        "an array of its own",
        out=np.lib.stride_tricks.as_strided(make(D), (B, SQ, HQ, D), (0, 0, 0, 4)),
    ),
    dense("out_is_q", fa.OutputError, "memory of q, k or v", "an array of its own", q=SAME, out=SAME),
    dense(
        "out_overlaps_q", fa.OutputError, "memory of q, k or v", "pass a copy", q=SHIFTED[: B * SQ].reshape(B, SQ, HQ, D), out=OVERLAPPING
    ),
    dense("out_of_a_padded_call", fa.OutputError, "(2, 5, 4, 8)", "(2, 5, 4, 7)", v=make(B, SK, HKV, 7), out=make(B, SQ, HQ, D)),
]

PACKED = [
    varlen(
        "start", fa.CuSeqlensError, "cu_seqlens_q: got 1 as its first value", "allowed is 0", cu_seqlens_q=np.array([1, 2, SQ], np.int32)
    ),
    varlen(
        "lengths",
        fa.CuSeqlensError,
        "cu_seqlens_q: got 2 as its first value",
        "allowed is 0; these look like lengths: use torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))",
        cu_seqlens_q=np.array([2, 3], np.int32),
    ),
    varlen(
        "decreasing", fa.CuSeqlensError, "got 6 followed by 5 at index 1", "never decrease", cu_seqlens_q=np.array([0, 6, SQ], np.int32)
    ),
    varlen(
        "end",
        fa.CuSeqlensError,
        "cu_seqlens_k: got 8 as its last value with 7 rows",
        "at most the number of rows",
        cu_seqlens_k=np.array([0, 3, 8], np.int32),
        max_seqlen_k=8,
    ),
    varlen("no_sequences", fa.CuSeqlensError, "no sequences with 5 rows", "one", cu_seqlens_q=make(1, dtype="int32"), max_seqlen_q=0),
    varlen("max_of_a_bool_array", fa.CuSeqlensError, "got array(True)", "an integer", max_seqlen_q=np.array(True)),
    varlen("max_of_a_list", fa.CuSeqlensError, "got [5]", "an integer", max_seqlen_q=[5]),
    varlen("type", fa.DTypeError, "int64", "int32", cu_seqlens_q=np.array([0, 2, SQ])),
    varlen("rank", fa.CuSeqlensError, "shape (1, 3)", "(batch + 1,)", cu_seqlens_q=np.array([[0, 2, SQ]], np.int32)),
    varlen("empty_offsets", fa.CuSeqlensError, "shape (0,)", "(batch + 1,)", cu_seqlens_q=np.array([], np.int32)),
    varlen("strided_offsets", fa.CuSeqlensError, "strides (2,)", "contiguous", cu_seqlens_q=np.array([0, 9, 2, 9, SQ], np.int32)[::2]),
    varlen("batch", fa.CuSeqlensError, "got 1 sequences with 2", "equal numbers of sequences", cu_seqlens_k=np.array([0, SK], np.int32)),
    varlen("max_too_small", fa.CuSeqlensError, "got 2, and a sequence has 3 rows", "at least the longest", max_seqlen_q=2),
    varlen("max_negative", fa.CuSeqlensError, "got -1", "0..1073741823", max_seqlen_q=-1),
    varlen("max_no_integer", fa.CuSeqlensError, "got 5.0", "an integer", max_seqlen_k=5.0),
    varlen("block_table", fa.ShapeError, "k_cache: got shape", "allowed is (blocks", block_table=make(2, 1, dtype="int32")),
    varlen("rows_of_v", fa.ShapeError, "6 rows with 7 in k", "equal numbers of rows", v=make(6, HKV, D)),
    varlen("rank", fa.ShapeError, "rank 4", "rank 3, (total, heads, head dim)", q=make(1, SQ, HQ, D)),
    Refusal("lengths_negative", lambda: fa.CumulativeSeqlens.from_lengths([3, -1]), fa.CuSeqlensError, "[3, -1]", ">= 0"),
    Refusal("lengths_ragged", lambda: fa.CumulativeSeqlens.from_lengths([[1], [2, 3]]), fa.CuSeqlensError, "[[1], [2, 3]]", "flat"),
    Refusal(
        "lengths_beyond_int32", lambda: fa.CumulativeSeqlens.from_lengths([2**30 - 1] * 3), fa.CuSeqlensError, "3221225469", "2147483647"
    ),
    Refusal(
        "lengths_for_no_array",
        lambda: fa.CumulativeSeqlens.from_lengths([1], like="q"),
        fa.ArrayTypeError,
        "got builtins.str",
        "torch tensors",
    ),
    Refusal(
        "no_cumulative_seqlens",
        lambda: fa.VarlenFwdRequest(make(4, 2, 8), make(4, 2, 8), make(4, 2, 8), cu_seqlens_q=np.array([0, 4], np.int32)),
        fa.ArrayTypeError,
        "got ndarray",
        "allowed is a CumulativeSeqlens",
    ),
]


def test_a_negative_start_looks_like_no_length():
    with pytest.raises(fa.CuSeqlensError, match=r"cu_seqlens: got -1 as its first value; allowed is 0$"):
        fa.CumulativeSeqlens(np.array([-1, 2], np.int32))


@pytest.mark.parametrize("refusal", [*ARRAYS, *ON_GPU, *NUMBERS, *OUTPUTS, *PACKED], ids=str)
def test_bad_argument(refusal: Refusal):
    with pytest.raises(refusal.error) as raised:
        refusal.call()
    assert type(raised.value) is refusal.error
    assert refusal.got in str(raised.value)
    assert refusal.allowed in str(raised.value)


def test_an_output_beside_its_inputs_in_one_buffer_is_taken():
    packed = make(B, SQ, 4, HQ, D)
    q, k, v, out = (packed[:, :, part] for part in range(4))
    assert fa.flash_attn_func(q, k, v, out=out) is out


def test_a_refusal_leaves_the_output_alone():
    out = np.full((B, SQ, HQ, D), 7.0, np.float32)
    with pytest.raises(fa.DropoutError):
        fa.flash_attn_func(**qkv(), dropout_p=2.0, out=out)
    with pytest.raises(fa.CuSeqlensError):
        fa.flash_attn_varlen_func(**packed(cu_seqlens_k=np.array([0, 3, 8], np.int32), max_seqlen_k=8), out=out[0])
    assert (out == 7.0).all()


@pytest.mark.parametrize(("backend", "allowed"), [("gpu", "allowed are arrays on the gpu"), ("cpu", "allowed are arrays on the cpu")])
def test_arrays_where_the_backend_setting_does_not_want_them(monkeypatch: pytest.MonkeyPatch, backend: str, allowed: str):
    monkeypatch.setenv("ATOMR_FLASHATTN_BACKEND", backend)
    settings.cache_clear()
    try:
        request = fa.Fa2FwdRequest(**(qkv() if backend == "gpu" else GPU_QKV))
        with pytest.raises(fa.DeviceMismatchError, match=f"ATOMR_FLASHATTN_BACKEND={backend}") as raised:
            fa.run(request)
        assert allowed in str(raised.value)
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_values_on_a_gpu_are_looked_at_only_in_debug(monkeypatch: pytest.MonkeyPatch):
    looked: list[str] = []

    def look(info: ArrayInfo) -> np.ndarray:
        looked.append(info.dtype_name)
        return np.asarray(info.source)

    monkeypatch.setattr("atomr_accel_flashattn.requests.seqlens.copy_to_host", look)
    decreasing = on_gpu(np.array([0, 5, 4], np.int32))
    assert fa.CumulativeSeqlens(decreasing, 5).batch == 2
    assert not looked
    monkeypatch.setenv("ATOMR_FLASHATTN_DEBUG", "1")
    settings.cache_clear()
    try:
        with pytest.raises(fa.CuSeqlensError, match="got 5 followed by 4"):
            fa.CumulativeSeqlens(decreasing, 5)
    finally:
        monkeypatch.undo()
        settings.cache_clear()
    assert looked


@pytest.mark.torch
class TestTorch:
    def tensors(self, **kwargs: Any):
        import torch

        return [torch.zeros(1, 2, 2, 8, **kwargs) for _ in "qkv"]

    def test_a_meta_tensor_has_no_memory(self):
        with pytest.raises(fa.DeviceMismatchError, match="torch tensor on meta; allowed are cpu and cuda"):
            fa.flash_attn_func(*self.tensors(device="meta"))

    def test_a_sparse_tensor_is_refused(self):
        tensors = self.tensors()
        tensors[0] = tensors[0].to_sparse()
        with pytest.raises(fa.ArrayTypeError, match=r"layout torch\.sparse_coo; allowed are plain strided"):
            fa.flash_attn_func(*tensors)

    def test_a_negative_bit_and_nesting_are_named(self):
        import torch

        q, k, v = self.tensors()
        with pytest.raises(fa.ArrayTypeError, match=r"negative bit set; allowed are plain strided tensors; call \.resolve_neg\(\)"):
            fa.flash_attn_func(torch._neg_view(q), k, v)
        with pytest.raises(fa.ArrayTypeError, match=r"nested torch tensor; .* use flash_attn_varlen_func"):
            fa.flash_attn_func(torch.nested.nested_tensor([q[0], q[0]], layout=torch.jagged), k, v)

    def test_a_request_inside_vmap_is_refused(self):
        import torch

        batch = torch.zeros(3, 1, 2, 2, 8)
        with pytest.raises(fa.ArrayTypeError, match="without memory of its own"):
            torch.func.vmap(lambda q: fa.run(fa.DenseFwdRequest(q, q, q)).out)(batch)

    def test_a_scale_in_a_tensor_is_no_number(self):
        import torch

        with pytest.raises(fa.ScaleError, match=r"tensor\(1.\); allowed is a finite"):
            fa.flash_attn_func(*self.tensors(), softmax_scale=torch.tensor(1.0))
