"""merge_states on the device: halves of the keys make the whole, empty states change no bit, and a graph follows its arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from tests.gpu.families import DEVICE  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

TYPES = [torch.float16, torch.bfloat16, torch.float32]


def state_of(dtype: Any, shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    *lead, rows, heads, _ = shape
    o = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    lse = 20 * torch.randn((*lead, heads, rows), generator=generator, device=DEVICE)
    lse[..., ::3] = -torch.inf
    o[..., ::3, :, :] = 0
    return o, lse


def on_host(state: tuple[Any, Any]) -> tuple[Any, Any]:
    """float32 holds every number of all types, and one rounding is then compared."""
    return tuple(x.float().cpu().numpy() for x in state)


def check(made: tuple[Any, Any], *states: tuple[Any, Any]) -> None:
    expected = fa.merge_states(*on_host(states[0]), *on_host(states[1]))
    eps = torch.finfo(made[0].dtype).eps
    np.testing.assert_allclose(made[0].float().cpu().numpy(), expected[0], rtol=eps, atol=4 * max(eps / 8, 1e-7))
    np.testing.assert_allclose(made[1].cpu().numpy(), expected[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(2, 100, 8, 128), (1000, 4, 64), (3, 5, 3, 40), (7, 1, 20), (3, 2, 256), (4, 1, 300)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_gives_what_the_cpu_gives_and_commutes(dtype: Any, shape: tuple[int, ...]):
    first, second = (state_of(dtype, shape, seed) for seed in range(2))
    made = fa.merge_states(*first, *second)
    check(made, first, second)
    for one, other in zip(made, fa.merge_states(*second, *first), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_empty_state_merges_to_the_other_bitwise(dtype: Any):
    o, lse = state_of(dtype, (2, 33, 4, 64), 0)
    o[0, 1, 1, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    none, bits = (torch.zeros_like(o), torch.full_like(lse, -torch.inf)), torch.int32 if dtype is torch.float32 else torch.int16
    for made in (fa.merge_states(o, lse, *none), fa.merge_states(*none, o, lse)):
        assert torch.equal(made[0].view(bits), o.view(bits))
        assert torch.equal(made[1], lse)
    for made, expected in zip(fa.merge_states(*none, *none), none, strict=True):
        assert torch.equal(made, expected)


def test_a_captured_merge_accumulates_in_place():
    if DEVICE == "cpu":
        pytest.skip("CUDA graphs")
    total, part = (state_of(torch.float32, (64, 8, 128), seed) for seed in range(2))
    start = [x.clone() for x in total]
    fa.merge_states(*total, *part, out=total)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fa.merge_states(*total, *part, out=total)
    for seed in (2, 3):
        for x, y in zip(total, start, strict=True):
            x.copy_(y)
        for x, y in zip(part, state_of(torch.float32, (64, 8, 128), seed), strict=True):
            x.copy_(y)
        graph.replay()
        check(total, tuple(start), part)


def test_halves_of_the_keys_make_the_whole():
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    q, k, v = (torch.randn(2, n, 8, 64, generator=generator, device=DEVICE, dtype=torch.bfloat16) for n in (50, 300, 300))
    states = [fa.flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)[:2] for part in (slice(0, 100), slice(100, None))]
    out, lse = fa.merge_states(*states[0], *states[1])
    whole, whole_lse, _ = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(out, whole, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, whole_lse, atol=1e-3, rtol=0)
