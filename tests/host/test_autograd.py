"""Autograd of torch through the functional calls, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.arrays.read import read_array  # noqa: E402
from tests.case_lists import pairwise_cases  # noqa: E402
from tests.cases import Case  # noqa: E402
from tests.check import check_gradients  # noqa: E402
from tests.inputs import NUMPY_DTYPE, Inputs  # noqa: E402
from tests.oracle import Gradients, Upstream  # noqa: E402

DTYPES = (fa.DType.BF16, fa.DType.F16, fa.DType.F32, fa.DType.F64)


def tensors(*sizes: int, heads: tuple[int, int] = (4, 2), dtype: Any = torch.float32, width: int = 16, seed: int = 0) -> list[Any]:
    """q, k and v, (*sizes, H, D), that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (heads[0], heads[1], heads[1])
    return [torch.randn(*sizes, number, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for number in numbers]


def as_tensor(array: np.ndarray) -> Any:
    """A tensor over the memory of an array, bfloat16 too."""
    if array.dtype == NUMPY_DTYPE[fa.DType.BF16]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Any) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(NUMPY_DTYPE[fa.DType.BF16])
    return tensor.numpy()


def run_functional(inputs: Inputs, upstream: Upstream) -> Gradients:
    """loss.backward() through a call; slices and steps of the inputs are those of the case."""
    leaves = [as_tensor(array if array.flags.writeable else array.copy()).requires_grad_() for array in (inputs.q, inputs.k, inputs.v)]
    sink = None if inputs.learned_sink is None else as_tensor(inputs.learned_sink).requires_grad_()
    options: dict[str, Any] = {
        "softmax_scale": inputs.softmax_scale,
        "window_size": tuple(-1 if side is None else side for side in (inputs.left, inputs.right)),
        "softcap": inputs.softcap,
        "alibi_slopes": None if inputs.alibi_slopes is None else as_tensor(inputs.alibi_slopes),
        "learned_sink": sink,
        "sink_tokens": inputs.sink_tokens,
        "return_attn_probs": True,
    }
    if inputs.cu_seqlens_q is None or inputs.cu_seqlens_k is None:
        out, lse, _ = fa.flash_attn_func(*leaves, **options)
    else:
        offsets = as_tensor(inputs.cu_seqlens_q), as_tensor(inputs.cu_seqlens_k)
        out, lse, _ = fa.flash_attn_varlen_func(*leaves, *offsets, inputs.max_seqlen_q, inputs.max_seqlen_k, **options)
    dout, dlse = (None if each is None else as_tensor(each.copy()) for each in upstream)
    outputs = [(out, dout), (lse, dlse)]
    torch.autograd.backward(*zip(*(pair for pair in outputs if pair[1] is not None), strict=True))
    return Gradients(*(as_array(leaf.grad) for leaf in leaves), None if sink is None else sink.grad.numpy())


WITHOUT_DROPOUT = [case for case in pairwise_cases(DTYPES) if not case.dropout_p]


@pytest.mark.parametrize("case", WITHOUT_DROPOUT[::2], ids=str)
def test_functional_calls_agree_with_the_oracle(case: Case):
    check_gradients(case, run_functional)


def packed(call: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    return call(q, k, v, offsets, offsets, 7, 7, **options)


def _dense(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return fa.flash_attn_func(q, k, v, **options)


FORMS: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "flash_attn_func": ((2, 6), _dense),
    "flash_attn_kvpacked_func": ((2, 6), lambda q, k, v, **o: fa.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **o)),
    "flash_attn_qkvpacked_func": ((2, 6), lambda q, k, v, **o: fa.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **o)),
    "flash_attn_varlen_func": ((12,), lambda q, k, v, **o: packed(fa.flash_attn_varlen_func, q, k, v, **o)),
    "flash_attn_varlen_kvpacked_func": (
        (12,),
        lambda q, k, v, **o: packed(
            lambda q, k, v, *lengths, **o: fa.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *lengths, **o), q, k, v, **o
        ),
    ),
    "flash_attn_varlen_qkvpacked_func": (
        (12,),
        lambda q, k, v, **o: packed(
            lambda q, k, v, ends, _, most, __, **o: fa.flash_attn_varlen_qkvpacked_func(torch.stack((q, k, v), 1), ends, most, **o),
            q,
            k,
            v,
            **o,
        ),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck(name: str):
    """In float64, against finite differences: every form, head dims that are padded, softcap, slopes, window, sink tokens."""
    sizes, call = FORMS[name]
    leaves = tensors(*sizes, heads=(2, 2), dtype=torch.float64, width=5)
    options = {"window_size": (2, 1), "softcap": 3.0, "alibi_slopes": torch.tensor([0.1, 0.3]), "sink_tokens": 1, "softmax_scale": 0.7}
    assert torch.autograd.gradcheck(lambda q, k, v: call(q, k, v, **options), leaves, fast_mode=True)
    assert torch.autograd.gradcheck(lambda q, k, v: call(q, k, v, causal=True), leaves, fast_mode=name != "flash_attn_func")


def test_gradcheck_with_dropout():
    leaves = tensors(1, 6, dtype=torch.float64, width=8)

    def call(*leaves: Any) -> Any:
        torch.manual_seed(3)
        return fa.flash_attn_func(*leaves, 0.4)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def grads(leaves: list[Any]) -> list[Any]:
    """The gradients of leaves, which are forgotten."""
    made = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return made


def equal(ones: list[Any], others: list[Any]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def close(ones: list[Any], others: list[Any]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_not_asked_for_is_not_made():
    for which in range(3):
        leaves = tensors(2, 6)
        for number, leaf in enumerate(leaves):
            leaf.requires_grad_(number == which)
        fa.flash_attn_func(*leaves).sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [number != which for number in range(3)]


def test_a_learned_sink_alone_gets_its_gradient():
    q, k, v = (leaf.detach() for leaf in tensors(2, 6))
    sink = torch.zeros(4, requires_grad=True)
    out = fa.flash_attn_func(q, k, v, learned_sink=sink)
    out.sum().backward()
    step = 1e-2
    ahead, back = (fa.flash_attn_func(q, k, v, learned_sink=torch.tensor([sign * step, 0, 0, 0])).sum() for sign in (1, -1))
    assert sink.grad[0].item() == pytest.approx(((ahead - back) / (2 * step)).item(), rel=1e-2)


def plain(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """o and LSE, causal, in operations of torch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -torch.inf)
    lse = torch.logsumexp(score, -1)
    return (torch.exp(score - lse[..., None]) @ v).transpose(1, 2), lse


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "out": lambda out, _: (out * out).sum(),
    "lse": lambda _, lse: (lse * lse).sum(),
    "both": lambda out, lse: (out.sin() * lse.cos().transpose(1, 2)[..., None]).sum(),
    "one head": lambda out, lse: out[:, :, 1].sum() + lse[:, 0].sum(),
    "sum": lambda out, lse: out.sum() + 2 * lse.sum(),  # both gradients are expanded
    "transposed": lambda out, _: (out.transpose(1, 3) @ out.transpose(1, 3).mT).sum(),
    "slice of a cat": lambda out, _: (torch.cat([out, out.flip(1), 2 * out], dim=-1)[..., 3:40] ** 2).sum(),
    "rows": lambda out, _: (out[:, ::2] ** 3).sum(),
    "negative": lambda out, _: -out.sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_a_plain_attention(loss: str):
    leaves = tensors(2, 7)
    out, lse, _ = fa.flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    LOSSES[loss](out, lse).backward()
    made = grads(leaves)
    LOSSES[loss](*plain(*leaves)).backward()
    close(made, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])


def layouts(dout: Any) -> dict[str, Any]:
    """The same values, laid out in other ways."""
    wide = torch.full((2, 9, 3, 4, 40), torch.nan)
    wide[:, 1:8, 1, :, 5:21] = dout
    return {
        "inside of a larger one": wide[:, 1:8, 1, :, 5:21],
        "transposed": dout.transpose(1, 2).contiguous().transpose(1, 2),
        "columns first": dout.transpose(1, 3).contiguous().transpose(1, 3),
        "batch last": dout.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "slice of a cat": torch.cat([dout, dout], dim=1)[:, 7:],
        "heads of more": torch.cat([dout, dout], dim=2)[:, :, 4:],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(2, 7, 4, 16)))
def test_layouts_of_the_gradient_of_o(layout: str):
    leaves = tensors(2, 7)
    dout = torch.randn(2, 7, 4, 16, generator=torch.Generator().manual_seed(1))
    out = fa.flash_attn_func(*leaves)
    expected = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    assert equal(torch.autograd.grad(out, leaves, layouts(dout)[layout]), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 16), (1, 7, 4, 1), (1, 1, 4, 16)], ids=str)
def test_expanded_gradients_of_o(shape: tuple[int, ...]):
    leaves = tensors(2, 7)
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).expand(2, 7, 4, 16)
    out = fa.flash_attn_func(*leaves)
    expected = torch.autograd.grad(out, leaves, dout.contiguous(), retain_graph=True)
    assert equal(torch.autograd.grad(out, leaves, dout), expected)


def test_an_input_that_is_used_twice_and_more():
    (x, *_), call = tensors(2, 7, heads=(2, 2)), fa.flash_attn_func
    (call(x, x, x, causal=True).sin() + x).sum().backward()
    (made,) = grads([x])
    copies = [x.detach().clone().requires_grad_() for _ in range(4)]
    (call(*copies[:3], causal=True).sin() + copies[3]).sum().backward()
    close([made], [sum(grads(copies))])


def test_expanded_keys_get_sums():
    q, k, v = tensors(2, 7)
    shared = tensors(1, 7)[1]
    fa.flash_attn_func(q, shared.expand(2, 7, 2, 16), v).sin().sum().backward()
    (made,) = grads([shared])
    copy = shared.detach().expand(2, 7, 2, 16).clone().requires_grad_()
    fa.flash_attn_func(q, copy, v).sin().sum().backward()
    close([made], [copy.grad.sum(0, keepdim=True)])
    assert k.grad is None


def test_hooks_see_and_change_gradients():
    leaves = tensors(2, 7)
    seen = []
    leaves[0].register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    out = fa.flash_attn_func(*leaves)
    out.register_hook(lambda grad: 3 * grad)
    out.retain_grad()
    out.sum().backward()
    assert (out.grad == 3).all()
    made = grads(leaves)
    fa.flash_attn_func(*(copies := [leaf.detach().requires_grad_() for leaf in leaves])).sum().backward()
    close([seen[0], made[0], *made[1:]], [3 * copies[0].grad, 6 * copies[0].grad, *(3 * copy.grad for copy in copies[1:])])


def test_a_graph_that_is_kept_and_one_that_is_not():
    leaves = tensors(2, 7)
    loss = fa.flash_attn_func(*leaves, 0.3).sum()
    loss.backward(retain_graph=True)
    first = grads(leaves)
    loss.backward()
    assert equal(grads(leaves), first), "dropout draws the same pattern again"
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_no_grad_records_nothing():
    leaves = tensors(2, 7)
    with torch.no_grad():
        inner = fa.flash_attn_func(*leaves)
    with torch.inference_mode():
        assert fa.flash_attn_func(*leaves).is_inference()
    assert inner.grad_fn is None
    outer = fa.flash_attn_func(inner, *leaves[1:])
    outer.sum().backward()
    assert leaves[0].grad is None
    assert leaves[1].grad is not None


def test_dropout_takes_the_pattern_of_the_forward():
    leaves = tensors(1, 40, heads=(1, 1))
    q, k, v = leaves
    torch.manual_seed(7)
    out, lse, keep = fa.flash_attn_func(q, k, v, 0.3, return_attn_probs=True)
    assert not keep.requires_grad
    assert keep.dtype is torch.bool
    torch.manual_seed(8)  # the backward draws nothing
    (out.sin().sum() + lse.sum()).backward()
    made = grads(leaves)
    score = (q[:, :, 0] @ k[:, :, 0].mT) / 4
    rescale = 256 / round(256 * 0.7)
    expected = (torch.softmax(score, -1) * keep[:, 0] * rescale) @ v[:, :, 0]
    torch.testing.assert_close(out[:, :, 0], expected)
    (expected.sin().sum() + torch.logsumexp(score, -1).sum()).backward()
    close(made, grads(leaves))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_pattern(use_reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    leaves = tensors(2, 30)
    torch.manual_seed(1)
    fa.flash_attn_func(*leaves, 0.5).sin().sum().backward()
    expected = grads(leaves)
    torch.manual_seed(1)
    checkpoint(lambda q, k, v: fa.flash_attn_func(q, k, v, 0.5), *leaves, use_reentrant=use_reentrant).sin().sum().backward()
    assert equal(grads(leaves), expected)


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(7, 7), (12, 20), (16, 13), (9, 8)])
def test_gradients_of_padded_head_dims_are_cut(head_dim: int, v_head_dim: int):
    leaves = [*tensors(2, 7, width=head_dim)[:2], tensors(2, 7, width=v_head_dim)[2]]
    out = fa.flash_attn_func(*leaves, causal=True)
    assert out.shape == (2, 7, 4, v_head_dim)
    out.sin().sum().backward()
    made = grads(leaves)
    assert [each.shape for each in made] == [leaf.shape for leaf in leaves]
    plain(*leaves)[0].sin().sum().backward()
    close(made, grads(leaves))


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_what_was_saved_may_not_be_written(which: int):
    leaves = tensors(2, 7)
    inputs = [leaf * 1 for leaf in leaves]
    loss = fa.flash_attn_func(*inputs).sum()
    with torch.no_grad():
        inputs[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["out", "alibi_slopes", "cu_seqlens"])
def test_nor_may_what_else_the_backward_reads(name: str):
    arrays = {"alibi_slopes": torch.ones(4), "cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}
    offsets = arrays["cu_seqlens"]
    out = fa.flash_attn_varlen_func(*tensors(7), offsets, offsets, 7, 7, alibi_slopes=arrays["alibi_slopes"])
    loss = (2 * out).sum()
    with torch.no_grad():
        {**arrays, "out": out}[name].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_saved_goes_through_the_hooks_of_autograd():
    """As offloading does: the backward reads what the hooks give back, and holds nothing else."""
    leaves = tensors(2, 7)
    kept: list[Any] = []

    def pack(tensor: Any) -> int:
        kept.append(tensor.clone())
        return len(kept) - 1

    torch.manual_seed(2)
    fa.flash_attn_func(*leaves, 0.2).sum().backward()
    expected = grads(leaves)
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        loss = fa.flash_attn_func(*leaves, 0.2).sum()
    with torch.no_grad():
        for leaf in leaves:
            leaf.zero_()
    loss.backward()
    assert equal(grads(leaves), expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_handed_on(deterministic: bool, monkeypatch: pytest.MonkeyPatch):
    from atomr_accel_flashattn.torch_ops import first_call

    asked: list[bool] = []
    run = first_call.run

    def noted(request: Any, **options: Any) -> Any:
        if isinstance(request, fa.FaBwdDispatch):
            asked.append(request.problem.deterministic)
        return run(request, **options)

    monkeypatch.setattr(first_call, "run", noted)
    leaves = tensors(2, 7)
    fa.flash_attn_func(*leaves, deterministic=deterministic).sum().backward()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        fa.flash_attn_func(*leaves).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert asked == [deterministic, True]


def test_a_second_derivative_is_refused_by_name():
    leaves = tensors(2, 7)
    out, lse, _ = fa.flash_attn_func(*leaves, return_attn_probs=True)
    made = torch.autograd.grad(out.sin().sum() + lse.sum(), leaves, create_graph=True)
    assert all(each.requires_grad for each in made)
    with pytest.raises(fa.FeatureNotBuiltError, match="differentiated once more; first derivatives are built") as caught:
        sum(each.square().sum() for each in made).backward()
    assert caught.value.feature == "double_backward"


def test_a_graph_of_gradients_that_nobody_differentiates_is_no_error():
    leaves = tensors(2, 7)
    fa.flash_attn_func(*leaves).sin().sum().backward()
    expected = grads(leaves)
    made = torch.autograd.grad(fa.flash_attn_func(*leaves).sin().sum(), leaves, create_graph=True)
    assert equal([each.detach() for each in made], expected)


def test_forward_mode_of_gradcheck_is_refused():
    leaves = tensors(1, 2, heads=(1, 1), width=3, dtype=torch.float64)
    with pytest.raises(Exception, match=r"dual tensor|forward"):
        torch.autograd.gradcheck(fa.flash_attn_func, leaves, check_forward_ad=True, check_backward_ad=False)


def test_slopes_get_no_gradient_and_say_so():
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(fa.FeatureNotBuiltError, match=r"alibi_slopes requires grad.*constants") as caught:
        fa.flash_attn_func(*tensors(2, 7), alibi_slopes=slopes)
    assert caught.value.feature == "slopes_gradient"
    with torch.no_grad():
        fa.flash_attn_func(*tensors(2, 7), alibi_slopes=slopes)


def test_out_is_refused_where_the_call_is_recorded():
    with pytest.raises(fa.OutputError, match="out: got an array, and q requires grad"):
        fa.flash_attn_func(*tensors(2, 7), out=torch.empty(2, 7, 4, 16))
    leaves = [leaf.detach() for leaf in tensors(2, 7)]
    with pytest.raises(fa.OutputError, match="out requires grad"):
        fa.flash_attn_func(*leaves, out=torch.empty(2, 7, 4, 16, requires_grad=True))


def test_arrays_of_other_libraries_beside_tensors():
    q, k, v = tensors(2, 7)
    mixed = fa.flash_attn_func(q, k.detach().numpy(), v, alibi_slopes=np.ones(4, np.float32))
    mixed.sin().sum().backward()
    made = grads([q, v])
    fa.flash_attn_func(q, k, v, alibi_slopes=torch.ones(4)).sin().sum().backward()
    assert equal(made, [q.grad, v.grad])
    with pytest.raises(fa.FeatureNotBuiltError, match=r"k requires grad.*q, in whose library o is made, is of type ndarray"):
        fa.flash_attn_func(q.detach().numpy(), k, v)


@pytest.mark.parametrize("device", [fa.Device("cpu", 0), fa.Device("cuda", 0)], ids=str)
def test_a_request_is_not_recorded_and_says_so(device: fa.Device):
    arrays = [replace(read_array(x, "x"), device=device) for x in tensors(2, 7)]
    with pytest.raises(fa.FeatureNotBuiltError, match=r"q requires grad.*autograd records flash_attn_func") as caught:
        fa.DenseFwdRequest(*arrays)
    assert caught.value.feature == "request_gradients"
    assert "autograd' is not built" not in str(caught.value)


def test_a_parameter_trains():
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 3 * 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x, losses = torch.randn(2, 9, 16), []
    for _ in range(8):
        qkv = layer(x).view(2, 9, 3, 2, 8)
        loss = (fa.flash_attn_qkvpacked_func(qkv, causal=True).reshape(2, 9, 16) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty_calls(sizes: tuple[int, int, int]):
    batch, seqlen_q, seqlen_k = sizes
    q, k = torch.ones(batch, seqlen_q, 2, 16, requires_grad=True), torch.ones(batch, seqlen_k, 2, 16, requires_grad=True)
    fa.flash_attn_func(q, k, k).sum().backward()
    assert not q.grad.any()
    assert not k.grad.any()
