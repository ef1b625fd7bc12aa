"""The operators themselves: schemas, shapes and strides without values, gradients, tags."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402 - after the skip

import atomr_accel_flashattn as fa  # noqa: E402
from atomr_accel_flashattn.torch_ops.operators import Operands  # noqa: E402
from tests.operators.calls import PACKED_ENDS, gradients, leaves, operators  # noqa: E402


def ends() -> Any:
    return torch.tensor(PACKED_ENDS, dtype=torch.int32)


def samples() -> dict[str, tuple[Any, ...]]:
    """Operands, dense and packed."""
    sink, slopes, rng = torch.zeros(4, requires_grad=True), torch.rand(4), torch.tensor([1, 2])
    more = (None, None, 0, 0, None, None, 0.3, 2, 1, 3.0, 0.3, 1)
    return {
        "plain": tuple(leaves()),
        "without gradients": tuple(x.detach() for x in leaves()),
        "sink and slopes": (*leaves(), sink, slopes),
        "all": (*leaves(), sink, slopes, rng, *more, True, True),
        "packed": (*leaves(12), sink, None, None, ends(), ends(), 7, 7),
        "packed, lengths as tensors": (*leaves(12), None, None, None, ends(), ends(), 0, 0, torch.tensor(7), torch.tensor(8)),
        "half": tuple(leaves(dtype=torch.float16)),
        "last stride": tuple(x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in leaves()),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str):
    torch.library.opcheck(operators.attention.default, samples()[name])


@pytest.mark.parametrize("name", ["all", "packed", "last stride"])
def test_opcheck_of_the_backward(name: str):
    operands = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in samples()[name])[: len(Operands._fields) - 1]
    out, lse, _ = operators.attention(*operands)
    torch.library.opcheck(operators.attention_backward.default, (out.sin(), lse.cos(), out, lse, *operands))
    torch.library.opcheck(operators.attention_backward.default, (None, lse.cos(), out, lse, *operands))


def test_opcheck_of_the_draw():
    torch.library.opcheck(operators.draw_seed.default, (leaves()[0].detach(),), test_utils=("test_schema", "test_faketensor"))


def test_only_the_draw_is_random():
    random_tag = torch.Tag.nondeterministic_seeded
    tagged = {name for name in ("attention", "attention_backward", "draw_seed") if random_tag in getattr(operators, name).default.tags}
    assert tagged == {"draw_seed"}


def test_defaults_of_the_schema_are_those_of_the_operands():
    """A call whose last arguments have their defaults comes without them."""
    for argument, name in zip(operators.attention.default._schema.arguments, Operands._fields, strict=True):
        assert argument.name == name
        assert argument.default_value == Operands._field_defaults.get(name)
    names = [argument.name for argument in operators.attention_backward.default._schema.arguments]
    assert names == ["dout", "dlse", "out", "lse", *Operands._fields[:-1]]


def layout(random_: random.Random, sizes: tuple[int, ...]) -> Any:
    """A tensor of these sizes with an order of dimensions, gaps, expanded dimensions and an offset."""
    order = list(range(len(sizes)))
    if random_.random() < 0.7:
        random_.shuffle(order)
    wide = [sizes[at] + random_.choice((0, 0, 1, 8)) for at in order]
    x = torch.randn(wide).permute([order.index(at) for at in range(len(sizes))])
    x = x[tuple(slice(random_.randint(0, have - size), None) for have, size in zip(x.shape, sizes, strict=True))]
    x = x[tuple(slice(size) for size in sizes)]
    if random_.random() < 0.3:
        at = random_.randrange(len(sizes) - 1)
        x = x.select(at, 0).unsqueeze(at).expand(sizes)
    return x


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_strides_without_values_are_the_real_ones(first: int):
    for seed in range(first, first + 50):
        random_ = random.Random(seed)
        torch.manual_seed(seed)
        packed, kv = random_.random() < 0.3, random_.choice((1, 2, 3))
        heads, width, v_width = kv * random_.choice((1, 2)), random_.choice((1, 5, 8, 16)), random_.choice((1, 5, 8, 16))
        v_width = width if random_.random() < 0.5 else v_width
        lead = (12,) if packed else (random_.choice((1, 2)), random_.choice((1, 3, 7)))
        lead_k = lead if packed else (lead[0], random_.choice((1, 4)))
        shapes = ((*lead, heads, width), (*lead_k, kv, width), (*lead_k, kv, v_width))
        arrays = [layout(random_, shape) for shape in shapes]
        more = (None, None, None, ends(), ends(), 12, 12) if packed else ()
        out, lse, _ = made = operators.attention(*arrays, *more)
        found = operators.attention_backward(layout(random_, out.shape), None, out, lse, *arrays, *more)
        with FakeTensorMode() as mode:
            *fakes, fake_out, fake_lse = (mode.from_tensor(x) for x in (*arrays, out, lse))
            others = tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in more)
            described = operators.attention(*fakes, *others)
            dout = mode.from_tensor(out)
            described += operators.attention_backward(dout, None, fake_out, fake_lse, *fakes, *others)
        for real, fake in zip((*made, *found), described, strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype), (seed, real.shape)


def test_layouts_that_broadcast_give_their_own_results():
    """Expanded K and V, and ones of equal shape that are not, one after the other."""
    q, k, v = (x.detach() for x in leaves(2, 6, heads=(2, 2)))
    for keys in (k, k[:1].expand_as(k), k[:, :1].expand_as(k), k[:, :, :1].expand_as(k), k):
        made, _, _ = operators.attention(q, keys, v)
        assert torch.equal(made, operators.attention(q, keys.contiguous(), v)[0])


@pytest.mark.parametrize("rank", [3, 5])
def test_a_wrong_rank_is_refused_without_values_too(rank: int):
    x = torch.empty((2,) * rank, device="meta")
    with pytest.raises(fa.ShapeError, match=rf"rank {rank}; allowed is rank 4"):
        operators.attention(x, x, x)


@pytest.mark.parametrize(("given", "absent"), ["qk", "kq"])
def test_offsets_of_one_alone_are_refused(given: str, absent: str):
    x = torch.zeros(*((5,) if given == "q" else (1, 5)), 2, 16)
    offsets = {f"cu_seqlens_{given}": torch.tensor([0, 5], dtype=torch.int32)}
    with pytest.raises(fa.CuSeqlensError, match=f"cu_seqlens_{absent}: got None with offsets in cu_seqlens_{given}"):
        operators.attention(x, x, x, **offsets, max_seqlen_q=5, max_seqlen_k=5)


@pytest.mark.parametrize("name", ["longest_q", "longest_k"])
@pytest.mark.parametrize("length", [torch.tensor(7.9), torch.tensor(True), torch.tensor([7])], ids=["float", "bool", "1-d"])
def test_a_length_that_is_no_integer_is_refused(name: str, length: Any):
    q, k, v = leaves(12)
    options = {"cu_seqlens_q": ends(), "cu_seqlens_k": ends(), "max_seqlen_q": 7, "max_seqlen_k": 7, name: length}
    with pytest.raises(fa.CuSeqlensError, match=f"{name}: got torch.*allowed is an integer tensor without dimensions"):
        operators.attention(q, k, v, **options)
    out, lse, _ = operators.attention(q, k, v, **options | {name: torch.tensor(7)})
    with pytest.raises(fa.CuSeqlensError, match=f"{name}: got torch"):
        operators.attention_backward(out.detach(), None, out.detach(), lse.detach(), q.detach(), k.detach(), v.detach(), **options)


def test_gradients_are_those_of_the_function():
    for make in (
        lambda *x: operators.attention(*x)[:2],
        lambda *x: fa.flash_attn_func(*x[:3], learned_sink=x[3], return_attn_probs=True)[:2],
    ):
        tensors = [*leaves(), torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)]
        for loss in (lambda o, _: o.sin().sum(), lambda _, lse: (lse * lse).sum(), lambda o, lse: o.sum() + lse.sin().sum()):
            made = torch.autograd.grad(loss(*make(*tensors)), tensors, allow_unused=True)
            expected = torch.autograd.grad(loss(*operators.attention(*tensors)[:2]), tensors, allow_unused=True)
            for one, other, name in zip(made, expected, ("q", "k", "v", "sink"), strict=True):
                assert torch.equal(one, other), name
                assert name == "v" or one.abs().sum() > 0, f"the gradient of {name} is zero"


def test_nobody_gets_a_gradient_that_he_does_not_want():
    for which in range(3):
        tensors = [x.detach().requires_grad_(number == which) for number, x in enumerate(leaves())]
        operators.attention(*tensors)[0].sum().backward()
        assert [x.grad is not None for x in tensors] == [number == which for number in range(3)]


def test_gradients_of_slopes_are_refused():
    with pytest.raises(fa.FeatureNotBuiltError, match=r"alibi_slopes requires grad.*constants"):
        operators.attention(*leaves(), None, torch.ones(4, requires_grad=True))


def test_second_derivatives_are_refused():
    tensors = leaves()
    made = gradients_with_history(tensors)
    with pytest.raises(fa.FeatureNotBuiltError, match="double_backward"):
        sum(x.square().sum() for x in made).backward()


def gradients_with_history(tensors: list[Any]) -> list[Any]:
    return list(torch.autograd.grad(operators.attention(*tensors)[0].sin().sum(), tensors, create_graph=True))


def test_a_tangent_is_refused():
    q, k, v = (x.detach() for x in leaves())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(fa.FeatureNotBuiltError, match=r"forward_mode.*primal"):
            operators.attention(dual, k, v)


def test_a_saved_seed_is_that_of_its_call():
    """A draw in between changes neither the pattern nor the gradients of a call of before."""
    q, k, v = tensors = leaves(1, 40)
    rng = operators.draw_seed(q)
    out, _, pattern = operators.attention(q, k, v, None, None, rng, dropout_p=0.4, return_pattern=True)
    first = torch.autograd.grad(out.sin().sum(), tensors, retain_graph=True)
    operators.draw_seed(q)
    for one, other in zip(gradients(out.sin().sum(), tensors), first, strict=True):
        assert torch.equal(one, other)
    again, _, same = operators.attention(q, k, v, None, None, rng, dropout_p=0.4, return_pattern=True)
    assert torch.equal(again, out)
    assert torch.equal(same, pattern)


def test_dropout_without_a_seed_draws_nothing_in_secret():
    with pytest.raises(fa.DropoutError, match="draw_seed"):
        operators.attention(*leaves(), dropout_p=0.4)


def test_eager_calls_go_past_the_operators(monkeypatch: pytest.MonkeyPatch):
    from atomr_accel_flashattn.torch_ops import traced

    monkeypatch.setattr(traced, "attend", lambda *_: pytest.fail("an eager call took the operator"))
    fa.flash_attn_func(*leaves(), 0.1, return_attn_probs=True)[0].sum().backward()
