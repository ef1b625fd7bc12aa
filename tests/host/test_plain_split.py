"""Few queries on many keys: which calls split plain K and V, and what they launch, on a fake GPU that runs the kernels' own source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.dispatch import key_of_problem  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family, Tile  # noqa: E402
from atomr_accel_flashattn.launch.driver import DeviceProperties  # noqa: E402
from atomr_accel_flashattn.requests.dense import DenseFwdRequest  # noqa: E402
from atomr_accel_flashattn.torch_ops import repeat  # noqa: E402
from tests.emulator.build import compiler  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import fake, let_autograd_keep_the_card, note_requests, take_for_cuda  # noqa: E402

from .calls import Call, host  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")]

FEW = Call(batch=1, seqlen_q=5, seqlen_k=1500, heads=2, heads_kv=1, head_dim=32, v_head_dim=32)
SPLIT = ["fa3_kvcache", "split_combine"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    take_for_cuda(monkeypatch, STREAM)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    card = FakeGpu(DeviceProperties("Fake", (9, 0), 12, 1 << 30))
    card.install(monkeypatch, fa.SmArch.SM_90A)
    monkeypatch.setattr(torch, "empty_strided", empty_on_card)
    return card


def empty_on_card(shape: Any, strides: Any, *, dtype: Any, device: Any = "cpu") -> Any:
    """``torch.empty_strided`` that knows the fake card, with NaN in the memory of parts."""
    made = torch.as_strided(torch.full((max(1, int(np.prod(shape))),), torch.nan, dtype=dtype), shape, strides)
    return fake(made) if str(device).startswith("cuda") else made


def headers(gpu: FakeGpu) -> list[str]:
    return [spec.HEADER for spec, *_ in gpu.launches]


def request_of(call: Call, **options: Any) -> DenseFwdRequest:
    tensors = (
        call.tensor(0, call.seqlen_q, call.heads, call.head_dim),
        *(call.tensor(i, call.seqlen_k, call.heads_kv, width) for i, width in ((1, call.head_dim), (2, call.v_head_dim))),
    )
    return DenseFwdRequest(*map(fake, tensors), **options)


def of_problem(call: Call, **options: Any) -> Any:
    return fa.lookup(key_of_problem(request_of(call).problem, fa.SmArch.SM_90A, **options))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"packed": True, "split": 300},
        {"causal": True, "learned_sink": True, "lse": True},
        {"out": True, "softcap": 5.0},
        {"window": (1300, 2), "sink_tokens": 3, "slopes": 1},
        {"scale": -0.3, "head_dim": 24, "v_head_dim": 16},
        {"heads": 3, "heads_kv": 3, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_calls_and_those_like_them_launch_two_kernels(gpu: FakeGpu, change: dict[str, Any]):
    call = replace(FEW, **change)
    for seed in range(3):
        replace(call, seed=seed).check()
    assert headers(gpu) == SPLIT * 3
    assert gpu.repeated == [False, False, True, True, True, True]
    assert len(repeat.shortcuts) == 1, "the second call made no request"
    assert {spec.split for spec, *_ in gpu.launches[::2]} == {True}


def test_rows_that_no_sequence_owns(gpu: FakeGpu):
    q, k, v = (fake(torch.randn(rows, heads, 32).half()) for rows, heads in ((9, 2), (2000, 1), (2000, 1)))
    ends = [fake(torch.tensor(each, dtype=torch.int32)) for each in ([0, 4, 6], [0, 1500, 2000])]
    for _ in range(2):
        out, lse, _ = fa.flash_attn_varlen_func(q, k, v, *ends, 5, 1500, return_attn_probs=True)
        assert not host(out)[6:].any()
        assert np.isneginf(host(lse)[:, 6:]).all()
        assert np.isfinite(host(lse)[:, :6]).all()
    assert headers(gpu) == SPLIT * 2


def test_gradients_are_those_of_the_split_forward(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    let_autograd_keep_the_card(monkeypatch)
    asked = note_requests(monkeypatch)
    for seed in range(3):
        asked.clear()
        tensors = [torch.randn(1, rows, heads, 32, generator=torch.Generator().manual_seed(10 * seed + i)).half()
                   for i, (rows, heads) in enumerate(((5, 2), (1500, 1), (1500, 1)))]  # fmt: skip
        found = []
        for place in (fake, lambda x: x):
            leaves = [place(x.clone()).requires_grad_() for x in tensors]
            out = fa.flash_attn_func(*leaves, causal=True)
            out.backward(place(torch.ones(1, 5, 2, 32).half()))
            found.append([host(x.grad) for x in leaves])
        for made, right in zip(*found, strict=True):
            np.testing.assert_allclose(made, right, rtol=1e-2, atol=2e-3)
    assert headers(gpu).count("fa3_kvcache") == headers(gpu).count("split_combine") == 3
    assert gpu.repeated[-1]


@pytest.mark.parametrize("packed", [False, True])
def test_operators_of_torch_split_too_and_make_their_parts_anew(gpu: FakeGpu, packed: bool):
    """What a compiled call launches; the third sequence of keys is empty."""
    attention, ends = torch.ops.atomr_accel_flashattn.attention, ([0, 2, 4, 5], [0, 1900, 2000, 2000])
    lengths = [torch.tensor(each, dtype=torch.int32) for each in ends]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(rows, heads, 32, generator=generator).half() for rows, heads in ((5, 2), (2000, 1), (2000, 1)))
        arrays, more = ([q, k, v, *lengths], {"max_seqlen_q": 2, "max_seqlen_k": 1900}) if packed else ([q[None], k[None], v[None]], {})
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
        made, right = (
            attention(**dict(zip(names, map(place, arrays), strict=False)), **more, window_right=0) for place in (fake, lambda x: x)
        )
        for ours, theirs in zip(made[:2], right[:2], strict=True):
            np.testing.assert_allclose(host(ours), host(theirs), rtol=1e-2, atol=2e-3)
    assert headers(gpu) == SPLIT * 3
    assert gpu.repeated == [False, False, True, True, True, True]


def test_a_backward_whose_forward_runs_first_has_no_room_for_parts(gpu: FakeGpu):
    q, k, v = (request_of(FEW).q, request_of(FEW).k, request_of(FEW).v)
    fa.run(fa.DenseBwdRequest(q, k, v, dout=fake(torch.ones(1, 5, 2, 32).half()), recompute=True))
    assert headers(gpu)[0] == "fa3_fwd"


def test_a_workspace_is_told_of_another_stream(gpu: FakeGpu):
    made = fa.run(request_of(FEW), stream=5)
    assert [other for _, other in gpu.workspaces] == [True]
    assert [stream for _, stream in gpu.used_on] == [5]
    np.testing.assert_allclose(host(made.out), host(FEW.run(lambda x: x)[0]), rtol=1e-2, atol=2e-3)
    assert [stream for *_, stream in gpu.launches] == [5, 5]


def test_borrowed_tiles_are_of_a_kernel_that_splits_nothing(gpu: FakeGpu):
    fa.run(request_of(FEW), tiles_for=fa.SmArch.SM_80)
    assert headers(gpu) == ["fa2_fwd"]


@pytest.mark.parametrize(
    ("change", "options", "splits"),
    [
        ({}, {}, True),
        ({}, {"may_split": False}, False),
        ({}, {"family": Family.FA3}, True),
        ({}, {"persistent": True}, False),
        ({}, {"persistent": False}, False),
        ({}, {"tile": Tile(block_m=64, block_n=128, warps=8, stages=2)}, False),
        ({"seqlen_k": 600}, {}, False),
        ({"seqlen_q": 1500}, {}, False),
        ({"seqlen_q": 150}, {}, True),
        ({"batch": 12}, {}, False),
        ({"offset": 1}, {}, False),
    ],
    ids=str,
)
def test_which_calls_are_split(gpu: FakeGpu, change: dict[str, Any], options: dict[str, Any], splits: bool):
    del gpu
    call = replace(FEW, **change)
    spec = of_problem(call, **options)
    assert getattr(spec, "split", False) is splits
    assert getattr(spec, "plain_kv", False) is splits
    header = "fa3_kvcache" if splits else "fa2_fwd" if call.offset else "fa3_fwd"
    assert header == spec.HEADER


def test_neither_dropout_nor_equal_bits_are_split(gpu: FakeGpu):
    del gpu
    for options in (fa.AttentionOptions(dropout_p=0.5), fa.AttentionOptions(batch_invariant=True)):
        assert not request_of(FEW, options=options).dispatch_key().extras.split
    mask = fa.MaskKind.window(200, 0)
    assert not request_of(FEW, mask=mask).dispatch_key().extras.split, "a window hides what there was to share"


def test_the_question_is_of_the_card_of_the_arrays(gpu: FakeGpu):
    request = request_of(FEW)
    assert request.dispatch_key().extras.split
    assert not request.dispatch_key(fa.SmArch.SM_80).extras.split
    gpu.properties = DeviceProperties("Fake", (9, 0), 1, 1 << 30)
    assert not request.dispatch_key().extras.split
