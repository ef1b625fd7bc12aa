"""Backward requests: what they compute, through ``run``, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.dispatch import lookup
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec
from atomr_accel_flashattn.kernels.spec import Family
from atomr_accel_flashattn.problem import ArrayInfo
from atomr_accel_flashattn.types import DType
from tests.case_lists import pairwise_cases
from tests.cases import ALL_DTYPES, Case, build
from tests.check import check_gradients
from tests.fakes.gpu import FakeGpu
from tests.inputs import Inputs, Layout, Poisoned
from tests.oracle import Gradients, Upstream
from tests.upstream import build_upstream


def asked_of(inputs: Inputs) -> dict[str, Any]:
    """The arguments of a request that say what is asked."""
    options = fa.AttentionOptions(
        softmax_scale=inputs.softmax_scale,
        softcap=inputs.softcap,
        learned_sink=inputs.learned_sink,
        dropout_p=inputs.dropout_p,
        rng=inputs.rng,
    )
    asked: dict[str, Any] = {
        "mask": fa.MaskKind(inputs.left, inputs.right),
        "bias": fa.PositionBias(inputs.alibi_slopes),
        "sink_tokens": inputs.sink_tokens,
        "options": options,
    }
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        asked["cu_seqlens_q"] = fa.CumulativeSeqlens(inputs.cu_seqlens_q)
        asked["cu_seqlens_k"] = fa.CumulativeSeqlens(inputs.cu_seqlens_k)
    return asked


def run_requests(inputs: Inputs, upstream: Upstream) -> Gradients:
    """Forward and backward, into arrays of ours."""
    asked, packed = asked_of(inputs), inputs.cu_seqlens_q is not None
    forward: Any = fa.VarlenFwdRequest if packed else fa.Fa2FwdRequest
    backward: Any = fa.VarlenBwdRequest if packed else fa.Fa2BwdRequest
    done = fa.run(forward(inputs.q, inputs.k, inputs.v, **asked))
    made = [Poisoned.empty(array.shape, array.dtype, Layout.ODD) for array in (inputs.q, inputs.k, inputs.v)]
    dq, dk, dv = (each.view for each in made)
    arrays = (inputs.q, inputs.k, inputs.v, done.out, upstream.dout, done.lse)
    gradients = fa.run(backward(*arrays, dlse=upstream.dlse, dq=dq, dk=dk, dv=dv, **asked))
    assert (gradients.dq is dq, gradients.dk is dk, gradients.dv is dv) == (True, True, True)
    for each in made:
        each.check()
    return Gradients(dq, dk, dv, gradients.dsink)


@pytest.mark.parametrize("case", pairwise_cases(ALL_DTYPES)[::4], ids=str)
def test_requests_agree_with_the_oracle(case: Case):
    check_gradients(case, run_requests)


@dataclass(frozen=True)
class Call:
    """Arguments of a small backward call; ``packed`` makes it a varlen one."""

    packed: bool = False

    def arguments(self, **replaced: Any) -> dict[str, Any]:
        inputs = build(Case(dtype=DType.F32, heads=4, seqlen_q=5, seqlen_k=7, head_dim=8, v_head_dim=16, learned_sink=True))
        upstream = build_upstream(Case(dtype=DType.F32, seqlen_q=5), inputs)
        rows = (lambda array: array[0]) if self.packed else (lambda array: array)
        asked = {name: rows(array) for name, array in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))}
        asked["options"] = fa.AttentionOptions(learned_sink=inputs.learned_sink)
        if self.packed:
            asked["cu_seqlens_q"] = fa.CumulativeSeqlens.from_lengths([2, 3])
            asked["cu_seqlens_k"] = fa.CumulativeSeqlens.from_lengths([4, 3])
        done = fa.run(fa.VarlenFwdRequest(**asked) if self.packed else fa.DenseFwdRequest(**asked))
        return {**asked, "out": done.out, "dout": rows(upstream.dout), "lse": done.lse, **replaced}

    def request(self, **replaced: Any) -> Any:
        kind: Any = fa.VarlenBwdRequest if self.packed else fa.DenseBwdRequest
        return kind(**self.arguments(**replaced))

    def run(self, **replaced: Any) -> fa.Gradients:
        return fa.run(self.request(**replaced))


CALLS = pytest.mark.parametrize("call", [Call(), Call(packed=True)], ids=["dense", "packed"])


def same(one: fa.Gradients, other: fa.Gradients) -> None:
    for each in fields(one):
        np.testing.assert_array_equal(getattr(one, each.name), getattr(other, each.name))


@CALLS
def test_new_gradients_are_of_the_library_of_q_and_of_the_shapes_of_what_they_belong_to(call: Call):
    made = call.run()
    arguments = call.arguments()
    for name in "qkv":
        gradient = getattr(made, f"d{name}")
        assert isinstance(gradient, np.ndarray)
        assert (gradient.shape, gradient.dtype) == (arguments[name].shape, np.float32)
    assert (made.dsink.shape, made.dsink.dtype) == ((4,), np.float32)
    assert call.run(options=fa.AttentionOptions(), recompute=True, out=None, lse=None).dsink is None


@CALLS
@pytest.mark.parametrize("deterministic", [False, True])
def test_recompute_and_deterministic_give_the_same(call: Call, deterministic: bool):
    same(call.run(), call.run(recompute=True, out=None, lse=None, deterministic=deterministic))


@CALLS
def test_gradients_of_o_and_of_the_lse_add_up(call: Call):
    dlse = np.random.default_rng(0).standard_normal(call.arguments()["lse"].shape).astype(np.float32)
    both, one, other = call.run(dlse=dlse), call.run(), call.run(dout=None, dlse=dlse)
    for each in fields(both):
        total = getattr(one, each.name) + getattr(other, each.name)
        np.testing.assert_allclose(getattr(both, each.name), total, rtol=1e-4, atol=1e-6)
    assert not other.dv.any()


@CALLS
def test_a_strided_dout_is_read_in_place(call: Call):
    dout = call.arguments()["dout"]
    expected = call.run()
    wide = np.full((*dout.shape[:-1], 40), np.nan, np.float32)
    wide[..., 3:19] = dout
    same(call.run(dout=wide[..., 3:19]), expected)
    turned = np.ascontiguousarray(np.swapaxes(dout, -3, -2))
    same(call.run(dout=np.swapaxes(turned, -3, -2)), expected)
    row = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    expanded = np.broadcast_to(row, dout.shape)
    same(call.run(dout=expanded), call.run(dout=expanded.copy()))
    same(call.run(dout=dout[..., ::-1, :]), call.run(dout=dout[..., ::-1, :].copy()))


def test_requests_are_backward_dispatch_and_nothing_more():
    for call in (Call(), Call(packed=True)):
        request = call.request()
        assert isinstance(request, fa.FaBwdDispatch)
        assert not isinstance(request, fa.FaFwdDispatch)
        key = request.dispatch_key()
        assert (key.extras.direction, key.arch, key.varlen) == ("bwd", fa.SmArch.CPU, call.packed)
        assert lookup(key).kernel_name == "reference_cpu"
    assert issubclass(fa.Fa2BwdRequest, fa.DenseBwdRequest)
    shown = repr(Call().request())
    assert shown.startswith("DenseBwdRequest(q=float32[1, 5, 4, 8]")
    assert "dout=float32[1, 5, 4, 16]" in shown


def on_gpu(array: np.ndarray, offset: int = 0) -> ArrayInfo:
    """An array that says it is on a GPU, at an address with these low bits; checks never touch its memory."""
    room = np.zeros(array.nbytes + 32, np.uint8)
    info = read_array(np.ascontiguousarray(array), "array")
    ptr = room.ctypes.data + -room.ctypes.data % 16 + offset
    return ArrayInfo(ptr, info.shape, info.strides, info.dtype, info.dtype_name, fa.Device("cuda", 0), room)


def arguments_on_gpu() -> dict[str, Any]:
    arrays = Call().arguments(options=None)
    return {name: on_gpu(x if name == "lse" else x.astype(np.float16)) for name, x in arrays.items() if x is not None}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the arrays: how many SMs it has decides whether blocks share keys."""
    FakeGpu().install(monkeypatch)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("arch", [arch for arch in fa.SmArch if arch is not fa.SmArch.CPU])
def test_on_a_gpu_three_kernels_of_the_mma_sync_family_do_it(arch: fa.SmArch):
    key = fa.Fa2BwdRequest(**arguments_on_gpu()).dispatch_key(arch)
    assert (key.extras.direction, key.family.name, key.extras.load_align) == ("bwd", "FA2", 16)
    spec = fa.lookup(key)
    assert isinstance(spec, Fa2BackwardSpec)
    assert [step.HEADER for step in spec.steps()] == ["bwd_preprocess", "fa2_bwd", "bwd_postprocess"]
    assert {step.arch.value.removesuffix("a") for step in spec.steps()} == {arch.value.removesuffix("a")}


@pytest.mark.usefixtures("gpu")
def test_a_family_that_has_no_backward_is_refused_by_name():
    key = fa.Fa2BwdRequest(**arguments_on_gpu()).dispatch_key(fa.SmArch.SM_90A)
    with pytest.raises(fa.FeatureNotBuiltError, match="family ran the forward") as caught:
        fa.lookup(replace(key, extras=replace(key.extras, family=Family.FA3)))
    assert caught.value.feature == "fa3_backward"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("name", "like"), [("q", "q"), ("v", "v"), ("out", "out"), ("dout", "out"), ("dk", "k")])
def test_every_array_counts_for_the_alignment(name: str, like: str):
    odd = on_gpu(Call().arguments()[like].astype(np.float16), offset=2)
    key = fa.Fa2BwdRequest(**{**arguments_on_gpu(), name: odd}).dispatch_key(fa.SmArch.SM_80)
    assert key.extras.load_align == 2


READ_ONLY = np.zeros((1, 5, 4, 8), np.float32)
READ_ONLY.flags.writeable = False
TAKEN = np.zeros((1, 7, 2, 8), np.float32)
LSE = np.zeros((1, 4, 5), np.float32)
TURNED = np.zeros((1, 5, 4), np.float32).swapaxes(1, 2)
DOUT = np.zeros((1, 5, 4, 16), np.float32)
REFUSALS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no out": (fa.ArrayTypeError, "out: got None; allowed is the array that the forward call made, or recompute=True", {"out": None}),
    "no lse": (fa.ArrayTypeError, "lse: got None", {"lse": None}),
    "no dout": (fa.ArrayTypeError, "dout: got None, and no dlse", {"dout": None}),
    "out beside recompute": (fa.UnsupportedArgumentError, "out: got an array with recompute=True", {"recompute": True, "lse": None}),
    "lse beside recompute": (fa.UnsupportedArgumentError, "lse: got an array with recompute=True", {"recompute": True, "out": None}),
    "recompute": (fa.UnsupportedArgumentError, "recompute: got 1; allowed are True and False", {"recompute": 1}),
    "deterministic": (fa.UnsupportedArgumentError, "deterministic: got 'yes'", {"deterministic": "yes"}),
    "shape of out": (fa.ShapeError, r"out: got shape \(1, 5, 4, 8\); allowed is that of o", {"out": np.zeros((1, 5, 4, 8), np.float32)}),
    "shape of dout": (fa.ShapeError, "dout: got shape", {"dout": np.zeros((5, 4, 16), np.float32)}),
    "type of dout": (fa.DTypeError, "dout: got type float64 with float32 in q", {"dout": np.zeros((1, 5, 4, 16))}),
    "list as dout": (fa.ArrayTypeError, "dout: got builtins.list", {"dout": [1.0]}),
    "strides of dout": (fa.StrideError, "dout: got strides", {"dout": np.zeros((1, 5, 4, 32), np.float32)[..., ::2]}),
    "device of dout": (
        fa.DeviceMismatchError,
        "dout: got an array on cuda:0",
        {"dout": on_gpu(DOUT)},
    ),
    "shape of lse": (fa.ShapeError, "lse: got shape", {"lse": LSE[0]}),
    "type of lse": (fa.DTypeError, "lse: got type float64; allowed is float32", {"lse": LSE.astype(np.float64)}),
    "strides of dlse": (
        fa.StrideError,
        "dlse: got strides .* allowed is a row-major",
        {"dlse": TURNED},
    ),
    "device of lse": (fa.DeviceMismatchError, "lse: got an array on cuda:0", {"lse": on_gpu(LSE)}),
    "no seed": (fa.DropoutError, "rng: got None with dropout_p 0.5.*Output.rng", {"options": fa.AttentionOptions(dropout_p=0.5)}),
    "shape of dq": (fa.OutputError, "dq: got float32 of shape", {"dq": np.zeros((1, 5, 4, 16), np.float32)}),
    "type of dv": (fa.OutputError, "dv: got float64", {"dv": np.zeros((1, 7, 2, 16))}),
    "read-only dq": (fa.OutputError, "dq: got a read-only", {"dq": READ_ONLY}),
    "expanded dk": (fa.OutputError, "dk: got strides", {"dk": np.lib.stride_tricks.as_strided(TAKEN, TAKEN.shape, (0, 0, 32, 4))}),
    "dk in k": (fa.OutputError, "dk: got the memory of an input", {"k": TAKEN, "dk": TAKEN}),
    "options": (fa.ArrayTypeError, "options: got str", {"options": "causal"}),
    "q": (fa.ShapeError, "q: got shape", {"q": np.zeros((5, 4, 8), np.float32)}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str):
    error, message, replaced = REFUSALS[name]
    with pytest.raises(error, match=message):
        Call().request(**replaced)


def test_gradients_may_not_lie_in_each_other_nor_in_out_or_dout():
    room = np.zeros((1, 7, 2, 24), np.float32)
    with pytest.raises(fa.OutputError, match="dv: got memory of dk"):
        Call().request(dk=room[..., :8], dv=room[..., 4:20])
    Call().run(dk=room[..., :8], dv=room[..., 8:])
    arguments = Call().arguments(q=np.zeros((1, 5, 4, 16), np.float32), k=np.zeros((1, 7, 2, 16), np.float32))
    for name in ("out", "dout"):
        with pytest.raises(fa.OutputError, match="dq: got the memory of an input"):
            fa.DenseBwdRequest(**{**arguments, "dq": arguments[name]})


@pytest.mark.parametrize("options", [{"lse": False}, {"dropout_mask": True}])
def test_what_only_a_forward_call_has_is_refused(options: dict[str, Any]):
    with pytest.raises(fa.UnsupportedArgumentError, match="with a backward request"):
        fa.run(Call().request(), **options)


@pytest.mark.parametrize("request_", [fa.Fa2BwdRequest, 3])
def test_what_is_no_request_is_named(request_: Any):
    with pytest.raises(fa.ArrayTypeError, match="request: got"):
        fa.run(request_)


def test_the_backend_that_the_environment_wants(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATOMR_FLASHATTN_BACKEND", "gpu")
    fa.settings.cache_clear()
    try:
        with pytest.raises(fa.DeviceMismatchError, match="BACKEND=gpu"):
            Call().run()
    finally:
        monkeypatch.undo()
        fa.settings.cache_clear()


@pytest.mark.torch
class TestTorch:
    def tensors(self) -> dict[str, Any]:
        torch = pytest.importorskip("torch")
        made = {name: torch.from_numpy(array.copy()) for name, array in Call().arguments(options=None).items() if array is not None}
        return {**made, "dlse": torch.zeros_like(made["lse"])}

    def test_gradients_are_tensors(self):
        import torch

        made = fa.run(fa.Fa2BwdRequest(**self.tensors()))
        assert all(isinstance(gradient, torch.Tensor) for gradient in (made.dq, made.dk, made.dv))

    @pytest.mark.parametrize("name", ["q", "v", "out", "dout", "lse", "dlse"])
    def test_second_derivatives_are_refused_by_name(self, name: str):
        import torch

        tensors = self.tensors()
        tensors[name].requires_grad_()
        with pytest.raises(fa.FeatureNotBuiltError, match=f"{name} requires grad") as caught:
            fa.Fa2BwdRequest(**tensors)
        assert caught.value.feature == "double_backward"
        with torch.no_grad():
            fa.run(fa.Fa2BwdRequest(**tensors))

    @pytest.mark.parametrize("name", ["k", "dout", "lse"])
    def test_tangents_are_refused_by_name(self, name: str):
        import torch

        tensors = self.tensors()
        with torch.autograd.forward_ad.dual_level():
            tensors[name] = torch.autograd.forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
            with pytest.raises(fa.FeatureNotBuiltError, match=f"{name} is a dual tensor"):
                fa.Fa2BwdRequest(**tensors)

    def test_a_gradient_that_was_written_says_so_to_autograd(self):
        import torch

        tensors, leaf = self.tensors(), torch.ones(1, 5, 4, 8, requires_grad=True)
        dq = torch.ones(1, 5, 4, 8)
        product = (leaf * dq).sum()
        assert fa.run(fa.Fa2BwdRequest(**tensors, dq=dq)).dq is dq
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
