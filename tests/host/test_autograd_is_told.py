"""What torch does to calls that it does not see: tangents, traces, graphs, and the version counter of ``out``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip


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


def test_a_request_in_make_fx_is_refused_by_name():
    from torch.fx.experimental.proxy_tensor import make_fx

    with pytest.raises(fa.FeatureNotBuiltError, match=r"recorded by make_fx.*flash_attn_func") as caught:
        make_fx(lambda q, k, v: fa.run(fa.DenseFwdRequest(q.sin(), k, v)).out)(*qkv())
    assert caught.value.feature == "tracing"


def test_a_request_in_make_fx_before_dispatch_is_refused_by_name():
    from torch.fx.experimental.proxy_tensor import make_fx

    with pytest.raises(fa.FeatureNotBuiltError, match="recorded by make_fx"):
        make_fx(lambda q, k, v: fa.run(fa.DenseFwdRequest(q.sin(), k, v)).out, pre_dispatch=True)(*qkv())


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


def test_a_request_in_jit_trace_is_refused_by_name():
    with pytest.raises(fa.FeatureNotBuiltError, match=r"recorded by torch\.jit\.trace"):
        torch.jit.trace(lambda q, k, v: fa.run(fa.DenseFwdRequest(q, k, v)).out, tuple(qkv()))


@pytest.mark.parametrize("order", ["import torch, atomr_accel_flashattn", "import atomr_accel_flashattn, torch"])
def test_operators_are_there_once_torch_is(order: str):
    code = (
        f"{order}; import sys; assert 'torch._dynamo' not in sys.modules; "
        "assert 'atomr_accel_flashattn.functional' not in sys.modules; x = torch.ones(1, 4, 2, 16); "
        "op = torch.ops.atomr_accel_flashattn.attention; from atomr_accel_flashattn import flash_attn_func as f; "
        "assert torch.equal(op(x, x, x)[0], f(x, x, x)); "
        "g = torch.compile(lambda x: f(x.sin(), x, x) * 2, backend='eager', fullgraph=True); "
        "assert torch.equal(g(x), f(x.sin(), x, x) * 2)"
    )
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
