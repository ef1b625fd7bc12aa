"""Training as users of torch do it: checkpointing and autocast, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

from torch._dynamo.backends.common import aot_autograd  # noqa: E402 - after the skip
from torch._functorch.aot_autograd import make_boxed_func  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts  # noqa: E402

import atomr_accel_flashattn as fa  # noqa: E402
from tests.operators.calls import gradients, leaves, operators  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attend(q: Any, k: Any, v: Any) -> Any:
    """Two calls, each with a dropout of its own."""
    return fa.flash_attn_func(fa.flash_attn_func(q.sin(), k, v, 0.5).cos(), k, v, 0.3)


def recompute_all(_ctx: Any, _operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_attention(_ctx: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    saved = operator in {operators.attention.default, operators.draw_seed.default}
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


WAYS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective, recomputed": {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, recompute_all)},
    "selective, saved": {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, save_attention)},
}


def step(function: Callable[..., Any]) -> list[Any]:
    tensors = leaves(2, 30)
    torch.manual_seed(1)
    function(*tensors).sin().sum().backward()
    return [x.grad for x in tensors]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_draws_the_same_dropout(way: str, compiled: bool):
    function = partial(checkpoint, attend, **WAYS[way])
    if compiled and way == "reentrant":
        pytest.skip("torch.compile has no graph for the reentrant way")
    if compiled:
        function = torch.compile(
            lambda q, k, v: checkpoint(attend, q, k, v, **WAYS[way]), fullgraph=True, backend="aot_eager_decomp_partition"
        )
    for one, other in zip(step(function), step(attend), strict=True):
        torch.testing.assert_close(one, other)


def test_a_policy_saves_the_operator():
    """In the backward nothing of it runs again."""
    calls: list[Any] = []

    def noting(ctx: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        calls.append((ctx.is_recompute, operator))
        return save_attention(ctx, operator, *arguments, **options)

    context = partial(create_selective_checkpoint_contexts, noting)
    step(partial(checkpoint, attend, use_reentrant=False, context_fn=context))
    assert (False, operators.attention.default) in calls


@pytest.mark.parametrize("region", [False, True], ids=["", "of a region"])
@pytest.mark.parametrize("budget", [0.0, 1e-6, 0.01, 0.5])
def test_a_memory_budget_draws_the_same_dropout(budget: float, region: bool):
    """With a budget of 0 torch saves nothing but inputs."""

    def in_region(*tensors: Any) -> Any:
        with torch.autograd.graph.region_activation_memory_budget(budget):
            return attend(*tensors)

    with torch._functorch.config.patch(activation_memory_budget=1.0 if region else budget):
        made = step(torch.compile(in_region if region else attend, fullgraph=True, backend="aot_eager_decomp_partition"))
    for one, other in zip(made, step(attend), strict=True):
        torch.testing.assert_close(one, other)


class Block(torch.nn.Module):
    """Attention with dropout, and products beside which a drawn seed weighs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = torch.nn.Linear(32, 96), torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)

    def forward(self, x: Any) -> Any:
        """The same shape from x (B, S, 32)."""
        out = fa.flash_attn_qkvpacked_func(self.qkv(x).unflatten(-1, (3, 2, 16)), 0.3, causal=True)
        x = x + out.flatten(2)
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def partitioned(budget: float, **config: Any) -> list[Any]:
    """What the backward calls of two blocks that are compiled with a memory budget. Their gradients are those of the eager ones."""
    torch.manual_seed(0)
    model, graphs = torch.nn.Sequential(Block(), Block()), []
    tensors = [torch.randn(2, 200, 32, requires_grad=True), *model.parameters()]

    def keep(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    made = []
    with torch._functorch.config.patch(activation_memory_budget=budget, **config):
        for function in (torch.compile(model, fullgraph=True, backend=backend), model):
            torch.manual_seed(1)
            made.append(gradients(function(tensors[0]).sin().sum(), tensors))
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return [node.target for node in graphs[-1].graph.nodes]


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5])
def test_a_memory_budget_keeps_seeds_and_knows_what_attention_costs(budget: float):
    """torch weighs what it may save by operations: a product of millions beside a draw of none, which float32 rounds away."""
    called = partitioned(budget, is_non_builtin_to_include=True)
    assert operators.draw_seed.default not in called
    assert operators.attention.default not in called
    assert torch.ops.aten.addmm.default in called, "nothing is computed again"


def mixed() -> list[Any]:
    q, k, v = leaves()
    return [q, k, v.detach().bfloat16().requires_grad_()]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_autocast(compiled: bool, packed: bool):
    """float32 q and k beside a bf16 v: bf16 inside, gradients of the types of before; the LSE stays float32."""
    tensors = mixed()
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)

    def call(q: Any, k: Any, v: Any) -> Any:
        if packed:
            arrays = (x.flatten(0, 1) for x in (q, k, v))
            return fa.flash_attn_varlen_func(*arrays, ends, ends, 6, 6, causal=True, return_attn_probs=True)[:2]
        return fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2]

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = function(*tensors)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    made = gradients(out.float().sin().sum() + lse.sum(), tensors)
    assert [x.dtype for x in made] == [torch.float32, torch.float32, torch.bfloat16]
    expected_out, expected_lse = call(*(x.bfloat16() for x in tensors))
    expected = gradients(expected_out.float().sin().sum() + expected_lse.sum(), tensors)
    assert torch.equal(out, expected_out)
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_takes_the_type_of_now(compiled: bool):
    function = torch.compile(fa.flash_attn_func, backend="aot_eager", fullgraph=True) if compiled else fa.flash_attn_func
    half = [x.detach().half() for x in leaves()]
    double = [x.detach().double() for x in leaves()]
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert function(*leaves()).dtype is dtype
            assert function(*half).dtype is dtype
            assert function(*double).dtype is torch.float64
            with torch.autocast("cpu", enabled=False):
                assert function(*half).dtype is torch.float16
    assert function(*leaves()).dtype is torch.float32
