"""Autograd on tensors of a fake GPU: what it records there goes through backward requests, their plans and their kernels."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.arrays import new, streams  # noqa: E402
from atomr_accel_flashattn.arrays.read import read_array  # noqa: E402
from atomr_accel_flashattn.arrays.torch_hooks import meet_torch  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import FakeCuda, fake, fresh_hooks, let_autograd_keep_the_card  # noqa: E402

pytestmark = pytest.mark.torch

THREE = ["bwd_preprocess", "fa2_bwd", "bwd_postprocess"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fresh_hooks(monkeypatch)
    meet_torch()
    let_autograd_keep_the_card(monkeypatch)
    card = FakeGpu()
    card.install(monkeypatch, fa.SmArch.SM_90)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    return card


@dataclass(frozen=True)
class Call:
    """A functional call and a loss of its results."""

    packed: bool = False
    heads_kv: int = 2
    head_dim: int = 16
    learned_sink: bool = False
    lse: bool = False
    heads_first: bool = False
    seed: int = 0

    def leaves(self) -> list[torch.Tensor]:
        torch.manual_seed(self.seed)
        q = torch.randn(2, 5, 4, self.head_dim).half()
        made = [q, *(torch.randn(2, 7, self.heads_kv, self.head_dim).half() for _ in range(2))]
        if self.packed:
            made = [x.flatten(0, 1) for x in made]
        if self.heads_first:
            made = [x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in made]
        return [*made, *([torch.rand(4)] if self.learned_sink else [])]

    def gradients(self, wrap: Any) -> list[torch.Tensor]:
        q, k, v, *sink = leaves = [wrap(x).requires_grad_() for x in self.leaves()]
        options = {"causal": True, "return_attn_probs": self.lse, "learned_sink": sink[0] if sink else None}
        if self.packed:
            ends = [wrap(torch.tensor([0, 3, len(x)], dtype=torch.int32)) for x in (q, k)]
            made = fa.flash_attn_varlen_func(q, k, v, *ends, 10, 14, **options)
        else:
            made = fa.flash_attn_func(q, k, v, **options)
        out, *rest = made if self.lse else (made,)
        loss = out.float().square().sum() + (rest[0].sin().sum() if rest else 0)
        loss.backward()
        return [leaf.grad.as_subclass(torch.Tensor) for leaf in leaves]

    def check(self) -> None:
        for ours, expected in zip(self.gradients(fake), self.gradients(lambda x: x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "call",
    [
        Call(),
        Call(packed=True),
        Call(heads_kv=1),
        Call(head_dim=13),
        Call(learned_sink=True),
        Call(lse=True),
        Call(packed=True, lse=True, learned_sink=True),
        Call(heads_first=True),
    ],
    ids=str,
)
def test_gradients_on_the_card_are_those_of_the_cpu_backend(gpu: FakeGpu, call: Call):
    for _ in range(3):
        call.check()
        assert [spec.HEADER for spec, *_ in gpu.launches[-3:]] == THREE
        assert {launch[2] for launch in gpu.launches} == {STREAM}
    assert gpu.repeated == [False] * 4 + [True] * 8
    assert not any(told for _, told in gpu.workspaces)


def test_dropout_draws_the_pattern_of_the_forward(gpu: FakeGpu):
    q, k, v = (fake(x).requires_grad_() for x in Call().leaves())
    out, _, _ = fa.flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    drawn = gpu.last.rng
    out.float().sum().backward()
    assert {params.fwd.rng for spec, params, _ in gpu.launches if spec.HEADER == "fa2_bwd"} == {drawn}
    assert v.grad.isfinite().all()
    assert v.grad.float().sum() != out.numel(), "some are dropped"


def test_only_the_gradients_that_are_wanted_are_given(gpu: FakeGpu):
    q, k, v = map(fake, Call().leaves())
    k.requires_grad_()
    fa.flash_attn_func(q, k, v).float().sum().backward()
    assert k.grad is not None
    assert (q.grad, v.grad) == (None, None)
    with torch.no_grad():
        assert not fa.flash_attn_func(q, k, v).requires_grad


def test_a_workspace_is_a_tensor_and_torch_is_told_where_it_is_used(monkeypatch: pytest.MonkeyPatch):
    like = read_array(fake(torch.zeros(4).half()), "q")
    for other_stream in (False, True):
        made = new.empty_workspace(like, 6, other_stream=other_stream)
        assert (type(made.source), made.shape, made.dtype_name, made.device) == (FakeCuda, (2,), "float32", fa.Device("cuda", 0))
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream: ("external", stream))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: ("default", 0))
    monkeypatch.setattr(FakeCuda, "record_stream", lambda _, stream: told.append(stream), raising=False)
    for stream in (5, 0):
        streams.used_on(made, stream)
    assert told == [("external", 5), ("default", 0)]


def test_copies_of_a_request_have_its_key_and_their_own_arrays(gpu: FakeGpu):
    q, k, v = map(fake, Call().leaves())
    request = fa.Fa2BwdRequest(q, k, v, dout=torch.ones_like(q), recompute=True)
    alike = copy.copy(request)
    assert alike.plan_key == request.plan_key is not None
    first, again = fa.run(request), fa.run(alike)
    assert gpu.repeated == [False] * 4 + [True] * 4
    assert torch.equal(first.dq, again.dq)
    assert first.dq is not again.dq
