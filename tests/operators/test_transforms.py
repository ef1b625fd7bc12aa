"""What records and transforms operations of torch: make_fx, export, AOTInductor, jit.trace, torch.func, dispatch modes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402 - after the skip
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import atomr_accel_flashattn as fa  # noqa: E402
from tests.operators.calls import FORMS, OPTIONS, gradients, leaves, operators, parts_of  # noqa: E402


def plain(*sizes: int, **options: Any) -> list[Any]:
    return [x.detach() for x in leaves(*sizes, **options)]


@pytest.mark.parametrize("options", [{}, {"pre_dispatch": True}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}], ids=str)
def test_make_fx_records_the_operator(options: dict[str, Any]):
    call = lambda q, k, v: fa.flash_attn_func(q.sin(), k, v, causal=True) * 2  # noqa: E731
    graph = make_fx(call, **options)(*plain())
    assert operators.attention.default in {node.target for node in graph.graph.nodes}
    others = plain(seed=1)
    assert torch.equal(graph(*others), call(*others))


@pytest.mark.parametrize("name", FORMS)
def test_make_fx_records_every_form_with_its_dropout(name: str):
    sizes, call = FORMS[name]
    graph = make_fx(lambda q, k, v: call(q, k, v, dropout_p=0.3))(*plain(*sizes, heads=(2, 2)))
    arrays = plain(*sizes, heads=(2, 2), seed=1)
    torch.manual_seed(4)
    made = graph(*arrays)
    torch.manual_seed(4)
    assert torch.equal(made, call(*arrays, dropout_p=0.3)), "the seed was drawn while recording"


def test_make_fx_records_the_backward():
    def call(q: Any, k: Any, v: Any) -> Any:
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        return gradients(fa.flash_attn_func(*tensors, causal=True).sin().sum(), tensors)

    graph, others = make_fx(call)(*plain()), plain(seed=1)
    assert operators.attention_backward.default in {node.target for node in graph.graph.nodes}
    assert all(torch.equal(one, other) for one, other in zip(graph(*others), call(*others), strict=True))


class Model(torch.nn.Module):
    """An attention among other operations."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return fa.flash_attn_func(q.sin(), k, v, causal=True, **self.options)


def exported(model: Any, *, strict: bool = False) -> Any:
    length = torch.export.Dim("length", min=2, max=512)
    return torch.export.export(model, tuple(plain()), dynamic_shapes=({1: length},) * 3, strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_keeps_lengths_open(strict: bool, tmp_path: Path):
    program, others = exported(Model(), strict=strict), plain(2, 9)
    assert torch.equal(program.module()(*others), Model()(*others))
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(*others), Model()(*others))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch copies its own deprecated classes
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, g++")
def test_aot_inductor(tmp_path: Path):
    package = torch._inductor.aoti_compile_and_package(exported(Model()), package_path=str(tmp_path / "model.pt2"))
    others = plain(2, 9)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*others), Model()(*others))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_records_the_operator():
    traced = torch.jit.trace(lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True), tuple(plain()))
    assert "atomr_accel_flashattn::attention" in str(traced.graph)
    others = plain(2, 9)
    assert torch.equal(traced(*others), fa.flash_attn_func(*others, causal=True))


def test_fake_tensors_get_fake_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in plain())
        made = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    assert [tuple(x.shape) for x in parts_of(made)] == [(2, 6, 4, 16), (2, 4, 6)]
    assert tuple(fa.flash_attn_func(q, k, v).shape) == (2, 6, 4, 16), "outside of their mode"


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_func_grad(packed: bool):
    sizes, call = FORMS["flash_attn_varlen_func" if packed else "flash_attn_func"]
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0])

    def loss(q: Any, k: Any, v: Any, sink: Any) -> Any:
        out, lse, _ = call(q, k, v, causal=True, learned_sink=sink, return_attn_probs=True)
        return out.sin().sum() + lse.clamp(min=-9).sum()

    made = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*plain(*sizes), sink)
    tensors = [*leaves(*sizes), sink.clone().requires_grad_()]
    for one, other in zip(made, gradients(loss(*tensors), tensors), strict=True):
        assert torch.equal(one, other)
        assert one.abs().sum() > 0


def close(ones: Any, others: Any) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "dropout" not in name and name != "all"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_vmap(name: str, packed: bool):
    sizes, call = FORMS["flash_attn_varlen_func" if packed else "flash_attn_func"]
    q, k, v = plain(3, *sizes)

    def function(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        return tuple(parts_of(call(q, k, v, **OPTIONS[name])))

    made = torch.func.vmap(function)(q, k, v)
    close(made, (torch.stack(each) for each in zip(*map(function, q, k, v), strict=True)))
    made = torch.func.vmap(function, in_dims=(1, None, None), out_dims=1)(q.movedim(0, 1), k[0], v[0])
    close(made, (torch.stack(each, 1) for each in zip(*(function(x, k[0], v[0]) for x in q), strict=True)))


def test_vmap_of_gradients_and_gradients_of_vmap():
    def loss(q: Any, k: Any, v: Any, sink: Any) -> Any:
        return fa.flash_attn_func(q, k, v, causal=True, learned_sink=sink).sin().sum()

    arrays, sinks = plain(3, 2, 6), torch.randn(3, 4)
    one_by_one = [torch.func.grad(loss, argnums=(0, 1, 2, 3))(*each) for each in zip(*arrays, sinks, strict=True)]
    expected = [torch.stack(each) for each in zip(*one_by_one, strict=True)]
    close(torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*arrays, sinks), expected)
    tensors = [x.clone().requires_grad_() for x in (*arrays, sinks)]
    close(gradients(torch.func.vmap(loss)(*tensors).sum(), tensors), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_vmap_over_no_element_is_empty(packed: bool):
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)

    def call(q: Any, k: Any, v: Any) -> Any:
        if packed:
            return fa.flash_attn_varlen_func(q, k, v, ends, ends, 7, 7, causal=True, return_attn_probs=True)[:2]
        return fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2]

    some = leaves(3, *((12,) if packed else (2, 6)))
    none = [x.detach()[:0].requires_grad_() for x in some]
    made, expected = torch.func.vmap(call)(*none), torch.func.vmap(call)(*some)
    assert [x.shape for x in made] == [(0, *x.shape[1:]) for x in expected]
    assert [x.shape for x in gradients(made[0].sum() + made[1].sum(), none)] == [x.shape for x in none]
    loss = lambda q, k, v: call(q, k, v)[0].sum()  # noqa: E731
    assert torch.func.vmap(torch.func.grad(loss))(*none).shape == none[0].shape
    last = torch.func.vmap(loss, in_dims=(1, None, None))(some[0].detach().movedim(0, 1)[:, :0], some[1][0], some[2][0])
    assert last.shape == (0,)
    with pytest.raises(fa.HeadDimError):
        torch.func.vmap(call)(*(x.new_empty((*x.shape[:-1], 0)) for x in none))


def test_vmap_of_dropout_says_what_to_pass():
    q, k, v = plain(3, 2, 40)
    call = lambda q, k, v: fa.flash_attn_func(q, k, v, 0.4, return_attn_probs=True)  # noqa: E731
    for randomness in ("error", "same"):
        with pytest.raises(fa.DropoutError, match="randomness='different'"):
            torch.func.vmap(call, randomness=randomness)(q, k, v)
    out, _, pattern = torch.func.vmap(call, randomness="different")(q, k[:1].expand_as(k), v)
    assert out.shape == q.shape
    assert pattern.shape == (3, 2, 4, 40, 40)
    assert not torch.equal(pattern[0], pattern[1])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_mapped_gradients_of_one_call_have_its_dropout(packed: bool):
    sizes, call = FORMS["flash_attn_varlen_func" if packed else "flash_attn_func"]
    arrays = (*plain(*sizes), torch.tensor([0.5, -1.0, 2.0, 0.0]))

    def function(q: Any, k: Any, v: Any, sink: Any) -> Any:
        return call(q, k, v, dropout_p=0.4, learned_sink=sink, return_attn_probs=True)[:2]

    made, back = torch.func.vjp(function, *arrays)
    upstream = tuple(torch.randn(3, *x.shape) for x in made)
    expected = [torch.stack(each) for each in zip(*(back(each) for each in zip(*upstream, strict=True)), strict=True)]
    for randomness in ("different", "error"):
        close(torch.func.vmap(back, randomness=randomness)(upstream), expected)


def test_mapped_gradients_of_mapped_dropout():
    arrays = plain(3, 2, 40)
    call = lambda q, k, v: fa.flash_attn_func(q, k, v, 0.4)  # noqa: E731
    torch.manual_seed(3)
    tensors = [x.clone().requires_grad_() for x in arrays]
    expected = gradients(torch.func.vmap(call, randomness="different")(*tensors).sin().sum(), tensors)
    torch.manual_seed(3)
    loss = torch.func.grad(lambda *x: call(*x).sin().sum(), argnums=(0, 1, 2))
    close(torch.func.vmap(loss, randomness="different")(*arrays), expected)


def test_vmap_over_offsets_is_refused():
    ends = torch.tensor([[0, 5, 12], [0, 6, 12]], dtype=torch.int32)
    arrays = plain(12)
    call = lambda ends: fa.flash_attn_varlen_func(*arrays, ends, ends, 7, 7)  # noqa: E731
    with pytest.raises(fa.UnsupportedArgumentError, match=r"cu_seqlens_q: got a tensor that vmap maps over.*in_dims=None"):
        torch.func.vmap(call)(ends)


@pytest.mark.parametrize("name", ["jvp", "jacfwd", "jvp of vmap", "vmap of jvp"])
def test_forward_mode_is_refused_by_name(name: str):
    q, k, v = plain()
    call = lambda q: fa.flash_attn_func(q, k, v)  # noqa: E731
    mapped = torch.func.vmap(call)
    many = q.expand(3, *q.shape)
    calls = {
        "jvp": lambda: torch.func.jvp(call, (q,), (q,)),
        "jacfwd": lambda: torch.func.jacfwd(call)(q),
        "jvp of vmap": lambda: torch.func.jvp(mapped, (many,), (many,)),
        "vmap of jvp": lambda: torch.func.vmap(lambda q: torch.func.jvp(call, (q,), (q,)))(many),
    }
    with pytest.raises(fa.FeatureNotBuiltError, match=r"forward_mode.*primal"):
        calls[name]()


def test_second_derivatives_are_refused_by_name():
    q, k, v = plain()
    first = torch.func.grad(lambda q: fa.flash_attn_func(q, k, v).sin().sum())
    with pytest.raises(fa.FeatureNotBuiltError, match="double_backward"):
        torch.func.grad(lambda q: first(q).sum())(q)
    assert torch.func.jacrev(lambda q: fa.flash_attn_func(q, k, v).sum((1, 2)))(q).shape == (2, 16, *q.shape)


class Noting(TorchDispatchMode):
    """Notes the operators that it sees, with their arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, dict[str, Any]] = {}

    def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), options: Any = None) -> Any:
        names = (argument.name for argument in function._schema.arguments)
        self.seen[function] = {**dict(zip(names, arguments, strict=False)), **(options or {})}
        return function(*arguments, **(options or {}))


def test_a_dispatch_mode_sees_the_call():
    tensors = leaves()
    with Noting() as mode:
        gradients(fa.flash_attn_func(*tensors, 0.2).sin().sum(), tensors)
    assert {operators.draw_seed.default, operators.attention.default, operators.attention_backward.default} <= set(mode.seen)


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_operator_is_as_deterministic_as_the_call(deterministic: bool):
    """Which changes nothing on the CPU."""
    tensors = leaves()
    with Noting() as whole:
        gradients(fa.flash_attn_func(*tensors, deterministic=deterministic).sum(), tensors)
    loss = fa.flash_attn_func(*tensors, deterministic=deterministic).sum()
    with Noting() as backward:
        gradients(loss, tensors)
    for mode, operator in ((whole, operators.attention), (whole, operators.attention_backward), (backward, operators.attention_backward)):
        assert mode.seen[operator.default].get("deterministic", False) is deterministic


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_flops_are_counted(packed: bool):
    """Those of the products: QK^T and PV forward, QK^T, dP, dV, dQ and dK backward."""
    sizes, call = FORMS["flash_attn_varlen_func" if packed else "flash_attn_func"]
    q, k, v = leaves(*sizes)
    v = torch.cat((v, v[..., :8]), -1).detach().requires_grad_()
    scores = 4 * (5 * 5 + 7 * 7 if packed else 2 * 6 * 6)
    with FlopCounterMode(display=False) as counted:
        call(q, k, v, causal=True).sum().backward()
    expected = {operators.attention: 2 * scores * (16 + 24), operators.attention_backward: 2 * scores * (3 * 16 + 2 * 24)}
    assert counted.get_flop_counts()["Global"] == expected


@pytest.mark.parametrize(("longest", "scores"), [(2, 4 * 3 * 2 * 2), (7, 4 * 12 * 12), (torch.tensor(7), 4 * 12 * 12)], ids=str)
def test_flops_of_offsets_without_values_are_the_most_there_can_be(longest: Any, scores: int):
    q, k, v = (x.to("meta") for x in plain(12))
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    lengths = {f"longest_{of}" if isinstance(longest, torch.Tensor) else f"max_seqlen_{of}": longest for of in "qk"}
    with FlopCounterMode(display=False) as counted:
        operators.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, **lengths)
    assert counted.get_total_flops() == 2 * scores * (16 + 16)


# Of a call that autograd recorded while nothing watched it:


def recorded(packed: bool, dropout_p: float = 0.0) -> tuple[tuple[Any, Any], list[Any]]:
    """O and LSE of an eager call with all options, and what has gradients."""
    sizes, call = FORMS["flash_attn_varlen_func" if packed else "flash_attn_func"]
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    options = OPTIONS["all"] | {"dropout_p": dropout_p, "learned_sink": sink}
    tensors = leaves(*sizes)
    out, lse, _ = call(*tensors, **options)
    return (out, lse), [*tensors, sink]


def test_a_dispatch_mode_sees_the_backward_alone():
    (out, _), tensors = recorded(packed=False)
    with Noting() as mode:
        made = torch.autograd.grad(out.sin().sum(), tensors, retain_graph=True)
    assert operators.attention_backward.default in mode.seen
    assert all(torch.equal(one, other) for one, other in zip(made, gradients(out.sin().sum(), tensors), strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("through", ["o", "lse", "both"])
def test_batched_gradients(through: str, packed: bool, dropout_p: float):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` asks for."""
    made, tensors = recorded(packed, dropout_p)
    outputs = {"o": made[:1], "lse": made[1:], "both": made}[through]
    upstream = [torch.randn(3, *x.shape) for x in outputs]

    def found(upstream: Any, **options: Any) -> list[Any]:
        return list(torch.autograd.grad(outputs, tensors, upstream, retain_graph=True, **options))

    one_by_one = [found(each) for each in zip(*upstream, strict=True)]
    close(found(upstream, is_grads_batched=True), (torch.stack(each) for each in zip(*one_by_one, strict=True)))


def test_second_derivatives_through_batched_gradients_are_refused_by_name():
    (out, _), tensors = recorded(packed=False)
    made = torch.autograd.grad(out, tensors, torch.randn(3, *out.shape), is_grads_batched=True, create_graph=True)
    with pytest.raises(fa.FeatureNotBuiltError, match="double_backward"):
        made[0].sum().backward()


def test_a_vectorized_jacobian():
    tensors = tuple(x.double() for x in plain(1, 3))
    call = lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True)  # noqa: E731
    close(*(torch.autograd.functional.jacobian(call, tensors, vectorize=vectorize) for vectorize in (True, False)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # it asks for it of what was saved
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiled_autograd(packed: bool):
    (out, lse), tensors = recorded(packed, 0.4)
    loss = out.sin().sum() + lse.clamp(min=-9).sum()
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    torch._dynamo.reset()
    close((x.grad for x in tensors), expected)
