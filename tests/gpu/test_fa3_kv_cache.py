"""Calls of many queries over a KV cache, which the wgmma family answers: prefill in chunks, speculative tokens of many heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.runtime import execute  # noqa: E402
from tests.cases import Case  # noqa: E402
from tests.gpu.families import DEVICE, HAS_WGMMA, blocks_for, use_family  # noqa: E402
from tests.gpu.harness import poison_workspaces  # noqa: E402
from tests.gpu.jitter import headers_with_naps, use_headers  # noqa: E402
from tests.kv_cache import cases  # noqa: E402
from tests.kv_cache.cases import CacheCase, build, check_cached, fill, request_of  # noqa: E402
from tests.kv_cache.kernel_cases import PREFILL, check_append, check_entries_outside, with_new_tokens  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(not HAS_WGMMA, reason="wgmma is of Hopper")]


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> Any:
    """Half of the tests see a card of three SMs, where blocks are persistent."""
    record_property("family", Family.FA3.value)
    with use_family(Family.FA3, monkeypatch, blocks_for(request.node.nodeid)):
        yield Family.FA3


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are made on the device, and every workspace is full of NaN before a call."""
    monkeypatch.setattr(cases, "DEVICE", DEVICE)
    poison_workspaces(monkeypatch, execute)


def header(case: CacheCase) -> str:
    inputs = build(case.call)
    spec: Any = fa.lookup(request_of(case, inputs, fill(case, inputs))[0].dispatch_key())
    return str(spec.HEADER)


@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_paged_fa3_grid(case: CacheCase):
    check_cached(case)


def test_most_of_the_grid_is_answered_by_wgmma():
    headers = [header(case) for case in PREFILL]
    assert headers.count("fa3_kvcache") > 0.9 * len(headers)


@pytest.mark.parametrize("case", PREFILL[::6], ids=str)
def test_paged_fa3_bits_are_equal_from_run_to_run(case: CacheCase):
    inputs = build(case.call)
    request, _ = request_of(case, inputs, fill(case, inputs))
    first = [x.clone() for x in (fa.run(request).out, fa.run(request).lse)]
    for _ in range(20):
        again = fa.run(request)
        assert torch.equal(again.out, first[0])
        assert torch.equal(again.lse, first[1])


@pytest.mark.parametrize("case", PREFILL[::12], ids=str)
def test_paged_fa3_naps_change_no_bits(case: CacheCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inputs = build(case.call)
    request, _ = request_of(case, inputs, fill(case, inputs))
    first = [x.clone() for x in (fa.run(request).out, fa.run(request).lse)]
    use_headers(headers_with_naps(tmp_path / "cuda"), monkeypatch)
    for _ in range(100):
        again = fa.run(request)
        assert torch.equal(again.out, first[0])
        assert torch.equal(again.lse, first[1])


@pytest.mark.parametrize("block_size", [8, 16, 64, 128, 256])
@pytest.mark.parametrize("width", [(64, 64), (128, 128), (192, 128), (256, 256), (96, 96), (32, 32), (64, 256)])
def test_paged_fa3_bits_do_not_depend_on_pages(block_size: int, width: tuple[int, int]):
    """Nor on whether the cache is contiguous."""
    call = Case(lengths_q=(200,), lengths_k=(1501,), heads=8, heads_kv=2, head_dim=width[0], v_head_dim=width[1], right=0)
    runs = []
    for size in (0, block_size):
        case = CacheCase(call=call, block_size=size, num_splits=3)
        assert header(case) == "fa3_kvcache"
        inputs = build(call)
        output = fa.run(request_of(case, inputs, fill(case, inputs))[0])
        runs.append((output.out.clone(), output.lse.clone()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("page", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("splits", [0, 1, 2, 5])
def test_paged_fa3_entries_outside_the_cache_are_no_keys(page: int, softcap: float, splits: int):
    check_entries_outside(queries=70, page=page, softcap=softcap, num_splits=splits)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("rotary_dim", [0, 32])
def test_paged_fa3_chunks_are_appended_and_attended(paged: bool, rotary_dim: int):
    check_append(with_new_tokens(paged=paged, new=20, q_len=40, rotary_dim=rotary_dim), causal=True)


def test_paged_fa3_captured_call_follows_lengths_and_pages():
    """One graph: lengths and the table change in place between replays."""
    call = Case(lengths_q=(80, 80), lengths_k=(900, 333), heads=8, heads_kv=2, right=0)
    case = CacheCase(call=call, num_splits=4)
    inputs = build(call)
    request, out = request_of(case, inputs, fill(case, inputs))
    fa.run(request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fa.run(request)
    for lengths in ([80, 80], [500, 81], [900, 0], [0, 333]):
        request.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        fa.run(request)
        assert torch.equal(replayed, out)
        assert torch.isfinite(out).all()


def test_paged_fa3_pages_beyond_2_31_elements():
    if torch.cuda.mem_get_info(DEVICE)[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    page = (16, 8, 128)
    many = 2**31 // (16 * 8 * 128) + 100
    q = torch.randn(1, 128, 16, 128, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    tail = [torch.randn(40, *page, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    length = torch.tensor([629], dtype=torch.int32, device=DEVICE)
    answers = []
    for blocks in (40, many):
        k, v = (torch.full((blocks, *page), float("nan"), device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        k[-40:], v[-40:] = tail
        table = torch.arange(blocks - 40, blocks, dtype=torch.int32, device=DEVICE)[None]
        answers.append(fa.run(fa.PagedAttentionRequest(q, k, v, table, length, mask=fa.MaskKind.causal())).out)
        del k, v
        torch.cuda.empty_cache()
    assert torch.equal(*answers)
    assert torch.isfinite(answers[0]).all()


def test_paged_fa3_many_splits_and_lengths():
    for splits in (2, 3, 16, 64, 128):
        lengths = tuple(range(1 + splits, 3000, 701))
        call = Case(lengths_q=(64,) * len(lengths), lengths_k=lengths, heads=2, heads_kv=2, learned_sink=True, right=0)
        check_cached(replace(CacheCase(call=call), num_splits=splits))
