"""Calls that autograd records, again: on a fake GPU, with the numbers of the first time, and without a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.torch_ops import attention_function, first_call, kernels, repeat, repeat_recorded  # noqa: E402
from atomr_accel_flashattn.torch_ops.operators import Operands  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import FakeCuda, fake, let_autograd_keep_the_card, note_requests, take_for_cuda  # noqa: E402

pytestmark = pytest.mark.torch

Made = tuple[Any, ...]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    take_for_cuda(monkeypatch, STREAM)
    let_autograd_keep_the_card(monkeypatch)
    card = FakeGpu()
    card.install(monkeypatch, fa.SmArch.SM_90)
    return card


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_requests(monkeypatch)


def leaves(seed: int = 0, *, packed: bool = False, wanting: tuple[bool, ...] = (True, True, True), width: int = 16) -> list[Any]:
    torch.manual_seed(seed)
    made = [torch.randn(2, 6, heads, width).half() for heads in (4, 2, 2)]
    made = [x.flatten(0, 1) for x in made] if packed else made
    return [fake(x).requires_grad_(want) for x, want in zip(made, wanting, strict=True)]


def host(tensors: list[Any]) -> list[Any]:
    return [x.detach().as_subclass(torch.Tensor).requires_grad_(x.requires_grad) for x in tensors]


def dense(tensors: list[Any], **options: Any) -> Made:
    return fa.flash_attn_func(*tensors, causal=True, return_attn_probs=True, **options)


def packed(tensors: list[Any], **options: Any) -> Made:
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    ends = fake(ends) if isinstance(tensors[0], FakeCuda) else ends
    return fa.flash_attn_varlen_func(*tensors, ends, ends, 7, 7, causal=True, return_attn_probs=True, **options)


def grad(made: Made, tensors: list[Any], dout: Any, dlse: Any) -> list[Any]:
    """Gradients of the tensors that want one; None in place of dO or dLSE is zero."""
    pairs = [(x, dx) for x, dx in zip(made, (dout, dlse), strict=False) if dx is not None]
    outputs, gradients = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, [x for x in tensors if x.requires_grad], gradients)
    return [x.as_subclass(torch.Tensor) for x in found]


def check(call: Callable[..., Made], tensors: list[Any], dout: Any, dlse: Any, **options: Any) -> None:
    """On the fake card, against the CPU backend."""
    others = host(tensors)
    wanted = grad(call(others, **options), others, dout, dlse)
    on_card = [None if x is None else fake(x) for x in (dout, dlse)]
    for made, right in zip(grad(call(tensors, **options), tensors, *on_card), wanted, strict=True):
        torch.testing.assert_close(made, right, rtol=1e-2, atol=1e-2)


def upstream(seed: int = 1, *, lse: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    return torch.randn(2, 6, 4, 16).half(), torch.randn(2, 4, 6) if lse else None


BOTH = ["forward", "backward", "forward"]  # a backward request makes one of its forward. The call on the CPU does so every time
REQUESTS_OF_STEP = {0: BOTH, 1: BOTH[1:]}  # the first call leaves a shortcut, the first backward of a repeated one a plan


@pytest.mark.parametrize("wanting", [(True, True, True), (True, False, False), (False, True, False), (False, True, True)], ids=str)
def test_the_third_step_makes_no_request(gpu: FakeGpu, asked: list[str], wanting: tuple[bool, ...]):
    for step in range(4):
        asked.clear()
        check(dense, leaves(step, wanting=wanting), *upstream(step))
        assert sorted(asked) == sorted([*BOTH, *REQUESTS_OF_STEP.get(step, [])])
    assert gpu.repeated == [False] * 4 + [True] * 12


def test_packed_sequences_sinks_and_slopes(gpu: FakeGpu, asked: list[str]):
    for step in range(3):
        asked.clear()
        tensors, (dout, dlse) = leaves(step, packed=True), upstream(step)
        slopes = torch.rand(4)
        sink = torch.rand(4)
        made = {}
        for place in (fake, lambda x: x.as_subclass(torch.Tensor)):
            q, k, v = (place(x.detach()).requires_grad_() for x in tensors)
            learned = place(sink.clone()).requires_grad_()
            out, lse, _ = packed([q, k, v], alibi_slopes=place(slopes), learned_sink=learned)
            gradients = (place(dout.flatten(0, 1)), place(dlse.transpose(0, 1).flatten(1).contiguous()))
            made[place] = torch.autograd.grad((out, lse), (q, k, v, learned), gradients)
        for one, other in zip(*made.values(), strict=True):
            torch.testing.assert_close(one.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor), rtol=1e-2, atol=1e-2)
        assert sorted(asked) == sorted([*BOTH, *REQUESTS_OF_STEP.get(step, [])])
    assert len(gpu.launches) == 12


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "learned_sink"])
def test_lengths_and_biases_freed_before_a_repeated_backward_are_refused(gpu: FakeGpu, which: str):
    """To a kernel, the address 0 is an array that there is not."""
    q, k, v = leaves(packed=True)
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32)
    given = {
        "cu_seqlens_q": fake(lengths.clone()),
        "cu_seqlens_k": fake(lengths),
        "alibi_slopes": fake(torch.rand(4)),
        "learned_sink": fake(torch.rand(4)),
    }
    outs = [fa.flash_attn_varlen_func(q, k, v, max_seqlen_q=7, max_seqlen_k=7, **given) for _ in range(4)]
    for out in outs[:3]:
        out.backward(fake(torch.ones(12, 4, 16).half()))
    launched = len(gpu.launches)
    given[which].untyped_storage().resize_(0)
    with pytest.raises((fa.ArrayTypeError, fa.StaleArrayError)):
        outs[3].backward(fake(torch.ones(12, 4, 16).half()))
    assert len(gpu.launches) == launched


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_freed_before_a_repeated_backward_is_refused(gpu: FakeGpu, which: int):
    """To a kernel, the address 0 is a gradient of zeros."""
    for step in range(4):
        tensors, given = leaves(step), [fake(x) for x in upstream(step)]
        made, launched = dense(tensors), len(gpu.launches)
        if step < 3:
            grad(made, tensors, *given)
            continue
        given[which].untyped_storage().resize_(0)
        with pytest.raises((fa.ArrayTypeError, fa.StaleArrayError)):
            grad(made, tensors, *given)
        assert len(gpu.launches) == launched


def test_dropout_has_a_seed_of_its_own_each_time_and_the_backward_that_of_its_forward(gpu: FakeGpu):
    seen, (q, k, v) = [], leaves(1)
    for _ in range(3):
        out, *_ = (fa.flash_attn_func(q, k, v, 0.5, return_attn_probs=False),)
        (dv,) = torch.autograd.grad(out, [v], fake(torch.ones(2, 6, 4, 16).half()))
        forward, *backward = gpu.launches[-4:]
        drawn = forward[1].rng
        assert {params.fwd.rng for spec, params, _ in backward} == {drawn}
        seen.append(dv.as_subclass(torch.Tensor))
    assert not torch.equal(seen[1], seen[2])


def douts() -> dict[str, Any]:
    """Gradients of o in layouts that a plan has to tell apart."""
    dout = upstream()[0]
    wide, odd = torch.zeros(2, 6, 4, 24).half(), torch.zeros(dout.numel() + 1).half()
    wide[..., :16], odd[1:] = dout, dout.flatten()
    return {
        "row-major": dout,
        "transposed": dout.transpose(1, 2).contiguous().transpose(1, 2),
        "in a wider one": wide[..., :16],
        "odd address": odd[1:].view(dout.shape),
        "columns first": dout.transpose(1, 3).contiguous().transpose(1, 3),
        "expanded": dout[:, :1].expand(dout.shape),
    }


def test_layouts_of_dout_have_plans_of_their_own(gpu: FakeGpu):
    for _ in range(2):
        for dout in douts().values():
            check(dense, leaves(2), dout, None)
            check(dense, leaves(2), dout, upstream()[1])
    check(dense, leaves(2), None, upstream()[1])
    aligned = {spec.aligned for spec, *_ in gpu.launches if spec.HEADER == "fa2_bwd"}
    assert aligned == {True, False}


def test_plans_of_a_backward_are_bounded(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repeat_recorded, "_MOST_PLANS", 2)
    for _ in range(2):
        for dout in douts().values():
            check(dense, leaves(2), dout, None)
    (shortcut,) = repeat.shortcuts.values()
    assert len(shortcut.recorded.args[0].plans) <= 2
    assert gpu.launches


def test_what_a_key_has_to_tell_apart(gpu: FakeGpu):
    tensors, dout = leaves(3), upstream()[0]
    calls: list[dict[str, Any]] = [{}, {"softmax_scale": 0.3}, {"softcap": 2.0}, {"window_size": (2, 0)}, {"sink_tokens": 0}]
    for _ in range(2):
        for options in calls:
            check(dense, tensors, dout, None, **options)
    wider = [fake(torch.randn(2, 6, heads, 24).half()[..., :16]).requires_grad_() for heads in (4, 2, 2)]
    for _ in range(2):
        check(dense, wider, dout, None)
        check(dense, tensors, dout, None)
    assert gpu.launches


def test_grad_mode_is_looked_at_by_every_call(gpu: FakeGpu):
    tensors = leaves(4)
    for _ in range(3):
        assert dense(tensors)[0].requires_grad
        with torch.no_grad():
            assert not dense(tensors)[0].requires_grad
        with torch.inference_mode():
            assert not dense(tensors)[0].requires_grad
    for x in tensors:
        x.requires_grad_(requires_grad=False)
    assert not dense(tensors)[0].requires_grad
    assert {stream for *_, stream in gpu.launches} == {STREAM}


def test_tensors_that_hooks_brought_back_go_by_a_request(gpu: FakeGpu, asked: list[str]):
    dout = fake(upstream()[0])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: fake(x.clone()), lambda x: x):
        for step in range(3):
            asked.clear()
            tensors = leaves(5)
            made = grad(dense(tensors), tensors, dout, None)
            assert asked == (BOTH[1:] if step else BOTH)
    tensors = leaves(5)
    for one, other in zip(made, grad(dense(tensors), tensors, dout, None), strict=True):
        torch.testing.assert_close(one, other)
    assert gpu.launches


def test_tensors_that_came_back_row_major_to_where_they_lay_go_by_a_request(gpu: FakeGpu, asked: list[str]):
    """As those of ``save_on_cpu``, which find their memory free."""

    def restored(saved: tuple[Any, Any]) -> Any:
        before, values = saved
        room = before.as_subclass(torch.Tensor).as_strided(values.shape, values.stride())
        return fake(room.copy_(values))

    def transposed() -> list[Any]:
        return [fake(x.detach().transpose(1, 2).contiguous().transpose(1, 2)).requires_grad_() for x in host(leaves(5))]

    dout = fake(upstream()[0])
    tensors = transposed()
    right = grad(dense(tensors), tensors, dout, None)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (x, x.contiguous().clone().as_subclass(torch.Tensor)), restored):
        for step in range(4):
            asked.clear()
            tensors = transposed()
            for one, other in zip(grad(dense(tensors), tensors, dout, None), right, strict=True):
                torch.testing.assert_close(one, other)
            assert asked == BOTH[1:], f"step {step}"
    assert gpu.launches


def test_slopes_that_came_back_row_major_go_by_a_request(gpu: FakeGpu):
    def restored(saved: tuple[Any, Any]) -> Any:
        before, values = saved
        return before if values.ndim != 2 else fake(values)

    dout, wide = fake(upstream()[0]), torch.rand(2, 12)
    slopes = {"alibi_slopes": fake(wide)[:, :4]}
    for _ in range(2):
        tensors = leaves(5)
        right = grad(dense(tensors, **slopes), tensors, dout, None)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (x, x.contiguous().clone().as_subclass(torch.Tensor)), restored):
        tensors = leaves(5)
        for one, other in zip(grad(dense(tensors, **slopes), tensors, dout, None), right, strict=True):
            torch.testing.assert_close(one, other)
    assert gpu.launches


def test_a_transform_of_torch_takes_no_recorded_shortcut(gpu: FakeGpu):
    """Of tensors from outside, whose history the operator records at their level."""
    tensors, dout = leaves(6), upstream()[0]
    for _ in range(2):
        out = dense(tensors)[0]

    def loss(weight: Any) -> Any:
        made = dense(tensors)[0].as_subclass(torch.Tensor)
        return (made * weight).sum(), made

    weights, made = torch.func.grad(loss, has_aux=True)(dout)
    torch.testing.assert_close(weights, out.detach().as_subclass(torch.Tensor), rtol=1e-2, atol=1e-2)
    assert made.requires_grad
    assert gpu.launches


@pytest.mark.parametrize("call", [dense, packed])
def test_a_backward_that_is_watched_goes_by_the_operator(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Made]):
    """And not by the plan that there is, which no dispatch mode and no transform sees."""
    calls: list[Any] = []

    def operator(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        numbers = {**Operands._field_defaults, **options}
        return kernels.attention_backward(*arguments, *[numbers[name] for name in Operands._fields[len(arguments) - 4 : -1]])

    monkeypatch.setattr(torch.ops.atomr_accel_flashattn, "attention_backward", operator)
    options = {"learned_sink": fake(torch.rand(4)), "alibi_slopes": fake(torch.rand(4)), "softcap": 2.0, "window_size": (3, 0)}
    dout = fake(upstream()[0].flatten(0, 1 if call is packed else 0))

    def step(*, watched: bool) -> list[Any]:
        monkeypatch.setattr(attention_function, "is_watched", lambda: watched)
        tensors = leaves(6, packed=call is packed)
        return grad(call(tensors, **options), tensors, dout, None)

    for _ in range(3):
        expected = step(watched=False)
    assert not calls
    made = step(watched=True)
    assert len(calls) == 1
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert gpu.launches


def test_a_second_derivative_of_a_repeated_call_is_refused(gpu: FakeGpu):
    for _ in range(3):
        tensors = leaves(6)
        made = torch.autograd.grad(dense(tensors)[0], tensors, fake(upstream()[0]), create_graph=True)
        with pytest.raises(fa.FeatureNotBuiltError, match="differentiated once more"):
            sum(each.float().square().sum() for each in made).backward()
    assert gpu.launches


def test_deterministic_gradients_are_asked_for_by_every_backward(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    kinds: list[bool] = []
    run = first_call.run

    def noted(request: Any) -> Any:
        kinds.append(request.problem.deterministic)
        return run(replace(request, deterministic=False))

    monkeypatch.setattr(first_call, "run", noted)
    dout = fake(upstream()[0])
    for deterministic in (False, True, False, True, False):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda value=deterministic: value)
        tensors = leaves(7)
        grad(dense(tensors), tensors, dout, None)
    assert kinds == [False, True, False, True]  # no plan is kept for requests that are changed here
    assert gpu.launches


def test_slopes_that_want_gradients_an_out_and_padded_head_dims_leave_no_shortcut(gpu: FakeGpu):
    tensors = leaves(8)
    dense(tensors, alibi_slopes=fake(torch.ones(4)))
    with pytest.raises(fa.FeatureNotBuiltError, match="alibi_slopes requires grad"):
        dense(tensors, alibi_slopes=fake(torch.ones(4)).requires_grad_())
    with pytest.raises(fa.OutputError, match="requires grad"):
        dense(tensors, out=fake(torch.empty(2, 6, 4, 16).half()))
    count = len(repeat.shortcuts)
    for _ in range(2):
        assert fa.flash_attn_func(*leaves(8, width=13))[0].requires_grad
    assert len(repeat.shortcuts) == count
    assert gpu.launches
