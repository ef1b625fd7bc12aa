"""The same with torch: tensors in host memory and on the fake GPU, data loaders, and what looking at addresses costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.arrays.read import read_array  # noqa: E402
from atomr_accel_flashattn.arrays.torch_hooks import hooks, meet_torch  # noqa: E402
from atomr_accel_flashattn.runtime import staleness  # noqa: E402
from atomr_accel_flashattn.torch_ops import repeat  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import FakeCuda, fake, fresh_hooks  # noqa: E402

from .test_old_addresses import KINDS, WAYS, infos_of, request_of  # noqa: E402

pytestmark = pytest.mark.torch


def of_torch(array: np.ndarray) -> Any:
    return torch.from_numpy(array.copy()).clone()


def on_fake_gpu(array: np.ndarray) -> Any:
    tensor = of_torch(array)
    return fake(tensor.half() if tensor.dtype is torch.float32 and tensor.ndim > 1 else tensor)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "data": lambda x: setattr(x, "data", x.data.clone()),
    "resize_": lambda x: x.resize_(50, *x.shape[1:]),
    "resize_ to less": lambda x: x.resize_(1, *x.shape[1:]),
    "set_": lambda x: x.set_(torch.zeros_like(x)),
    "storage freed": lambda x: x.untyped_storage().resize_(0),
    "storage resized": lambda x: x.untyped_storage().resize_(10 * x.untyped_storage().nbytes()),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fresh_hooks(monkeypatch)
    meet_torch()
    card = FakeGpu()
    card.install(monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    return card


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_a_tensor_in_host_memory_that_moved_is_named(name: str, change: str):
    request = request_of("dense", of_torch)
    fa.run(request)
    CHANGES[change](getattr(request, name))
    with pytest.raises(fa.StaleArrayError, match=f"{name}: its memory changed since the request was made"):
        fa.run(request)


@pytest.mark.parametrize("plain", [False, True], ids=["any class", "plain tensors"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_a_tensor_on_a_gpu_that_moved_is_named_though_there_is_a_plan(gpu: FakeGpu, name: str, change: str, plain: bool):
    if plain:
        hooks.plain_types = frozenset({FakeCuda})
    request = request_of("dense", on_fake_gpu)
    for _ in range(2):
        fa.run(request)
    CHANGES[change](getattr(request, name))
    with pytest.raises(fa.StaleArrayError, match=f"{name}: its memory changed since the request was made"):
        fa.run(request)
    assert gpu.repeated == [False, True]


@pytest.mark.parametrize(
    ("name", "tensor_of"),
    [
        ("alibi_slopes", lambda request: request.bias.slopes),
        ("learned_sink", lambda request: request.options.learned_sink),
        ("cu_seqlens_q", lambda request: request.cu_seqlens_q.offsets),
        ("rng", lambda request: request.problem.dropout.rng.source),
    ],
)
@pytest.mark.parametrize("wrap", [of_torch, on_fake_gpu], ids=["host", "gpu"])
def test_so_are_the_other_tensors(gpu: FakeGpu, name: str, tensor_of: Callable[[Any], Any], wrap: Any):
    if wrap is on_fake_gpu:
        monkey = fa.CumulativeSeqlens  # lengths on a GPU need their maximum
        ends = on_fake_gpu(np.array([0, 4, 9], np.int32))
        q = on_fake_gpu(np.ones((9, 2, 8), np.float32))
        options = fa.AttentionOptions(learned_sink=on_fake_gpu(np.ones(2, np.float32)), dropout_p=0.5, rng=on_fake_gpu(np.array([1, 2])))
        request = fa.VarlenFwdRequest(
            q, q, q, cu_seqlens_q=monkey(ends, 5), bias=fa.PositionBias(on_fake_gpu(np.ones(2, np.float32))), options=options
        )
    else:
        request = request_of("varlen", wrap, dropout_p=0.5)
    fa.run(request)
    CHANGES["data"](tensor_of(request))
    with pytest.raises(fa.StaleArrayError, match=f"{name}: its memory changed"):
        fa.run(request)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_requests_on_tensors(kind: str, way: str):
    request = request_of(kind, of_torch, dropout_p=0.5)
    made = WAYS[way](request)
    for name, info in infos_of(made).items():
        assert info == read_array(info.source, name)
        assert (info.ptr == infos_of(request)[name].ptr) is (way == "copy"), name
    torch.testing.assert_close(fa.run(made).out, fa.run(request).out, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dense", "fa2", "fa3"])
def test_the_copy_of_a_request_has_its_own_key_and_the_plan_of_its_kind(gpu: FakeGpu, kind: str):
    request = request_of(kind, on_fake_gpu)
    made = WAYS["copy"](request)
    assert made.plan_key == request.plan_key
    for each in (request, made):
        fa.run(each)
    assert gpu.repeated == [False, True]


class Requests(torch.utils.data.Dataset):
    """What a worker makes: requests, and lengths."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        q = torch.randn(9, 2, 8, generator=generator)
        lengths = fa.CumulativeSeqlens(torch.tensor([0, 3 + index, 9], dtype=torch.int32))
        return fa.VarlenFwdRequest(q, q, q, cu_seqlens_q=lengths, mask=fa.MaskKind.causal()), lengths


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_data_loader_brings_requests_that_describe_the_arrays_of_here(context: str):
    loader = torch.utils.data.DataLoader(Requests(), batch_size=None, num_workers=1, multiprocessing_context=context)
    for index, (request, lengths) in enumerate(loader):
        expected, of_here = Requests()[index]
        assert request.problem.q == read_array(request.q, "q")
        assert lengths.array == read_array(lengths.offsets, "offsets")
        torch.testing.assert_close(fa.run(request).out, fa.run(expected).out, rtol=0, atol=0)
        assert lengths.batch == of_here.batch


def test_a_functional_call_takes_the_addresses_of_now():
    q = torch.randn(1, 5, 2, 8)
    first = fa.flash_attn_func(q, q, q)
    q.data = torch.randn(1, 7, 2, 8)
    assert fa.flash_attn_func(q, q, q).shape == (1, 7, 2, 8)
    assert first.shape == (1, 5, 2, 8)


def test_looking_at_addresses_makes_two_calls_for_each_tensor(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    """Its cost is that of ``data_ptr`` and ``shape``: no description is made anew, and no other function is asked."""
    hooks.plain_types = frozenset({FakeCuda})
    request = request_of("dense", on_fake_gpu)
    fa.run(request)
    for name in ("_moved", "read_array"):
        monkeypatch.setattr(staleness, name, None)
    fa.run(request)
    repeat.clear()
