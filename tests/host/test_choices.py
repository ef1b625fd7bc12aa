"""What ``key_of_problem`` chooses is what runs: on a fake GPU, the kernel that ``lookup`` names is the one that is launched."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn import functional  # noqa: E402
from atomr_accel_flashattn.cli.compile_ahead import specs_for  # noqa: E402
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskSpec  # noqa: E402
from atomr_accel_flashattn.kernels.forward import ForwardSpec  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.launch.driver import DeviceProperties  # noqa: E402
from atomr_accel_flashattn.requests.dense import DenseFwdRequest  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import fake  # noqa: E402

from .calls import Call, host  # noqa: E402

pytestmark = pytest.mark.torch

BASE = Call(head_dim=64, v_head_dim=64)
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "many tiles": {"heads": 12, "heads_kv": 12},
    "packed heads, few tiles": {"heads": 8, "heads_kv": 1},
    "packed heads, many tiles": {"heads": 8, "heads_kv": 1, "batch": 4, "seqlen_q": 70},
    "a ratio that is not packed": {"heads": 6, "heads_kv": 2},
    "long": {"batch": 1, "heads": 1, "heads_kv": 1, "seqlen_q": 2100},
    "wide": {"head_dim": 256, "v_head_dim": 256},
    "two widths": {"head_dim": 192, "v_head_dim": 128},
    "padded": {"head_dim": 40, "v_head_dim": 24},
    "odd address": {"offset": 1},
    "odd stride": {"pad": 1},
    "heads first": {"heads_first": True},
    "window": {"window": (3, 0)},
    "causal": {"causal": True},
    "alibi": {"slopes": 1},
    "softcap": {"softcap": 5.0},
    "negative scale": {"scale": -0.5},
    "learned sink": {"learned_sink": True},
    "out": {"out": True},
    "varlen": {"packed": True},
    "varlen, packed heads": {"packed": True, "heads": 8, "heads_kv": 1, "batch": 6},
}

MODES = (fa.PersistentMode.auto(), fa.PersistentMode.Grid(), *map(fa.PersistentMode.Persistent, (None, 1, 7)))


def card(monkeypatch: pytest.MonkeyPatch, arch: fa.SmArch, multiprocessors: int) -> FakeGpu:
    made = FakeGpu(DeviceProperties("Fake", (9, 0), multiprocessors, 1 << 30))
    made.install(monkeypatch, arch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: STREAM, raising=False)
    return made


def request_of(call: Call, kind: Any, dropout: float = 0.0, **more: Any) -> Any:
    q = call.tensor(0, call.seqlen_q, call.heads, call.head_dim)
    k, v = (call.tensor(i, call.seqlen_k, call.heads_kv, width) for i, width in ((1, call.head_dim), (2, call.v_head_dim)))
    out = torch.empty(*q.shape[:-1], call.v_head_dim, dtype=q.dtype) if call.out else None
    slopes = fake(torch.rand(call.heads)) if call.slopes else None
    if call.packed:
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        ends = (fake(torch.tensor([0, call.split, len(x)], dtype=torch.int32)) for x in (q, k))
        more |= {f"cu_seqlens_{name}": fa.CumulativeSeqlens(each, 60) for name, each in zip("qk", ends, strict=True)}
        kind = fa.VarlenFwdRequest
    return kind(
        *map(fake, (q, k, v)),
        mask=fa.MaskKind.causal() if call.causal else fa.MaskKind.window(*call.window),
        bias=fa.PositionBias(slopes),
        options=fa.AttentionOptions(
            softmax_scale=call.scale,
            softcap=call.softcap,
            dropout_p=dropout,
            learned_sink=fake(torch.rand(call.heads)) if call.learned_sink else None,
        ),
        out=None if out is None else fake(out),
        **more,
    )


def check_named(gpu: FakeGpu, request: Any) -> ForwardSpec:
    """That lookup names the kernel of the first run and of the second one; it."""
    named = fa.lookup(request.dispatch_key())
    assert isinstance(named, ForwardSpec)
    for _ in range(2):
        fa.run(request)
        launched = gpu.launches[-1][0]
        assert launched.kernel_name == named.kernel_name
        assert launched == named
    return named


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiprocessors", [3, 132])
@pytest.mark.parametrize("arch", [fa.SmArch.SM_90A, fa.SmArch.SM_90, fa.SmArch.SM_80, fa.SmArch.SM_120], ids=lambda arch: arch.value)
def test_lookup_names_the_kernel_that_runs(monkeypatch: pytest.MonkeyPatch, arch: fa.SmArch, multiprocessors: int, shape: str):
    gpu, call = card(monkeypatch, arch, multiprocessors), replace(BASE, **SHAPES[shape])
    for kind in (DenseFwdRequest, fa.Fa2FwdRequest):
        check_named(gpu, request_of(call, kind))
    check_named(gpu, request_of(call, DenseFwdRequest, dropout=0.5))
    assert not any(spec.persistent for spec, *_ in gpu.launches) or arch is fa.SmArch.SM_90A


@pytest.mark.parametrize(
    "mode", [fa.PersistentMode.auto(), fa.PersistentMode.Grid(), *map(fa.PersistentMode.Persistent, (None, 1, 7))], ids=str
)
@pytest.mark.parametrize("shape", ["small", "many tiles", "packed heads, many tiles", "odd address", "window"])
@pytest.mark.parametrize(("arch", "multiprocessors"), [(fa.SmArch.SM_90A, 3), (fa.SmArch.SM_90A, 132), (fa.SmArch.SM_120, 3)], ids=str)
def test_lookup_names_the_kernel_of_every_schedule(
    monkeypatch: pytest.MonkeyPatch, arch: fa.SmArch, multiprocessors: int, shape: str, mode: fa.PersistentMode
):
    gpu, call = card(monkeypatch, arch, multiprocessors), replace(BASE, **SHAPES[shape])
    request = request_of(call, fa.Fa3FwdRequest, persistent=mode)
    spec = check_named(gpu, request)
    tiles = spec.work_tiles(request.problem)
    chosen = tiles > multiprocessors and spec.family is Family.FA3
    assert spec.persistent == (chosen if mode.persistent is None else mode.persistent)
    if spec.persistent:
        most = mode.blocks or multiprocessors * spec.tile.min_blocks
        assert gpu.grids[-1] == min(tiles, most)
    else:
        assert gpu.grids[-1] == tiles


@pytest.mark.parametrize("shape", SHAPES)
def test_functional_calls_launch_what_their_request_is_said_to_take(monkeypatch: pytest.MonkeyPatch, shape: str):
    gpu, call = card(monkeypatch, fa.SmArch.SM_90A, 3), replace(BASE, **SHAPES[shape])
    for seed in range(2):
        replace(call, seed=seed).check()
    expected = fa.lookup(request_of(call, DenseFwdRequest).dispatch_key())
    if not call.packed:  # the longest length is another there
        assert [spec for spec, *_ in gpu.launches] == [expected] * 2


@pytest.mark.parametrize("multiprocessors", [3, 132])
@pytest.mark.parametrize(
    "shape", ["small", "many tiles", "packed heads, few tiles", "packed heads, many tiles", "long", "heads first", "varlen"]
)
def test_what_calls_launch_is_compiled_ahead_of_time(monkeypatch: pytest.MonkeyPatch, multiprocessors: int, shape: str):
    gpu, call = card(monkeypatch, fa.SmArch.SM_90A, multiprocessors), replace(BASE, **SHAPES[shape])
    fa.run(request_of(call, DenseFwdRequest))
    fa.run(request_of(replace(call, causal=True), DenseFwdRequest))
    ready = specs_for([fa.SmArch.SM_90A], [fa.DType.F16], [64], ["full", "causal"], ["gqa", "varlen"])
    assert {spec for spec, *_ in gpu.launches} <= set(ready)


def test_the_dropout_pattern_is_written_by_the_kernel_that_lookup_names(monkeypatch: pytest.MonkeyPatch):
    for arch, packed in itertools.product((fa.SmArch.SM_90A, fa.SmArch.SM_80), (False, True)):
        gpu, request = card(monkeypatch, arch, 3), request_of(replace(BASE, packed=packed), DenseFwdRequest, dropout=0.5)
        fa.run(request, dropout_mask=True)
        key = fa.DispatchKey(arch, fa.DType.F16, 8, varlen=packed, extras=fa.Extras(direction="dropout_mask"))
        named = fa.lookup(key)
        assert isinstance(named, DropoutMaskSpec)
        assert [spec for spec, *_ in gpu.launches] == [fa.lookup(request.dispatch_key()), named]


def test_what_is_chosen_where_the_multiprocessors_are_not_known(monkeypatch: pytest.MonkeyPatch):
    """On another arch than the card's persistence stays open; on the card it is settled."""
    card(monkeypatch, fa.SmArch.SM_90A, 3)
    request = request_of(BASE, DenseFwdRequest)
    assert request.dispatch_key().extras.persistent is True
    assert request.dispatch_key(fa.SmArch.SM_90A) == request.dispatch_key()
    assert request.dispatch_key(fa.SmArch.SM_80).extras.persistent is None
    on_cpu = DenseFwdRequest(*(x.as_subclass(torch.Tensor) for x in (request.q, request.k, request.v)))
    assert on_cpu.dispatch_key(fa.SmArch.SM_90A).extras.persistent is None
    assert on_cpu.dispatch_key() == fa.DispatchKey(fa.SmArch.CPU, fa.DType.F16, 64, gqa_ratio=2)


def test_all_six_functions_go_by_one_funnel(monkeypatch: pytest.MonkeyPatch):
    gone: list[tuple[Any, ...]] = []
    monkeypatch.setattr(functional, "_attention", lambda *arguments: gone.append(arguments) or "answer")
    numbers = {
        "dropout_p": 0.25,
        "softmax_scale": 0.5,
        "causal": True,
        "window_size": (7, 0),
        "softcap": 3.0,
        "return_attn_probs": True,
        "sink_tokens": 2,
        "deterministic": True,
    }
    others = {"alibi_slopes": "slopes", "learned_sink": "sink", "out": "out"}
    qkv, packed = torch.randn(2, 5, 3, 4, 16), torch.randn(10, 3, 4, 16)
    dense, total = qkv.unbind(2), packed.unbind(1)
    ends, ends_k = torch.tensor([0, 5, 10]), torch.tensor([0, 4, 10])
    calls = [
        (fa.flash_attn_func, dense, ()),
        (fa.flash_attn_kvpacked_func, (dense[0], qkv[:, :, 1:]), ()),
        (fa.flash_attn_qkvpacked_func, (qkv,), ()),
        (fa.flash_attn_varlen_func, total, (ends, ends_k, 5, 6)),
        (fa.flash_attn_varlen_kvpacked_func, (total[0], packed[:, 1:]), (ends, ends_k, 5, 6)),
        (fa.flash_attn_varlen_qkvpacked_func, (packed,), (ends, 5)),
    ]
    for function, arrays, lengths in calls:
        assert function(*arrays, *lengths, **numbers, **others) == "answer"
    assert len(gone) == 6
    for (*arrays, packing, asked, more, deterministic), (_, _, lengths) in zip(gone, calls, strict=True):
        for array, part in zip(arrays, total if lengths else dense, strict=True):
            assert (array.data_ptr(), array.shape, array.stride()) == (part.data_ptr(), part.shape, part.stride())
        whole = lengths if len(lengths) == 4 else (lengths[0], lengths[0], lengths[1], lengths[1]) if lengths else None
        assert packing is None if whole is None else all(map(lambda a, b: a is b, packing, whole))
        assert asked == (0.25, 0.5, True, (7, 0), 3.0, 2, True)
        assert more == ("slopes", "sink", "out")
        assert deterministic is True


def test_packed_forms_are_repeated_as_the_others_are(monkeypatch: pytest.MonkeyPatch):
    gpu = card(monkeypatch, fa.SmArch.SM_90A, 3)
    ends = fake(torch.tensor([0, 4, 10], dtype=torch.int32))
    for _ in range(2):
        qkv, packed = fake(torch.randn(2, 5, 3, 4, 64).half()), fake(torch.randn(10, 3, 4, 64).half())
        out = fa.flash_attn_qkvpacked_func(qkv)
        np.testing.assert_array_equal(host(fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:])), host(out))
        np.testing.assert_array_equal(host(fa.flash_attn_func(*qkv.unbind(2))), host(out))
        out = fa.flash_attn_varlen_qkvpacked_func(packed, ends, 6)
        np.testing.assert_array_equal(host(fa.flash_attn_varlen_kvpacked_func(packed[:, 0], packed[:, 1:], ends, ends, 6, 6)), host(out))
    assert gpu.repeated == [False, True, True, False, True] + [True] * 5
