"""The operators of torch on the card: opcheck, torch.compile, open lengths, autocast, and graphs whose replays draw dropout anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts  # noqa: E402 - after the skip

import atomr_accel_flashattn as fa  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.torch_ops import repeat  # noqa: E402
from tests.gpu.families import DEVICE  # noqa: E402
from tests.gpu.test_gradients import close, gradients, leaves, normal  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

operators = torch.ops.atomr_accel_flashattn


@pytest.fixture
def family() -> Family:
    """The backward is that of one family, whichever ran the forward; its forward is that of the card."""
    return Family.FA2


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ends(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("name", ["dense", "packed", "all"])
def test_opcheck(name: str):
    sink, slopes = normal(4, dtype=torch.float32).requires_grad_(), normal(4, dtype=torch.float32).abs()
    operands = {
        "dense": (*leaves(2, 100),),
        "packed": (*leaves(150), None, None, None, ends(0, 0, 61, 130), ends(0, 0, 61, 130), 70, 70),
        "all": (*leaves(2, 100), sink, slopes, operators.draw_seed(normal(1)), None, None, 0, 0, None, None, 0.1, 40, 0, 20.0, 0.2, 2),
    }[name]
    # additions to dQ come in any order, so test_aot_dispatch_dynamic compares what is equal within rounding only
    torch.library.opcheck(operators.attention.default, operands, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_repeated_calls_make_no_request_and_are_those_of_a_first_one(layout: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch):
    """Other tensors each time, in and out of the recording of autograd."""
    sizes = (150,) if layout == "packed" else (2, 100)
    offsets: dict[str, Any] = {} if layout == "dense" else {"cu_seqlens_q": ends(0, 61, 150), "max_seqlen_q": 89, "max_seqlen_k": 89}
    offsets |= {"cu_seqlens_k": offsets["cu_seqlens_q"]} if offsets else {}
    dout = normal(*sizes, 4, 64, seed=9)

    def step(seed: int) -> list[Any]:
        tensors = [normal(*sizes, heads, 64, seed=3 * seed + i) for i, heads in enumerate((4, 2, 2))]
        rng = torch.tensor([seed, 1], device=DEVICE) if dropout_p else None
        options = {"rng": rng, "window_right": 0, "dropout_p": dropout_p, "deterministic": True, **offsets}
        with torch.no_grad():
            out, lse, _ = operators.attention(*tensors, **options)
            return [out, lse, *operators.attention_backward(dout, None, out, lse, *tensors, **options)[:3]]

    expected = []
    for seed in range(4):
        repeat.clear()
        expected.append(step(seed))
    made: list[Any] = []
    for kind in (fa.DenseFwdRequest, fa.VarlenFwdRequest, fa.DenseBwdRequest, fa.VarlenBwdRequest):
        check = kind.__post_init__
        monkeypatch.setattr(kind, "__post_init__", lambda request, check=check: made.append(request) or check(request))
    for seed, right in enumerate(expected):
        assert all(torch.equal(one, other) for one, other in zip(step(seed), right, strict=True)), seed
    assert not made, "the last of the first calls left a shortcut"


def packed(q: Any, k: Any, v: Any, **options: Any) -> Any:
    offsets = ends(0, 0, 61, 130)
    return fa.flash_attn_varlen_func(q, k, v, offsets, offsets, 70, 70, **options)


CALLS: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "dense": ((2, 130), lambda q, k, v: fa.flash_attn_func(q.sin(), k, v, causal=True)),
    "dropout": ((2, 130), lambda q, k, v: fa.flash_attn_func(q.sin(), k, v, 0.3)),
    "padded": ((2, 130), lambda q, k, v: fa.flash_attn_func(q[..., :60], k[..., :60], v[..., :52])),
    "heads first": ((2, 4, 130), lambda q, k, v: fa.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)),
    "packed": ((150,), lambda q, k, v: packed(q.sin(), k, v, causal=True)),
    "qkvpacked": ((2, 130), lambda q, k, v: fa.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), window_size=(40, 0))),
    "lse": ((2, 130), lambda q, k, v: fa.flash_attn_func(q, k, v, return_attn_probs=True)[1]),
}


def inputs(name: str) -> list[Any]:
    sizes, _ = CALLS[name]
    if name == "heads first":
        return [normal(2, 4, 130, 64, seed=i).requires_grad_() for i in range(3)]
    return leaves(*sizes, heads=(4, 4) if name == "qkvpacked" else (4, 2))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_forward_and_backward(name: str, backend: str):
    call = CALLS[name][1]

    def run(function: Callable[..., Any]) -> list[Any]:
        tensors = inputs(name)
        torch.manual_seed(3)
        out = function(*tensors)
        made = torch.autograd.grad(out.float().square().sum(), tensors, allow_unused=True)
        return [out.detach(), *(torch.zeros_like(x) if dx is None else dx for dx, x in zip(made, tensors, strict=True))]

    close(run(torch.compile(call, fullgraph=True, backend=backend)), run(call))


@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_lengths_compile_once(kind: str):
    call = lambda q, k, v, offsets, most: fa.flash_attn_varlen_func(q, k, v, offsets, offsets, most, most, causal=True)  # noqa: E731
    function = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(5, 55):
            arguments = (*leaves(3 * n), ends(0, n, 3 * n), 2 * n if kind == "int" else torch.tensor(2 * n, device=DEVICE))
            out = function(*arguments)
            close([out.detach()], [call(*arguments).detach()], 0.0)
            gradients(out.float().sum(), list(arguments[:3]))


def step_of(compiled: bool) -> tuple[Any, Any, Callable[[], None]]:
    """A training step with dropout, on tensors that stay where they are: leaves, o, and the step."""
    tensors, out = leaves(2, 130), torch.zeros(2, 130, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    call = lambda q, k, v: fa.flash_attn_func(q, k, v, 0.4)  # noqa: E731
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call

    def step() -> None:
        for x in tensors:
            x.grad.zero_()
        made = function(*tensors)
        out.copy_(made.detach())
        made.float().square().sum().backward()

    for x in tensors:
        x.grad = torch.zeros_like(x)
    return tensors, out, step


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_replays_of_a_captured_training_step_advance_the_dropout(compiled: bool):
    tensors, out, step = step_of(compiled)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replayed(seed: int, count: int) -> list[list[Any]]:
        torch.manual_seed(seed)
        made = []
        for _ in range(count):
            graph.replay()
            made.append([out.clone(), *(x.grad.clone() for x in tensors)])
        return made

    first, second = replayed(5, 2)
    assert not torch.equal(first[0], second[0]), "two replays dropped the same"
    again, _ = replayed(5, 2)
    assert torch.equal(again[0], first[0]), "the generator does not decide on the dropout of a replay"
    close(again[1:], first[1:])
    torch.manual_seed(5)  # the generator as before the first replay: an eager step draws what the replay drew
    step()
    assert torch.equal(out, first[0])
    close([x.grad for x in tensors], first[1:])


def test_reduced_overhead_draws_anew():
    """Gradients lie in memory of the graphs too: no step may add to those of the step before (torch's issue 169545)."""
    tensors = leaves(2, 130)
    function = torch.compile(lambda q, k, v: fa.flash_attn_func(q, k, v, 0.4), fullgraph=True, mode="reduce-overhead")
    made = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        out = function(*tensors)
        gradients(out.float().square().sum(), tensors)
        made.append(out.detach().clone())
    assert not any(torch.equal(one, other) for one, other in pairwise(made))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(compiled: bool):
    q, k, v = (x.detach() for x in leaves(2, 130))
    tensors = [q.float().requires_grad_(), k.float().requires_grad_(), v.requires_grad_()]
    call = lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True)  # noqa: E731
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    for _ in range(3):  # the first call, and ones like it
        with torch.autocast("cuda", torch.bfloat16):
            out = function(*tensors)
        assert out.dtype is torch.bfloat16
        made = gradients(out.float().square().sum(), tensors)
        assert [x.dtype for x in made] == [torch.float32, torch.float32, torch.bfloat16]
    expected = leaves(2, 130)
    close(made, gradients(call(*expected).float().square().sum(), expected))


def test_autocast_takes_the_type_of_now():
    tensors = [x.detach() for x in leaves(2, 130)]
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16, torch.float16):
        for _ in range(3):
            with torch.autocast("cuda", dtype):
                assert fa.flash_attn_func(*tensors).dtype is dtype
    assert fa.flash_attn_func(*(x.half() for x in tensors)).dtype is torch.float16


def test_vmap_and_func_grad():
    q, k, v = (x.detach() for x in leaves(3, 2, 70))
    loss = lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True).float().square().sum()  # noqa: E731
    made = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    each = [torch.func.grad(loss, argnums=(0, 1, 2))(*x) for x in zip(q, k, v, strict=True)]
    close(list(made), [torch.stack(x) for x in zip(*each, strict=True)])


def attend_twice(q: Any, k: Any, v: Any) -> Any:
    """Two calls, each with a dropout of its own, the second on what the first gives."""
    return fa.flash_attn_func(fa.flash_attn_func(q.sin(), k, v, 0.4).cos(), k, v, 0.3)


def trained(function: Callable[..., Any]) -> list[Any]:
    """Gradients of a step."""
    tensors = leaves(2, 130)
    torch.manual_seed(1)
    function(*tensors).float().square().sum().backward()  # the reentrant way takes no torch.autograd.grad
    return [x.grad for x in tensors]


WAYS = ["reentrant", "not reentrant", "selective", "compiled", "compiled, selective", "compiled, budget 0.3", "compiled, budget 0"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_is_computed_again_has_the_same_dropout(way: str):
    """The generator is that of the card, whose state torch keeps in other ways than that of the CPU.

    What a compiled graph draws again, torch draws from generators that it seeds anew for the graph, unless it is told not to: the
    gradients are not those of an eager step then.
    """
    keep = partial(create_selective_checkpoint_contexts, [operators.attention.default, operators.draw_seed.default])
    options: dict[str, Any] = {"use_reentrant": way == "reentrant"} | ({"context_fn": keep} if "selective" in way else {})
    again = lambda q, k, v: checkpoint(attend_twice, q, k, v, **options)  # noqa: E731
    expected = trained(attend_twice)
    for _ in range(3):  # the first call, and ones like it
        with torch._functorch.config.patch(graphsafe_rng_functionalization=False):
            if "budget" in way:
                with torch._functorch.config.patch(activation_memory_budget=float(way.rpartition(" ")[2])):
                    made = trained(torch.compile(attend_twice, fullgraph=True, backend="aot_eager_decomp_partition"))
            elif "compiled" in way:
                made = trained(torch.compile(again, fullgraph=True, backend="aot_eager_decomp_partition"))
            else:
                made = trained(again)
        close(made, expected)


@pytest.mark.parametrize("way", ["checkpoint", "budget 0"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_generators_of_a_compiled_graph_draw_the_dropout_of_the_forward_again(way: str):
    """Of calls that are linear in v, the sum of v and its gradient is the loss if the backward drops what the forward did."""
    both = lambda q, k, v: fa.flash_attn_func(q.sin(), k, v, 0.4) + fa.flash_attn_func(q.cos(), k, v, 0.3)  # noqa: E731
    again = both if way == "budget 0" else lambda q, k, v: checkpoint(both, q, k, v, use_reentrant=False)
    function = torch.compile(again, fullgraph=True, backend="aot_eager_decomp_partition")
    weights, losses = normal(2, 130, 4, 64, seed=5), []
    with torch._functorch.config.patch(activation_memory_budget=0.0 if way == "budget 0" else 1.0):
        for _ in range(4):
            tensors = leaves(2, 130)
            loss = (function(*tensors).double() * weights).sum()
            loss.backward()
            parts = tensors[2].grad.double() * tensors[2].detach()
            assert abs(loss.item() - parts.sum().item()) <= 1e-4 * parts.abs().sum().item()
            losses.append(loss.item())
    assert len(set(losses)) == 4  # a dropout of its own for each step


def test_batched_gradients_of_repeated_calls():
    for _ in range(3):
        tensors = leaves(2, 130)
        out = fa.flash_attn_func(*tensors, 0.3, causal=True)
        upstream = normal(3, *out.shape, seed=7)
        each = [torch.autograd.grad(out, tensors, x, retain_graph=True) for x in upstream]
        made = torch.autograd.grad(out, tensors, upstream, is_grads_batched=True)
        close(list(made), [torch.stack(x) for x in zip(*each, strict=True)])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd_of_repeated_calls():
    for _ in range(3):
        tensors = leaves(2, 130)
        loss = fa.flash_attn_func(*tensors, 0.3, causal=True).float().square().sum()
        expected = torch.autograd.grad(loss, tensors, retain_graph=True)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            loss.backward()
        close([x.grad for x in tensors], list(expected))
