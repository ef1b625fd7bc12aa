"""StepPlans on the device: lengths, tables and rows that change under a captured graph, many empty sequences, and a sweep of lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.runtime import step  # noqa: E402
from tests.gpu.families import DEVICE  # noqa: E402
from tests.gpu.harness import poison_workspaces  # noqa: E402
from tests.gpu.jitter import CACHE_NAPS, Flaw, headers_with_naps, use_headers  # noqa: E402
from tests.kv_cache import cases  # noqa: E402
from tests.kv_cache.cases import CacheCase, check_cached, download, upload  # noqa: E402
from tests.kv_cache.kernel_cases import APPENDS, HALF, PLANNED, close, with_new_tokens  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(DEVICE == "cpu", reason="a StepPlan does nothing on the CPU"),
]

PAGE, LONGEST, CLOSE = 64, 144 * 1024, {"rtol": 2e-2, "atol": 2e-3}


@pytest.fixture
def family() -> Family:
    """A cache is read by one family, on every card."""
    return Family.FA2


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are made on the device, and the memory of every plan is full of NaN when it is made."""
    monkeypatch.setattr(cases, "DEVICE", DEVICE)
    poison_workspaces(monkeypatch, step)


@pytest.mark.parametrize("case", PLANNED, ids=str)
def test_grid(case: CacheCase):
    check_cached(case)


def decode(batch: int, *, longest: int = LONGEST, pages: int | None = None, heads: int = 32, heads_kv: int = 8, width: int = 128) -> Any:
    """Arguments of a decode over pages; the table names pages at random."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
    entries = longest // PAGE
    pages = pages or batch * entries
    return {
        "q": normal(batch, 1, heads, width),
        "k_cache": normal(pages, PAGE, heads_kv, width),
        "v_cache": normal(pages, PAGE, heads_kv, width),
        "block_table": torch.randint(pages, (batch, entries), generator=generator, device=DEVICE, dtype=torch.int32),
        "seq_lens": torch.full((batch,), 16, device=DEVICE, dtype=torch.int32),
    }


def test_a_graph_captured_at_16_follows_lengths_and_table():
    """Replays at 0, 1, 4k and 144k, with another table and fill of the batch, have the bits of eager calls."""
    asked = decode(3)
    plan = fa.StepPlan.of(fa.PagedAttentionRequest(**asked))
    request = fa.PagedAttentionRequest(**asked, plan=plan)
    plan.schedule(asked["seq_lens"])
    fa.run(request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.schedule(asked["seq_lens"])
        made = fa.run(request)
    for index, lengths in enumerate([(0, 0, 0), (1, 0, 1), (4096, 1, 0), (LONGEST, 0, 1), (77, LONGEST, 4096), (16, 16, 16)]):
        asked["seq_lens"].copy_(torch.tensor(lengths))
        asked["block_table"].copy_(asked["block_table"].roll(index + 1, 1))
        made.out.fill_(float("nan"))
        graph.replay()
        replayed = made.out.clone(), made.lse.clone()
        plan.schedule(asked["seq_lens"])
        eager = fa.run(request)
        assert torch.equal(replayed[0], eager.out)
        assert torch.equal(replayed[1], eager.lse)
        alone = fa.run(fa.PagedAttentionRequest(**asked))
        close(replayed[0], download(alone.out), **CLOSE)
        close(replayed[1], download(alone.lse), rtol=0, atol=1e-3)


def test_a_schedule_that_was_only_captured_gives_nan():
    asked = decode(3)
    plan = fa.StepPlan.of(fa.PagedAttentionRequest(**asked))
    request = fa.PagedAttentionRequest(**asked, plan=plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.schedule(asked["seq_lens"])
    made = fa.run(request)
    assert made.out.isnan().all()
    assert made.lse.isnan().all()
    graph.replay()
    close(fa.run(request).out, download(fa.run(fa.PagedAttentionRequest(**asked)).out), **CLOSE)


@pytest.mark.parametrize("sink", [False, True])
def test_a_long_request_beside_1023_empty_slots_has_the_bits_that_it_has_alone(sink: bool):
    options = fa.AttentionOptions(learned_sink=torch.linspace(-1, 1, 32, device=DEVICE) if sink else None)
    many = decode(1024, longest=32768, pages=600)
    many["seq_lens"].zero_()
    many["seq_lens"][517] = 32768
    made, alone = (
        fa.run(cases.with_plan(fa.PagedAttentionRequest(**asked, options=options)))
        for asked in (many, {name: x if "cache" in name else x[517:518].contiguous() for name, x in many.items()})
    )
    assert torch.equal(made.out[517], alone.out[0])
    assert torch.equal(made.lse[517], alone.lse[0])
    empty = torch.arange(1024, device=DEVICE) != 517
    assert not made.out[empty].any()
    expected = options.learned_sink[:, None] if sink else torch.tensor(-float("inf"), device=DEVICE)
    torch.testing.assert_close(made.lse[empty], expected.expand(1023, 32, 1), rtol=2**-22, atol=0)  # by way of log2


@pytest.mark.parametrize(("heads", "heads_kv", "width"), [(8, 8, 64), (8, 1, 128), (10, 2, 128), (4, 1, 192)])
def test_lengths_1_to_5000(heads: int, heads_kv: int, width: int):
    """One plan, batches of five lengths: each call gives what the kernel gives whose blocks share nothing."""
    asked = decode(5, longest=5056, heads=heads, heads_kv=heads_kv, width=width)
    plan = fa.StepPlan.of(fa.PagedAttentionRequest(**asked))
    request = fa.PagedAttentionRequest(**asked, plan=plan)
    alone = fa.PagedAttentionRequest(**asked, num_splits=1)
    for first in range(1, 5001, 7):
        asked["seq_lens"].copy_(torch.tensor([first, 0, (first * 31) % 5001, (first * 7) % 300, 5000 - first + 1]))
        plan.schedule(asked["seq_lens"])
        made, expected = fa.run(request), fa.run(alone)
        torch.testing.assert_close(made.out, expected.out, **CLOSE)
        torch.testing.assert_close(made.lse, expected.lse, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", APPENDS)
def test_a_captured_call_that_appends_follows_what_its_arrays_hold(name: str):
    first, *others = (with_new_tokens(**APPENDS[name], seed=seed) for seed in range(4))
    device = {key: upload(x) if isinstance(x, np.ndarray) else x for key, x in first.items()}
    table = first.get("block_table")
    plan = fa.StepPlan(
        device["q"],
        batch=3,
        heads=4,
        heads_kv=2,
        head_dim=32,
        capacity=64 if table is None else 80,
        seqlen_q=first["q"].shape[1],
        mask=fa.MaskKind.causal(),
        new_tokens=first["k"].shape[1],
        left_pad=table is None,
    )

    def call() -> Any:
        plan.schedule(device["cache_seqlens"], cache_leftpad=device.get("cache_leftpad"))
        return fa.flash_attn_with_kvcache(**device, causal=True, step_plan=plan)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    for shift, asked in enumerate(others):
        asked["cache_seqlens"] = asked["cache_seqlens"] + np.int32(shift)
        for key, x in asked.items():
            if isinstance(x, np.ndarray):
                device[key].copy_(upload(x))
        graph.replay()
        host = {key: x.copy() if isinstance(x, np.ndarray) else x for key, x in asked.items()}
        close(made, fa.flash_attn_with_kvcache(**host, causal=True), **HALF)
        np.testing.assert_array_equal(download(device["k_cache"]), host["k_cache"], err_msg="bits of the cache")


@pytest.mark.parametrize("flawed", [False, True], ids=["sound", "flawed"])
def test_a_block_waits_between_its_units(flawed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Warps that nap between the steps of a merge: its memory takes the keys of the next unit, and bits change where nobody waits."""
    asked = decode(512, longest=256, pages=64)
    asked["seq_lens"].copy_(torch.arange(512) % 200 + 1)
    request = cases.with_plan(fa.PagedAttentionRequest(**asked))
    expected = fa.run(request).out.clone()
    folder = headers_with_naps(tmp_path / "cuda", CACHE_NAPS)
    if flawed:
        Flaw("kernels/step_kvcache.cuh", ((r"__syncthreads\(\);", "ptx::nap();"),)).apply(folder)
    use_headers(folder, monkeypatch)
    runs = [fa.run(request).out for _ in range(100)]
    assert any(not torch.equal(made, expected) for made in runs) is flawed


def test_layers_share_one_plan():
    """Other values, element types of the cache's kind and options of the softmax; equal lengths."""
    lengths = torch.tensor([3000, 0, 70, 1], device=DEVICE, dtype=torch.int32)
    layers = [decode(4, longest=3008) | {"seq_lens": lengths} for _ in range(3)]
    options = [fa.AttentionOptions(), fa.AttentionOptions(softcap=20.0), fa.AttentionOptions(softmax_scale=0.05)]
    plan = fa.StepPlan.of(fa.PagedAttentionRequest(**layers[0]))
    plan.schedule(lengths)
    for asked, option in zip(layers, options, strict=True):
        made = fa.run(fa.PagedAttentionRequest(**asked, options=option, plan=plan))
        expected = fa.run(fa.PagedAttentionRequest(**asked, options=option, num_splits=1))
        torch.testing.assert_close(made.out, expected.out, **CLOSE)
