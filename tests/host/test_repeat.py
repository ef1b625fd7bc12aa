"""Functional calls on tensors of a fake GPU: a repeated call is right whatever was called before it, and costs one launch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import (  # noqa: E402 - after the skip
    HealthCheck,
    given,
    settings,
    strategies as st,
)

import atomr_accel_flashattn as fa  # noqa: E402
from atomr_accel_flashattn import env, functional  # noqa: E402
from atomr_accel_flashattn.arrays import torch_hooks  # noqa: E402
from atomr_accel_flashattn.arrays.torch_hooks import hooks, meet_torch  # noqa: E402
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskSpec  # noqa: E402
from atomr_accel_flashattn.kernels.forward import ForwardSpec  # noqa: E402
from atomr_accel_flashattn.runtime import plan as store  # noqa: E402
from atomr_accel_flashattn.torch_ops import repeat  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import FakeCuda, GuardOfFakes, empty_on_current, fake, fresh_hooks  # noqa: E402

from .calls import (  # noqa: E402
    CHANGES as CHANGES_OF_NUMBERS,
    Call,
    host,
)

pytestmark = pytest.mark.torch


@pytest.fixture(params=[fa.SmArch.SM_90, fa.SmArch.SM_90A], ids=["fa2", "fa3"])
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FakeGpu]:
    """Calls take the FA3 family on sm_90a, wherever its tensor copies can read the arrays."""
    card = FakeGpu()
    card.install(monkeypatch, request.param)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    fresh_hooks(monkeypatch)
    repeat.clear()
    meet_torch()
    hooks.plain_types = frozenset({FakeCuda})
    assert hooks.guard is not None
    hooks.guard = GuardOfFakes
    hooks.current_device, hooks.empty_on_current, hooks.device_count = (lambda: 0), empty_on_current, lambda: 2
    yield card
    repeat.clear()


BASE = Call()
# One change each, all of them to things that must not share a plan with the base.
CHANGES: dict[str, dict[str, Any]] = {
    **CHANGES_OF_NUMBERS,
    "head_dim": {"head_dim": 24},
    "v_head_dim": {"v_head_dim": 8},
    "v_head_dim_of_the_same_strides": {"v_head_dim": 8, "pad": 8, "moved": "v"},
    "address": {"offset": 1},
    "address_4": {"offset": 4},
    "strides": {"pad": 8},
    "odd_strides": {"pad": 1},
    "order": {"heads_first": True},
    "scale_negative": {"scale": -0.5},
    "window_other": {"window": (3, 0)},
    "softcap_other": {"softcap": 3.0},
    "lse": {"lse": True},
    "packed": {"packed": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_in_one_thing_has_its_own_shortcut_and_plan(gpu: FakeGpu, change: str):
    """But one that wants an LSE, which is an address and no more."""
    other = replace(BASE, **CHANGES[change])
    BASE.check()
    other.check()
    assert len(repeat.shortcuts) == 2
    assert gpu.repeated == [False, change == "lse"]
    for seed, call in enumerate((BASE, other, BASE, BASE, BASE, other, other, other, BASE)):
        replace(call, seed=seed).check()
    assert len(repeat.shortcuts) == 2
    assert gpu.repeated[2:] == [True] * 9


@pytest.mark.parametrize("change", [{}, {"packed": True}, {"slopes": 1, "learned_sink": True}, {"lse": True}, {"out": True}], ids=str)
def test_a_call_like_the_last_one_builds_no_key(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]):
    for seed in range(2):
        replace(BASE, seed=seed, **change).check()
    monkeypatch.setattr(repeat, "find", None)
    for seed in range(2, 5):
        replace(BASE, seed=seed, **change).check()
    assert gpu.repeated == [False, True, True, True, True]


@pytest.mark.parametrize("change", ["strides_of_k", "address_of_v", "dtype", "seqlen_q", "packed", "lse", "out", "slopes"])
def test_calls_are_right_without_the_private_names_of_torch(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, change: str):
    fresh_hooks(monkeypatch)
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cuda")
    meet_torch()
    hooks.plain_types = frozenset({FakeCuda})
    other = replace(BASE, **CHANGES[change])
    for seed, call in enumerate((BASE, other, BASE, BASE, other, other)):
        replace(call, seed=seed).check()
    assert gpu.repeated == [False, change == "lse", True, True, True, True]


class Blind:
    """A guard that looks at nothing, as one of another torch might."""

    def __init__(self, *tensors: Any, **dims: Any) -> None:
        del tensors, dims

    def check(self, *tensors: Any) -> bool:
        return bool(tensors)


def test_a_guard_is_trusted_only_when_it_tells_apart_what_keys_tell_apart():
    real = torch._C._dynamo.guards.TensorGuards
    assert torch_hooks._trusted(torch, real) is real
    with torch.inference_mode():
        assert torch_hooks._trusted(torch, real) is real
    for other in (None, object, Blind):
        assert torch_hooks._trusted(torch, other) is None


def test_tensors_that_change_in_place_are_read_anew(gpu: FakeGpu):
    q, k, v = qkv()
    for _ in range(3):
        fa.flash_attn_func(q, k, v)
    for tensor in (q, k, v):
        tensor.transpose_(1, 2)  # (2, 4, 5, 16), with the strides of what it was
    out = fa.flash_attn_func(q, k, v)
    assert out.shape == (2, 4, 5, 16)
    assert gpu.repeated == [False, True, True, False]
    np.testing.assert_allclose(host(out), host(fa.flash_attn_func(*(x.as_subclass(torch.Tensor) for x in (q, k, v)))), rtol=1e-2, atol=2e-3)


def test_a_tensor_that_is_q_and_k_and_v_is_answered_from_a_plan(gpu: FakeGpu):
    for seed in range(4):
        q = qkv(seed=seed)[0]
        out = fa.flash_attn_func(q, q, q)
        np.testing.assert_allclose(host(out), host(fa.flash_attn_func(*[q.as_subclass(torch.Tensor)] * 3)), rtol=1e-2, atol=2e-3)
    assert gpu.repeated == [False, True, True, True]


def test_outputs_are_made_on_the_device_of_q_whatever_is_current(gpu: FakeGpu):
    hooks.current_device = lambda: 1
    hooks.empty_on_current = None
    for seed in range(3):
        replace(BASE, seed=seed, lse=True).check()
    assert gpu.repeated == [False, True, True]


def test_with_one_gpu_nobody_asks_which_one_is_current(gpu: FakeGpu):
    hooks.device_count, hooks.current_device = (lambda: 1), None
    for seed in range(3):
        replace(BASE, seed=seed).check()
    assert gpu.repeated == [False, True, True]


calls = st.builds(
    Call,
    seed=st.integers(0, 99),
    batch=st.sampled_from([1, 2]),
    seqlen_q=st.sampled_from([1, 5]),
    seqlen_k=st.sampled_from([1, 5, 9]),
    heads_kv=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 16]),
    v_head_dim=st.sampled_from([8, 16]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    offset=st.sampled_from([0, 0, 1, 8]),
    pad=st.sampled_from([0, 0, 1, 8]),
    heads_first=st.booleans(),
    moved=st.sampled_from(["q", "k", "v", "kv", "qkv"]),
    scale=st.sampled_from([None, 0.25, 1.0, 0.0, -1.0]),
    causal=st.booleans(),
    window=st.sampled_from([(-1, -1), (2, 0), (0, 2), (3, -1)]),
    softcap=st.sampled_from([0.0, -1.0, 2.0, 3.0]),
    slopes=st.sampled_from([0, 0, 1, 2]),
    learned_sink=st.booleans(),
    out=st.booleans(),
    lse=st.booleans(),
    packed=st.booleans(),
    split=st.sampled_from([0, 1, 4]),
)


@given(st.lists(calls, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_calls_is_right_whatever_plans_there_are(gpu: FakeGpu, pool: list[Call], order: list[int]):
    """Plans are kept from example to example, so thousands of pairs of calls meet."""
    for count, which in enumerate(order):
        replace(pool[which % len(pool)], seed=count).check()
    assert all(isinstance(found, repeat.Shortcut) for found in repeat.shortcuts.values())


@pytest.mark.parametrize("sink_tokens", [0, 1, 3])
def test_sink_tokens_are_part_of_the_key(gpu: FakeGpu, sink_tokens: int):
    for count in itertools.chain([0, 1, 3, 1], [sink_tokens]):
        replace(BASE, window=(1, 0), sink_tokens=count, seed=count).check()


def qkv(**kwargs: Any) -> list[FakeCuda]:
    call = replace(BASE, **kwargs)
    return [fake(call.tensor(number, 5, 4, 16)) for number in range(3)]


def test_a_repeated_call_takes_the_addresses_and_the_stream_of_now(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    fa.flash_attn_func(*qkv())
    monkeypatch.setattr(hooks, "raw_stream", lambda index: 1234 + index)
    q, k, v = qkv(seed=5)
    out = fa.flash_attn_func(q, k, v)
    _, params, stream = gpu.launches[-1]
    assert gpu.repeated == [False, True]
    assert stream == 1234
    assert (params.q, params.k, params.v, params.o, params.lse) == (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), None)


@pytest.mark.parametrize("shape", [{"pad": 3}, {"heads_first": True}, {"offset": 1}, {"heads_first": True, "pad": 8}])
def test_inputs_that_are_not_contiguous_are_never_copied(gpu: FakeGpu, shape: dict[str, Any]):
    for seed in range(3):
        q, k, v = qkv(seed=seed, **shape)
        fa.flash_attn_func(q, k, v)
        params = gpu.last
        assert (params.q, params.k, params.v) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
        assert (params.q_stride.batch, params.q_stride.row, params.q_stride.head) == q.stride()[:3]
        packed = fake(torch.randn(2, 5, 3, 4, 16).half())
        fa.flash_attn_qkvpacked_func(packed)
        assert (gpu.last.q, gpu.last.k) == (packed.data_ptr(), packed[:, :, 1].data_ptr())
    assert gpu.repeated == [False, False, True, True, True, True]


def test_broadcast_heads_are_not_copied_and_give_an_output_of_its_own(gpu: FakeGpu):
    for _ in range(2):
        q = fake(torch.randn(1, 5, 1, 16).half()).expand(2, 5, 4, 16)
        out = fa.flash_attn_func(q, q, q)
        assert gpu.last.q == q.data_ptr()
        assert (gpu.last.q_stride.batch, gpu.last.q_stride.head) == (0, 0)
        np.testing.assert_allclose(host(out[1, :, 3]), host(out[0, :, 0]))


def recorded() -> Iterator[list[FakeCuda]]:
    """q, k and v of which one after the other wants gradients, after the call that was recorded."""
    for which in range(3):
        tensors = qkv()
        tensors[which].requires_grad_()
        assert fa.flash_attn_func(*tensors).requires_grad
        yield tensors


def test_gradients_are_recorded_though_there_is_a_shortcut(gpu: FakeGpu):
    assert not fa.flash_attn_func(*qkv()).requires_grad
    for tensors in recorded():
        with torch.no_grad():
            assert not fa.flash_attn_func(*tensors).requires_grad
    assert len(repeat.shortcuts) == 1 + 3, "and one for each set of tensors that want gradients"
    assert gpu.repeated == [False] + [True] * 6, "whether a call is recorded or not, its forward has one plan"


def test_gradients_are_recorded_though_the_last_calls_had_none(gpu: FakeGpu):
    for _ in range(3):
        fa.flash_attn_func(*qkv())
    assert len(list(recorded())) == 3
    with torch.inference_mode():
        fa.flash_attn_func(*qkv())
        fa.flash_attn_func(*qkv())
    assert not fa.flash_attn_func(*qkv()).requires_grad
    assert gpu.repeated == [False] + [True] * 8


def test_gradients_of_a_sink_are_recorded_and_those_of_slopes_refused_though_there_is_a_shortcut(gpu: FakeGpu):
    for name in ("alibi_slopes", "learned_sink"):
        fa.flash_attn_func(*qkv(), **{name: fake(torch.ones(4))})
    assert fa.flash_attn_func(*qkv(), learned_sink=fake(torch.ones(4)).requires_grad_()).requires_grad
    with pytest.raises(fa.FeatureNotBuiltError, match="alibi_slopes requires grad"):
        fa.flash_attn_func(*qkv(), alibi_slopes=fake(torch.ones(4)).requires_grad_())
    assert gpu.repeated == [False, False, True]


def test_an_out_of_a_call_that_wants_gradients_is_refused_though_there_is_a_shortcut(gpu: FakeGpu):
    q, k, v = qkv()
    out = fake(torch.empty_like(q))
    fa.flash_attn_func(q, k, v, out=out)
    for tensors in itertools.product(*((x, x.detach().requires_grad_()) for x in (q, k, v))):
        if any(tensor.requires_grad for tensor in tensors):
            with pytest.raises(fa.OutputError, match="requires grad and gradients are enabled"):
                fa.flash_attn_func(*tensors, out=out)
    assert len(gpu.launches) == 1


def test_an_out_that_is_an_input_is_refused_though_there_is_a_plan(gpu: FakeGpu):
    q, k, v = qkv()
    fa.flash_attn_func(q, k, v, out=fake(torch.empty_like(q)))
    for taken in (q, k, v):
        with pytest.raises(fa.OutputError, match="memory of q, k or v"):
            fa.flash_attn_func(q, k, v, out=taken)


def test_an_out_in_lengths_or_biases_is_refused_though_there_is_a_plan(gpu: FakeGpu):
    q, k, v = (x.reshape(10, 4, 16) for x in qkv())
    ends = [0, 4, 10]
    beside = {"cu_seqlens_q": (torch.int32, ends), "cu_seqlens_k": (torch.int32, ends), "alibi_slopes": (torch.float32, [0.5] * 4)}
    beside["learned_sink"] = (torch.float32, [1.0] * 4)
    asked = {name: fake(torch.tensor(values, dtype=dtype)) for name, (dtype, values) in beside.items()} | {
        "max_seqlen_q": 6,
        "max_seqlen_k": 6,
    }
    fa.flash_attn_varlen_func(q, k, v, **asked, out=fake(torch.empty_like(q)))
    for name, (dtype, values) in beside.items():
        memory = fake(torch.zeros(1280).half())
        inside = memory[632 : 632 + 2 * len(values)].view(dtype)
        inside.copy_(torch.tensor(values, dtype=dtype))
        fa.flash_attn_varlen_func(q, k, v, **asked | {name: inside}, out=fake(torch.empty_like(q)))
        for start in (0, 632):
            with pytest.raises(fa.OutputError, match="out: got memory of lengths, a table"):
                fa.flash_attn_varlen_func(q, k, v, **asked | {name: inside}, out=memory[start : start + 640].view(10, 4, 16))
        apart = fake(torch.empty_like(q))
        assert fa.flash_attn_varlen_func(q, k, v, **asked | {name: inside}, out=apart) is apart
    assert gpu.repeated == [False] + [True] * 8


@pytest.mark.parametrize("shift", [-600, -320, -8, 8, 320, 632])
def test_an_out_that_overlaps_an_input_by_an_element_is_refused_though_there_is_a_plan(gpu: FakeGpu, shift: int):
    for name in range(3):
        tensors = qkv()
        memory = fake(torch.randn(3 * 640).half())
        tensors[name] = memory[640:1280].view(2, 5, 4, 16)
        fa.flash_attn_func(*tensors, out=fake(torch.empty(2, 5, 4, 16).half()))
        with pytest.raises(fa.OutputError, match="memory of q, k or v"):
            fa.flash_attn_func(*tensors, out=memory[640 + shift : 1280 + shift].view(2, 5, 4, 16))


def test_an_out_beside_an_input_in_one_storage_has_a_plan(gpu: FakeGpu):
    q, k, v = qkv()
    memory = fake(torch.randn(3 * 640).half())
    for name in "qkv":
        tensors = {"q": q, "k": k, "v": v} | {name: memory[640:1280].view(2, 5, 4, 16)}
        for start in (0, 1280):
            out = memory[start : start + 640].view(2, 5, 4, 16)
            assert fa.flash_attn_func(**tensors, out=out) is out
    assert gpu.repeated == [False] + [True] * 5


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"alibi_slopes": torch.ones(3)}, fa.SlopesError),
        ({"alibi_slopes": torch.ones(4).double()}, fa.SlopesError),
        ({"alibi_slopes": torch.ones(8)[::2]}, fa.SlopesError),
        ({"window_size": (0.5, 0)}, fa.WindowError),
        ({"softmax_scale": float("nan")}, fa.ScaleError),
    ],
)
def test_a_wrong_call_like_a_right_one_is_still_refused(gpu: FakeGpu, change: dict[str, Any], error: type[Exception]):
    fa.flash_attn_func(*qkv(), alibi_slopes=fake(torch.ones(4)))
    changed = {name: fake(value) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    for _ in range(2):
        with pytest.raises(error):
            fa.flash_attn_func(*qkv(), **changed)


def test_another_device_has_its_own_plan(gpu: FakeGpu):
    for seed in range(2):
        for index in (0, 1):
            tensors = qkv(seed=seed)
            for tensor in tensors:
                tensor.index = index
            fa.flash_attn_func(*tensors)
            assert gpu.launches[-1][2] == STREAM + index
    assert gpu.repeated == [False, False, True, True]


def test_a_key_on_another_device_is_refused_though_there_is_a_plan(gpu: FakeGpu):
    q, k, v = qkv()
    fa.flash_attn_func(q, k, v)
    k.index = 1
    with pytest.raises(fa.DeviceMismatchError, match="k: got an array on cuda:1 with q on cuda:0"):
        fa.flash_attn_func(q, k, v)


def test_dropout_draws_anew_for_every_call(gpu: FakeGpu):
    q, k, v = qkv()
    torch.manual_seed(0)
    first, second = (fa.flash_attn_func(q, k, v, 0.5) for _ in range(2))
    assert gpu.repeated == [False, True]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    np.testing.assert_array_equal(host(fa.flash_attn_func(q, k, v, 0.5)), host(first))
    np.testing.assert_array_equal(host(fa.flash_attn_func(q, k, v, 0.5)), host(second))


def test_a_plan_with_the_dropout_pattern_has_two_launches_and_no_shortcut(gpu: FakeGpu):
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v = qkv(seed=seed)
        _, lse, pattern = fa.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
        assert (lse.shape, pattern.shape, pattern.dtype) == ((2, 4, 5), (2, 4, 5, 5), torch.bool)
        (forward, params, _), (mask, of_mask, _) = gpu.launches[-2:]
        assert isinstance(mask, DropoutMaskSpec)
        assert isinstance(forward, ForwardSpec)
        assert (of_mask.rng, of_mask.keep) == (params.rng, pattern.data_ptr())
        assert (params.lse, of_mask.dropout_threshold) == (lse.data_ptr(), params.dropout_threshold)
    assert gpu.repeated == [False] * 2 + [True] * 4
    (plan,) = store._plans.values()
    assert [each.kernel.spec for each in plan.launches] == [forward, mask]
    assert not repeat.shortcuts


def test_odd_head_dims_are_padded_on_the_gpu_and_leave_no_shortcut(gpu: FakeGpu):
    for _ in range(2):
        q, k, v = (fake(torch.randn(2, 5, 4, 13).half()) for _ in "qkv")
        out = fa.flash_attn_func(q, k, v)
        expected = fa.flash_attn_func(*(x.as_subclass(torch.Tensor) for x in (q, k, v)))
        np.testing.assert_allclose(host(out), host(expected), rtol=1e-2, atol=2e-3)
        assert gpu.last.head_dim == 16
        given = fake(torch.empty(2, 5, 4, 13).half())
        assert fa.flash_attn_func(q, k, v, out=given) is given
        np.testing.assert_array_equal(host(given), host(out))
    assert not repeat.shortcuts


NUMBERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a list": ({"window_size": [3, 0]}, {"window_size": (3, 0)}),
    "int64 in a list": ({"window_size": [np.int64(3), np.int64(0)]}, {"window_size": (3, 0)}),
    "int64": ({"window_size": (np.int64(3), np.int64(0)), "sink_tokens": np.int64(1)}, {"window_size": (3, 0), "sink_tokens": 1}),
    "float64": ({"softmax_scale": np.float64(0.3)}, {"softmax_scale": 0.3}),
    "float32": ({"softcap": np.float32(30)}, {"softcap": 30.0}),
    "bool_": ({"causal": np.True_}, {"causal": True}),
    "a fraction": ({"softmax_scale": Fraction(1, 2)}, {"softmax_scale": 0.5}),
    "an integer": ({"softcap": 5}, {"softcap": 5.0}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_lists_and_numbers_of_other_libraries_get_a_shortcut_and_equal_answers(gpu: FakeGpu, name: str, monkeypatch: pytest.MonkeyPatch):
    odd, plain = NUMBERS[name]
    for seed in range(3):
        q, k, v = qkv(seed=seed)
        out = fa.flash_attn_func(q, k, v, **odd)
        expected = fa.flash_attn_func(*(x.as_subclass(torch.Tensor) for x in (q, k, v)), **plain)
        np.testing.assert_allclose(host(out), host(expected), rtol=1e-2, atol=2e-3)
        np.testing.assert_array_equal(host(out), host(fa.flash_attn_func(q, k, v, **plain)))
    assert gpu.repeated == [False] + [True] * 5, "equal numbers have one plan"
    monkeypatch.setattr(functional, "execute", None)
    for numbers in (odd, plain):
        np.testing.assert_array_equal(host(fa.flash_attn_func(q, k, v, **numbers)), host(out))


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ({"causal": True}, {"causal": 1.0}, fa.UnsupportedArgumentError),
        ({"window_size": (3, 0)}, {"window_size": (3.0, 0)}, fa.WindowError),
        ({"window_size": (3, 1)}, {"window_size": (3, True)}, fa.WindowError),
        ({"window_size": (3, 0), "sink_tokens": 1}, {"window_size": (3, 0), "sink_tokens": True}, fa.WindowError),
        ({"window_size": [3, 0]}, {"window_size": [3.0, 0]}, fa.WindowError),
        ({"softcap": 1.0}, {"softcap": 1.0 + 0j}, fa.SoftcapError),
    ],
    ids=str,
)
def test_numbers_of_a_wrong_type_are_refused_though_equal_ones_have_a_shortcut(
    gpu: FakeGpu, right: dict[str, Any], wrong: dict[str, Any], error: type[Exception]
):
    for _ in range(2):
        fa.flash_attn_func(*qkv(), **right)
        with pytest.raises(error):
            fa.flash_attn_func(*qkv(), **wrong)


def test_lengths_of_numpy_go_by_the_plan(gpu: FakeGpu):
    q, k, v = (fake(torch.randn(10, 4, 16).half()) for _ in "qkv")
    ends = fake(torch.tensor([0, 4, 10], dtype=torch.int32))
    for longest in (np.int64(6), np.int32(6), 6, 6):
        fa.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest)
    assert gpu.repeated == [False, True, True, True]


@pytest.mark.parametrize("number", [torch.tensor(0.3), np.array(0.3)], ids=["tensor", "array"])
def test_arrays_are_no_numbers_and_the_checks_say_so_every_time(gpu: FakeGpu, number: Any):
    for _ in range(2):
        with pytest.raises(fa.ScaleError, match="allowed is a finite float32 number"):
            fa.flash_attn_func(*qkv(), softmax_scale=number)
    assert not repeat.shortcuts


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_what_nobody_expects_of_a_guard_surfaces(gpu: FakeGpu, error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    fa.flash_attn_func(*qkv())
    fa.flash_attn_func(*qkv())

    def fails(*_: Any) -> bool:
        raise error("out of order")

    monkeypatch.setattr(next(iter(repeat.latest.values())), "same", fails)
    with pytest.raises(error, match="out of order"):
        fa.flash_attn_func(*qkv())
    assert len(gpu.launches) == 2


def test_what_nobody_expects_of_a_tensor_surfaces(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    def fails(_tensor: Any) -> Any:
        raise RuntimeError("no strides today")

    tensors = qkv()
    monkeypatch.setattr(FakeCuda, "stride", fails, raising=False)
    with pytest.raises(RuntimeError, match="no strides today"):
        fa.flash_attn_func(*tensors)


def test_what_is_no_tensor_meets_no_guard(gpu: FakeGpu):
    """Calls that differ from the last one in what they pass for tensors are refused by name, though there is a shortcut."""
    q, k, v = qkv()
    packed = [x.reshape(-1, 4, 16) for x in (q, k, v)]
    ends = fake(torch.tensor([0, 4, 10], dtype=torch.int32))
    for _ in range(2):
        fa.flash_attn_func(q, k, v, alibi_slopes=fake(torch.ones(4)))
        fa.flash_attn_varlen_func(*packed, ends, ends, 6, 6)
    for wrong in (None, "k", [1.0], 3):
        with pytest.raises(fa.ArrayTypeError, match="k: got"):
            fa.flash_attn_func(q, wrong, v)
        with pytest.raises(fa.FlashAttnError):
            fa.flash_attn_varlen_func(*packed, wrong, wrong, 6, 6)
    with pytest.raises(fa.ArrayTypeError, match="alibi_slopes: got"):
        fa.flash_attn_func(q, k, v, alibi_slopes=1.0)


def test_debug_makes_no_plan(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATOMR_FLASHATTN_DEBUG", "1")
    env.settings.cache_clear()
    try:
        fa.flash_attn_func(*qkv())
        fa.flash_attn_func(*qkv())
    finally:
        monkeypatch.delenv("ATOMR_FLASHATTN_DEBUG")
        env.settings.cache_clear()
    assert gpu.repeated == [False, False]


def test_an_empty_output_launches_nothing(gpu: FakeGpu):
    q = fake(torch.empty(2, 0, 4, 16).half())
    k = fake(torch.randn(2, 5, 4, 16).half())
    assert fa.flash_attn_func(q, k, k).shape == q.shape
    assert not gpu.launches


def test_no_keys_are_a_launch_like_any_other(gpu: FakeGpu):
    for _ in range(2):
        q, k = fake(torch.randn(2, 5, 4, 16).half()), fake(torch.empty(2, 0, 4, 16).half())
        out, lse, _ = fa.flash_attn_func(q, k, k, return_attn_probs=True)
        assert (out == 0).all()
        assert torch.isneginf(lse).all()
    assert gpu.repeated == [False, True]


def test_the_number_of_shortcuts_is_bounded_and_all_can_be_forgotten(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repeat, "MAX_PLANS", 3)
    for length in range(1, 9):
        replace(BASE, seqlen_q=length).check()
        assert len(repeat.shortcuts) <= 3
    repeat.clear()
    assert not repeat.shortcuts
    assert not repeat.latest
    assert not store._plans
    replace(BASE, seqlen_q=8).check()
    assert gpu.repeated == [False] * 9


def test_a_shortcut_that_was_forgotten_is_made_again_for_the_plan_that_is_there(gpu: FakeGpu):
    BASE.check()
    repeat._forget()
    for seed in range(2):
        replace(BASE, seed=seed).check()
    assert gpu.repeated == [False, True, True]
    assert len(repeat.shortcuts) == 1


def test_functional_calls_and_requests_like_them_share_a_plan(gpu: FakeGpu):
    q, k, v = qkv()
    out = fa.run(fa.DenseFwdRequest(q, k, v)).out
    for _ in range(2):
        np.testing.assert_array_equal(host(fa.flash_attn_func(q, k, v)), host(out))
    fa.run(fa.DenseFwdRequest(q, k, v), lse=False)
    assert gpu.repeated == [False, True, True, True]


def test_threads_share_plans_and_get_their_own_answers(gpu: FakeGpu):
    expected = {seed: replace(BASE, seed=seed, lse=True).run(lambda tensor: tensor)[0] for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(10):
            out = replace(BASE, seed=seed, lse=True).run(fake)[0]
            if not np.allclose(host(out), host(expected[seed]), rtol=1e-2, atol=2e-3):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(gpu.repeated) >= 36


def test_a_stream_that_is_given_is_the_one_launched_on(gpu: FakeGpu):
    class OfTorch:
        cuda_stream = 5

    class OfCuda:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, 6)

    class OfCupy:
        ptr = 7

    request = fa.Fa2FwdRequest(*qkv())
    for stream, raw in ((None, STREAM), (4, 4), (OfTorch(), 5), (OfCuda(), 6), (OfCupy(), 7)):
        fa.run(request, stream=stream)
        assert gpu.launches[-1][2] == raw
    with pytest.raises(fa.ArrayTypeError, match="stream: got str; allowed are a raw CUstream"):
        fa.run(request, stream="main")


def test_borrowed_tiles_reach_the_launch(gpu: FakeGpu):
    fa.run(fa.Fa2FwdRequest(*qkv()), tiles_for=fa.SmArch.SM_86)
    spec = gpu.launches[-1][0]
    assert spec.arch is fa.SmArch.SM_90
    assert spec.tile == fa.lookup(fa.DispatchKey(fa.SmArch.SM_86, fa.DType.F16, 16)).tile


def test_more_blocks_than_a_grid_has_are_refused(gpu: FakeGpu):
    huge = fake(torch.zeros(1, 1, 1, 8).half()).expand(2**18, 2**20, 2, 8)
    request = fa.Fa2FwdRequest(huge, huge, huge)
    object.__setattr__(request, "out_array", request.problem.q)  # shapes alone decide: nothing of this size is made
    with pytest.raises(fa.ShapeError, match="thread blocks; allowed are 2147483647; split the batch"):
        fa.run(request, lse=False)


@pytest.mark.parametrize("which", range(3))
def test_a_tensor_whose_storage_was_freed_is_refused_by_a_repeated_call_too(gpu: FakeGpu, which: int):
    """It keeps its shape; tensor maps would still point to the call before."""
    arrays = qkv()
    fa.flash_attn_func(*arrays)
    fa.flash_attn_func(*arrays)
    launched = len(gpu.launches)
    arrays[which].untyped_storage().resize_(0)
    with pytest.raises(fa.ArrayTypeError, match="without memory"):
        fa.flash_attn_func(*arrays)
    assert len(gpu.launches) == launched


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "learned_sink"])
def test_lengths_and_biases_whose_storage_was_freed_are_refused_by_a_repeated_call_too(gpu: FakeGpu, which: str, recorded: bool):
    """To a kernel, the address 0 is an array that there is not."""
    q, k, v = (x[0] for x in qkv())
    given = {
        "cu_seqlens_q": fake(torch.tensor([0, len(q)], dtype=torch.int32)),
        "cu_seqlens_k": fake(torch.tensor([0, len(k)], dtype=torch.int32)),
        "alibi_slopes": fake(torch.ones(q.shape[1])),
        "learned_sink": fake(torch.zeros(q.shape[1])),
    }
    if recorded:
        q.requires_grad_()
    call = lambda: fa.flash_attn_varlen_func(q, k, v, max_seqlen_q=len(q), max_seqlen_k=len(k), **given)  # noqa: E731
    call()
    assert repeat.shortcuts
    call()
    launched = len(gpu.launches)
    given[which].untyped_storage().resize_(0)
    with pytest.raises(fa.ArrayTypeError, match="without memory"):
        call()
    assert len(gpu.launches) == launched


def test_a_view_of_other_signs_than_its_memory_finds_no_plan(gpu: FakeGpu):
    q, k, v = qkv()
    fa.flash_attn_func(q, k, v)
    fa.flash_attn_func(q, k, v)
    with pytest.raises(fa.ArrayTypeError, match="negative bit"):
        fa.flash_attn_func(fake(torch._neg_view(torch.ones(q.shape, dtype=q.dtype))), k, v)
