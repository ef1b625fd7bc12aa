"""Functional calls on fp8: each answers as its request does, in NumPy and torch; what it refuses; and how torch records it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import DType, Fp8Options
from tests.fp8 import DTYPES

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
B, S, H, D = 2, 140, 4, 32
ENDS = np.array([0, 100, 100, 280], np.int32)


def arrays(*shape: int, parts: int = 3, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32).astype(kind) for kind in (E4M3, E4M3, E5M2)[:parts]]


def scales(*shape: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {name: rng.uniform(0.5, 2, shape).astype(np.float32) for name in ("q_descale", "k_descale", "v_descale")}


def dense(out_dtype: DType | None = None, **descales: Any) -> Any:
    q, k, v = arrays(B, S, H, D)
    return fa.run(fa.DenseFwdRequest(q, k, v, mask=fa.MaskKind.causal(), fp8=Fp8Options(**descales, out_dtype=out_dtype))).out


def test_the_dense_call_and_its_packed_forms_answer_as_a_request():
    q, k, v = arrays(B, S, H, D)
    expected = dense(**scales(B, H))
    assert expected.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(fa.flash_attn_func(q, k, v, causal=True, **scales(B, H)), expected)
    kv = np.stack([k, k], axis=2)
    np.testing.assert_array_equal(
        fa.flash_attn_kvpacked_func(q, kv, causal=True, **scales(B, H)), fa.flash_attn_func(q, k, k, causal=True, **scales(B, H))
    )
    qkv = np.stack([q, k, k], axis=2)
    np.testing.assert_array_equal(
        fa.flash_attn_qkvpacked_func(qkv, causal=True, **scales(B, H)), fa.flash_attn_func(q, k, k, causal=True, **scales(B, H))
    )


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16], ids=lambda dtype: dtype.value)
def test_o_has_the_type_of_out(dtype: DType):
    q, k, v = arrays(B, S, H, D)
    out = np.empty((B, S, H, D), DTYPES[dtype])
    assert fa.flash_attn_func(q, k, v, causal=True, out=out, **scales()) is out
    np.testing.assert_array_equal(out, dense(dtype, **scales()))
    fa.flash_attn_func(q, k, v, causal=True, out=out)
    np.testing.assert_array_equal(out, dense(dtype))


def test_packed_sequences_answer_as_a_request_and_count_blocks_inside_each():
    q, k, v = arrays(280, H, D)
    descales = scales(3, H, 2)
    got, lse, _ = fa.flash_attn_varlen_func(q, k, v, ENDS, ENDS, 180, 180, causal=True, return_attn_probs=True, **descales)
    for index, (start, end) in enumerate([(0, 100), (100, 100), (100, 280)]):
        blocks = -(-(end - start) // 128)
        own = {name: each[index : index + 1, :, :blocks] for name, each in descales.items()}
        rows = slice(start, end)
        one, own_lse, _ = fa.flash_attn_func(q[None, rows], k[None, rows], v[None, rows], causal=True, return_attn_probs=True, **own)
        np.testing.assert_array_equal(got[rows], one[0])
        np.testing.assert_array_equal(lse[:, rows], own_lse[0])


def test_packed_sequences_on_pages_take_descales_by_slots():
    q, k, v = arrays(280, H, D)
    table = np.arange(24, dtype=np.int32).reshape(3, 8)[:, ::-1].copy()
    cache = [np.zeros((24, 32, H, D), x.dtype) for x in (k, v)]
    slots = [np.full((24, 32, H), np.nan, np.float32) for _ in range(2)]
    tokens = scales(280, H)
    for index, (start, end) in enumerate([(0, 100), (100, 100), (100, 280)]):
        for n, row in enumerate(range(start, end)):
            for pages, array in zip((*cache, *slots), (k, v, tokens["k_descale"], tokens["v_descale"]), strict=True):
                pages[table[index, n // 32], n % 32] = array[row]
    got = fa.flash_attn_varlen_func(q, *cache, ENDS, ENDS, 180, 180, causal=True, block_table=table, k_descale=slots[0], v_descale=slots[1])
    wide = [x.astype(np.float32) * f[..., None] for x, f in ((k, tokens["k_descale"]), (v, tokens["v_descale"]))]
    expected = fa.flash_attn_varlen_func(q.astype(np.float32), *wide, ENDS, ENDS, 180, 180, causal=True)
    error = np.linalg.norm(got.astype(np.float32) - expected) / np.linalg.norm(expected)
    assert error < 0.06, f"relative error {error}"  # e5m2 probabilities


def test_arrays_with_another_last_stride_are_copied_and_expanded_descales_are_read():
    q, k, v = arrays(B, S, H, D)
    odd = [np.ascontiguousarray(x[..., ::-1])[..., ::-1] for x in (q, k, v)]
    one = np.float32(0.75)
    descales = {name: np.broadcast_to(one, (B, H)) for name in ("q_descale", "k_descale", "v_descale")}
    np.testing.assert_array_equal(fa.flash_attn_func(*odd, causal=True, **descales), dense(**{name: np.asarray(one) for name in descales}))


def test_head_dims_of_fp8_are_not_padded():
    q, k, v = arrays(1, 4, H, 20)
    with pytest.raises(fa.HeadDimError, match="q: got head dim 20 with fp8; allowed are multiples of 16"):
        fa.flash_attn_func(q, k, v)


@pytest.mark.parametrize("call", [fa.flash_attn_func, fa.flash_attn_with_kvcache])
def test_a_descale_of_16_bits_is_refused(call: Any):
    q = np.zeros((1, 4, H, D), np.float16)
    with pytest.raises(fa.DescaleError, match="k_descale: got descales with float16 in k and float16 in v"):
        call(q, q, q, k_descale=scales()["k_descale"])


def test_an_out_of_another_type_is_refused():
    q, k, v = arrays(1, 4, H, D)
    with pytest.raises(fa.OutputError, match="out: got float8_e4m3fn with fp8 in v; allowed are bfloat16, float16, float32"):
        fa.flash_attn_func(q, k, v, out=np.empty_like(q))


def test_dropout_is_refused():
    q, k, v = arrays(1, 4, H, D)
    with pytest.raises(fa.DropoutError, match="with fp8 k and v"):
        fa.flash_attn_func(q, k, v, 0.5)


def tensors(torch: Any, *made: Any) -> list[Any]:
    kinds = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    return [torch.from_numpy(x.view(np.uint8)).view(kinds[x.dtype.name]) if x.dtype.itemsize == 1 else torch.from_numpy(x) for x in made]


def same(tensor: Any, array: Any) -> None:
    np.testing.assert_array_equal(tensor.float().numpy(), array.astype(np.float32))


@pytest.mark.torch
class TestTorch:
    torch = pytest.importorskip("torch")

    def call(self) -> tuple[list[Any], dict[str, Any]]:
        return tensors(self.torch, *arrays(B, S, H, D)), {name: self.torch.from_numpy(x) for name, x in scales(B, H).items()}

    def test_tensors_answer_as_arrays(self):
        (q, k, v), descales = self.call()
        made = fa.flash_attn_func(q, k, v, causal=True, **descales)
        assert made.dtype is self.torch.bfloat16
        same(made, dense(**scales(B, H)))
        same(fa.flash_attn_func(q, k, v, causal=True), dense())

    def test_bytes_are_not_taken_for_fp8(self):
        (q, k, v), descales = self.call()
        with pytest.raises(fa.DTypeError, match=r"q: got type uint8.*float8_e4m3fn, float8_e5m2; view bytes of fp8"):
            fa.flash_attn_func(*(x.view(self.torch.uint8) for x in (q, k, v)), **descales)

    @pytest.mark.parametrize("given", [True, False], ids=["descales", "none"])
    def test_a_compiled_function_breaks_its_graph(self, given: bool):
        (q, k, v), descales = self.call()

        @self.torch.compile(backend="eager")
        def model(q: Any, k: Any, v: Any, descales: dict[str, Any]) -> Any:
            return fa.flash_attn_func(q, k, v, causal=True, **descales) * 2

        expected = dense(**scales(B, H)) if given else dense()
        same(model(q, k, v, descales if given else {}), expected.astype(np.float32) * 2)

    def test_a_whole_graph_is_refused_with_the_reason(self):
        (q, k, v), descales = self.call()
        model = self.torch.compile(fa.flash_attn_func, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="on a KV cache or on fp8 are no operators of torch"):
            model(q, k, v, **descales)

    def test_a_trace_refuses(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        (q, k, v), descales = self.call()
        with pytest.raises(fa.FeatureNotBuiltError, match="'tracing' is not built"):
            make_fx(lambda q, k, v: fa.flash_attn_func(q, k, v, **descales))(q, k, v)

    def test_autocast_leaves_fp8_alone_and_converts_q(self):
        (q, k, v), descales = self.call()
        with self.torch.autocast("cpu", self.torch.bfloat16):
            same(fa.flash_attn_func(q, k, v, causal=True, **descales), dense(**scales(B, H)))
            wide = self.torch.randn(B, S, H, D)
            del descales["q_descale"]
            made = fa.flash_attn_func(wide, k, v, **descales)
        assert made.dtype is self.torch.bfloat16
        assert self.torch.equal(made, fa.flash_attn_func(wide.bfloat16(), k, v, **descales))

    @pytest.mark.parametrize("given", [True, False], ids=["descales", "none"])
    def test_gradients_are_refused_by_name(self, given: bool):
        (_, k, v), descales = self.call()
        q = self.torch.randn(B, S, H, D, dtype=self.torch.bfloat16, requires_grad=True)
        with pytest.raises(fa.FeatureNotBuiltError, match=r"'fp8_backward' is not built.*q requires grad"):
            fa.flash_attn_func(q, k, v, k_descale=descales["k_descale"] if given else None)
        with self.torch.no_grad():
            fa.flash_attn_func(q, k, v, k_descale=descales["k_descale"] if given else None)


def test_an_actor_answers_as_a_call():
    q, k, v = arrays(B, S, H, D)
    request = fa.Fa3FwdFp8Request(q, k, v, mask=fa.MaskKind.causal(), fp8=Fp8Options(**scales(B, H)))
    actor = fa.FlashAttnActor.start(fa.FlashAttnProps())
    try:
        made = actor.ask(fa.FlashAttnMsg.Forward(request)).result(timeout=60)
    finally:
        actor.stop()
    np.testing.assert_array_equal(made.out, dense(**scales(B, H)))


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "fp8.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, scope)  # noqa: S102 - our own page
    assert scope["out"].shape == (1, 1, 32, 64)
