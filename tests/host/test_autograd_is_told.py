"""What torch does to calls that it does not see: tangents, traces, graphs, and the version counter of ``out``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn import functional  # noqa: E402


def qkv(*lead: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*(lead or (1, 16)), 2, 32, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("dual", range(3), ids="qkv")
def test_a_tangent_is_refused_by_name(dual: int):
    arrays = qkv()
    with torch.autograd.forward_ad.dual_level():
        arrays[dual] = torch.autograd.forward_ad.make_dual(arrays[dual], torch.ones_like(arrays[dual]))
        with pytest.raises(fa.FeatureNotBuiltError, match=r"forward_mode.*primal") as caught:
            fa.flash_attn_func(*arrays)
        assert caught.value.feature == "forward_mode"
        arrays[dual] = torch.autograd.forward_ad.unpack_dual(arrays[dual]).primal
        assert torch.equal(fa.flash_attn_func(*arrays), fa.flash_attn_func(*qkv()))


def test_make_fx_is_refused_by_name():
    from torch.fx.experimental.proxy_tensor import make_fx

    with pytest.raises(fa.FeatureNotBuiltError, match="recorded by make_fx") as caught:
        make_fx(lambda q, k, v: fa.flash_attn_func(q.sin(), k, v) * 2)(*qkv())
    assert caught.value.feature == "tracing"


def test_make_fx_before_dispatch_is_refused_by_name():
    from torch.fx.experimental.proxy_tensor import make_fx

    with pytest.raises(fa.FeatureNotBuiltError, match="recorded by make_fx"):
        make_fx(lambda q, k, v: fa.flash_attn_func(q.sin(), k, v) * 2, pre_dispatch=True)(*qkv())


def test_a_call_is_not_repeated_inside_of_a_dispatch_mode():
    """A tensor guard made outside of make_fx does not see it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from atomr_accel_flashattn.arrays.torch_hooks import guard_of, hooks, meet_torch

    meet_torch()
    x, seen = torch.zeros(2, 3), []
    same = guard_of(hooks.guard, (x,))
    make_fx(lambda y: seen.append((same(x), hooks.count_modes())) or y * 2)(x)
    assert hooks.count_modes() == 0
    assert seen[0][1] > 0, "nothing tells repeat() that it is being recorded"


def test_jit_trace_is_refused_by_name():
    with pytest.raises(fa.FeatureNotBuiltError, match=r"recorded by torch\.jit\.trace"):
        torch.jit.trace(fa.flash_attn_func, tuple(qkv()))


@pytest.mark.parametrize("name", functional.__all__)
def test_compile_breaks_its_graph_before_a_call(name: str):
    call, packed = getattr(fa, name), "varlen" in name
    q, k, v = qkv(16) if packed else qkv()
    offsets = torch.tensor([0, 5, 16], dtype=torch.int32)
    arrays = (q, k, v)
    if "qkvpacked" in name:
        arrays = (torch.stack((q, k, v), dim=1 if packed else 2),)
    elif "kvpacked" in name:
        arrays = (q, torch.stack((k, v), dim=1 if packed else 2))
    lengths = () if not packed else (offsets, 11) if "qkvpacked" in name else (offsets, offsets, 11, 11)

    def model(*arrays: Any) -> Any:
        return call(arrays[0].sin(), *arrays[1:], *lengths, causal=True) * 2

    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(*arrays), model(*arrays))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no operators of torch yet"):
        torch.compile(model, backend="eager", fullgraph=True)(*arrays)


def test_compile_breaks_its_graph_where_torch_was_imported_after_us():
    code = (
        "from atomr_accel_flashattn import flash_attn_func as f; import sys; assert 'torch' not in sys.modules; import torch; "
        "x = torch.ones(1, 4, 2, 16); g = torch.compile(lambda x: f(x.sin(), x, x) * 2, backend='eager'); "
        "assert torch.equal(g(x), f(x.sin(), x, x) * 2)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_to_be_kept_out_of_graphs_imports_no_compiler():
    code = "import sys, torch, atomr_accel_flashattn as fa; fa.flash_attn_func; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_padded_out_counts_as_written_too():
    q, k, v = (torch.randn(1, 8, 2, 5) for _ in range(3))
    out = torch.empty(1, 8, 2, 5)
    fa.flash_attn_func(q, k, v, out=out)
    assert out._version > 0


@pytest.mark.parametrize("run", [False, True], ids=["function", "request"])
def test_a_backward_that_saved_what_out_overwrites_says_so(run: bool):
    arrays, out, leaf = qkv(), torch.ones(1, 16, 2, 32), torch.ones(1, 16, 2, 32, requires_grad=True)
    product = (leaf * out).sum()
    if run:
        fa.run(fa.DenseFwdRequest(*arrays, out=out))
    else:
        fa.flash_attn_func(*arrays, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
