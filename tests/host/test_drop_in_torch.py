"""The same with torch, in host memory and on the fake GPU, with and without a shortcut from a call like it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.arrays.torch_hooks import hooks, meet_torch  # noqa: E402
from atomr_accel_flashattn.torch_ops import repeat  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import FakeCuda, fake, fresh_hooks, let_autograd_keep_the_card  # noqa: E402

from .calls import host  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(params=[fa.SmArch.SM_90, fa.SmArch.SM_90A], ids=["fa2", "fa3"])
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeGpu:
    fresh_hooks(monkeypatch)
    card = FakeGpu()
    card.install(monkeypatch, request.param)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    meet_torch()
    hooks.plain_types = frozenset({FakeCuda})
    hooks.guard = None
    return card


def flat(seed: int = 0, rows: int = 18) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, 16, generator=generator).half() for _ in range(3)]


ENDS = torch.tensor([0, 7, 18], dtype=torch.int32)


def check(made: Any, expected: Any) -> None:
    for ours, theirs in zip(made[:2], expected[:2], strict=True):
        np.testing.assert_allclose(host(ours), host(theirs), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_lengths_of_tensors_go_by_the_plan(gpu: FakeGpu, dtype: Any):
    for seed, wrap in enumerate((int, lambda n: torch.tensor(n, dtype=dtype), lambda n: fake(torch.tensor(n, dtype=dtype)))):
        arrays = flat(seed)
        expected = fa.flash_attn_varlen_func(*arrays, ENDS, ENDS, 11, 11, causal=True, return_attn_probs=True)
        for ends, lengths in ((ENDS, (wrap(11), wrap(11))), (ENDS, ((ENDS[1:] - ENDS[:-1]).max(), 11))):
            made = fa.flash_attn_varlen_func(*map(fake, arrays), fake(ends), fake(ends), *lengths, causal=True, return_attn_probs=True)
            check(made, expected)
    assert gpu.repeated == [False] + [True] * 5


@pytest.mark.parametrize("wrong", [torch.tensor(True), torch.tensor(11.0), torch.tensor([11, 11])], ids=repr)
def test_other_tensors_are_no_lengths(gpu: FakeGpu, wrong: Any):
    arrays = flat()
    for seen in range(2):
        for to in (fake, lambda x: x):
            with pytest.raises(fa.CuSeqlensError, match="max_seqlen of cu_seqlens_q: got tensor"):
                fa.flash_attn_varlen_func(*map(to, arrays), to(ENDS), to(ENDS), wrong, 11)
            if not seen:
                fa.flash_attn_varlen_func(*map(to, arrays), to(ENDS), to(ENDS), 11, 11)


WINDOWS = {
    "a tensor": lambda: torch.tensor([3, 1]),
    "a tensor of a GPU": lambda: fake(torch.tensor([3, 1])),
    "of tensors": lambda: (torch.tensor(3), torch.tensor(1)),
    "of both": lambda: [torch.tensor(3), 1],
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_tensors_are_read_by_every_call(gpu: FakeGpu, name: str):
    for seed in range(3):
        q, k, v = (x.view(2, 9, 4, 16) for x in flat(seed))
        expected = fa.flash_attn_func(q, k, v, window_size=(3, 1), return_attn_probs=True)
        check(fa.flash_attn_func(*map(fake, (q, k, v)), window_size=WINDOWS[name](), return_attn_probs=True), expected)
        check(fa.flash_attn_func(q, k, v, window_size=WINDOWS[name](), return_attn_probs=True), expected)
    window = torch.tensor([3, 1])
    for right in (1, 2, 1):
        window[1] = right
        expected = fa.flash_attn_func(q, k, v, window_size=(3, right), return_attn_probs=True)
        check(fa.flash_attn_func(*map(fake, (q, k, v)), window_size=window, return_attn_probs=True), expected)


NO_WINDOWS = [torch.tensor([True, False]), torch.tensor([3.0, 1.0]), torch.tensor(3), (torch.tensor(True), 1)]


@pytest.mark.parametrize("wrong", NO_WINDOWS, ids=repr)
def test_other_tensors_are_no_windows(gpu: FakeGpu, wrong: Any):
    q, k, v = (x.view(2, 9, 4, 16) for x in flat())
    for _ in range(2):
        for to in (fake, lambda x: x):
            with pytest.raises(fa.WindowError, match="window_size: got "):
                fa.flash_attn_func(*map(to, (q, k, v)), window_size=wrong)
            fa.flash_attn_func(*map(to, (q, k, v)), window_size=(3, 1))


def turned(x: Any) -> Any:
    """The same elements with another last stride."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("head_dim", [16, 13])
def test_last_strides_are_copied_by_every_call_and_leave_no_shortcut(gpu: FakeGpu, which: str, head_dim: int):
    for seed in range(3):
        arrays = {name: x.view(2, 9, 4, 16)[..., :head_dim] for name, x in zip("qkv", flat(seed), strict=True)}
        expected = fa.flash_attn_func(**arrays, causal=True, return_attn_probs=True)
        given = {name: turned(x) if name in which else x for name, x in arrays.items()}
        assert all(given[name].stride(-1) != 1 for name in which)
        for to in (fake, lambda x: x):
            made = fa.flash_attn_func(**{name: to(x) for name, x in given.items()}, causal=True, return_attn_probs=True)
            check(made, expected)
            assert made[0].shape == arrays["q"].shape
    assert not repeat.shortcuts
    if head_dim == 16:
        assert gpu.repeated == [False, True, True], "copies of one kind have one plan"
        fa.flash_attn_func(**{name: fake(x) for name, x in arrays.items()}, causal=True, return_attn_probs=True)
        assert gpu.last.q == arrays["q"].data_ptr(), "what needs no copy gets none"


def test_a_copy_that_is_padded_in_channels_last_is_made_row_major():
    q = torch.randn(2, 4, 9, 13).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).permute(0, 2, 1, 3)
    q = q.contiguous(memory_format=torch.channels_last)
    assert q.stride(-1) != 1
    expected = fa.flash_attn_func(*[q.contiguous()] * 3)
    torch.testing.assert_close(fa.flash_attn_func(q, q, q), expected)


@pytest.mark.parametrize("head_dim", [16, 13])
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_gradients_go_through_the_copies(which: str, head_dim: int):
    arrays = [x.view(2, 9, 4, 16)[..., :head_dim].float() for x in flat()]
    gradients = []
    for turn in (False, True):
        leaves = [turned(x) if turn and name in which else x.contiguous() for name, x in zip("qkv", arrays, strict=True)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        fa.flash_attn_func(*leaves, causal=True).square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for ours, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, expected)


def test_tangents_of_copied_inputs_are_refused():
    q = turned(torch.randn(2, 9, 4, 16))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(fa.FeatureNotBuiltError, match="forward_mode"):
            fa.flash_attn_func(q, dual, q)


def test_a_call_on_a_gpu_is_recorded_though_its_inputs_are_copied(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    let_autograd_keep_the_card(monkeypatch)
    for times in range(1, 3):
        arrays = [turned(x.view(2, 9, 4, 16)) for x in flat()]
        fa.flash_attn_func(*map(fake, arrays))
        leaves = [[wrap(x.detach()).requires_grad_() for x in arrays] for wrap in (fake, torch.clone)]
        for q, k, v in leaves:
            fa.flash_attn_func(q, k, v).float().square().sum().backward()
        for ours, expected in zip(*leaves, strict=True):
            torch.testing.assert_close(ours.grad.as_subclass(torch.Tensor), expected.grad, rtol=1e-2, atol=1e-2)
        assert sum(spec.HEADER == "fa2_bwd" for spec, *_ in gpu.launches) == times


def test_a_library_without_gradients_goes_along_with_one_that_has_them():
    class Lent:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __dlpack__(self, **more: Any) -> Any:
            return self.array.__dlpack__(**more)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    kv = torch.randn(2, 9, 2, 4, 16)
    gradients = []
    for each in (kv, Lent(kv)):
        q = torch.ones(2, 9, 4, 16, requires_grad=True)
        fa.flash_attn_kvpacked_func(q, each).square().sum().backward()
        gradients.append(q.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wanting", [0, 1, 2])
def test_pages_have_no_gradients_and_say_so(wanting: int):
    tensors = [torch.ones(3, 4, 16), torch.ones(2, 16, 2, 16), torch.ones(2, 16, 2, 16)]
    tensors[wanting].requires_grad_()
    ends, table = torch.tensor([0, 3], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(fa.FeatureNotBuiltError, match="got a block_table with a tensor that requires grad") as caught:
        fa.flash_attn_varlen_func(*tensors, ends, ends, 3, 3, block_table=table)
    assert caught.value.feature == "paged_backward"
    with torch.no_grad():
        assert fa.flash_attn_varlen_func(*tensors, ends, ends, 3, 3, block_table=table).shape == (3, 4, 16)


@pytest.mark.parametrize("split", [0, 5, 11, 18])
def test_spare_rows_are_part_of_a_plan_like_others(gpu: FakeGpu, split: int):
    """The fake writes what docs/semantics.md wants of kernels; here it is given all rows, and as many blocks as that takes."""
    for seed, end in enumerate((split, 11, 0, 18)):
        arrays = flat(seed)
        ends = torch.tensor([0, min(5, end), end], dtype=torch.int32)
        expected = fa.flash_attn_varlen_func(*arrays, ends, ends, 18, 18, return_attn_probs=True)
        given = [torch.where(torch.arange(18)[:, None, None] < end, x, torch.nan) for x in arrays]
        made = fa.flash_attn_varlen_func(*map(fake, given), fake(ends), fake(ends), 18, 18, return_attn_probs=True)
        check(made, expected)
        assert (made[0][end:] == 0).all()
        assert torch.isneginf(made[1][:, end:]).all()
    assert gpu.repeated == [False, True, True, True]


def test_sequences_of_no_length_are_a_launch_that_fills_all_rows(gpu: FakeGpu):
    ends = fake(torch.zeros(3, dtype=torch.int32))
    for seed in range(2):
        out, lse, _ = fa.flash_attn_varlen_func(*map(fake, flat(seed)), ends, ends, 0, 0, return_attn_probs=True)
        assert (out == 0).all()
        assert torch.isneginf(lse).all()
    assert gpu.repeated == [False, True]


def test_ends_beyond_the_rows_are_refused_in_debug_mode(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    from atomr_accel_flashattn import env
    from atomr_accel_flashattn.requests import seqlens

    monkeypatch.setattr(seqlens, "copy_to_host", lambda info: info.source.as_subclass(torch.Tensor).numpy())
    monkeypatch.setenv("ATOMR_FLASHATTN_DEBUG", "1")
    env.settings.cache_clear()
    ends = fake(torch.tensor([0, 7, 19], dtype=torch.int32))
    try:
        with pytest.raises(fa.CuSeqlensError, match="cu_seqlens_q: got 19 as its last value with 18 rows"):
            fa.flash_attn_varlen_func(*map(fake, flat()), ends, ends, 12, 12)
        early = fake(torch.tensor([0, 7, 17], dtype=torch.int32))
        assert (fa.flash_attn_varlen_func(*map(fake, flat()), early, early, 12, 12)[17:] == 0).all()
    finally:
        monkeypatch.undo()
        env.settings.cache_clear()
