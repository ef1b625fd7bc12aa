"""Calls over a KV cache on the device: the oracle's calls laid out among NaN, appends, CUDA graphs, and more than 2^31 elements."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.runtime import execute  # noqa: E402
from atomr_accel_flashattn.tiles.tables import cache_rows, cache_tile_for, head_dim_width  # noqa: E402
from atomr_accel_flashattn.types import SmArch  # noqa: E402
from tests.gpu.families import DEVICE  # noqa: E402
from tests.gpu.harness import poison_workspaces  # noqa: E402
from tests.gpu.jitter import CACHE_FLAW, CACHE_NAPS, headers_with_naps, use_headers  # noqa: E402
from tests.kv_cache import cases  # noqa: E402
from tests.kv_cache.cases import CacheCase, build, check_cached, download, fill, request_of, upload  # noqa: E402
from tests.kv_cache.kernel_cases import (  # noqa: E402
    APPENDS,
    GRID,
    HALF,
    UNFIT,
    check_append,
    check_entries_outside,
    check_length,
    check_new_tokens_without_room,
    check_pages,
    check_unfit,
    close,
    pages_of,
    with_new_tokens,
)

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

MANY = 2**31


def groups_of(case: CacheCase) -> int:
    """Of the warps of a block: each has keys of its own, and their states are merged."""
    call = case.call
    rows = cache_rows(max(call.lengths_q) * call.heads // call.heads_kv)
    tile = cache_tile_for(SmArch.SM_90, head_dim_width(call.head_dim), head_dim_width(call.v_head_dim or call.head_dim), rows)
    return 16 * tile.warps // tile.block_m


WINDOWED = [case for case in GRID if case.num_splits == 2 and case.call.head_dim >= 128 and max(case.call.lengths_q) > 30]
NAPPING = sorted((case for case in WINDOWED if groups_of(case) > 1), key=lambda case: "h7kv1-d192v128-band(40,inf)" not in str(case))


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are made on the device, and every workspace is full of NaN before a call."""
    monkeypatch.setattr(cases, "DEVICE", DEVICE)
    poison_workspaces(monkeypatch, execute)


def on_device(asked: dict[str, Any]) -> dict[str, Any]:
    return {key: upload(x) if isinstance(x, np.ndarray) else x for key, x in asked.items()}


def on_host(asked: dict[str, Any]) -> dict[str, Any]:
    return {key: x.copy() if isinstance(x, np.ndarray) else x for key, x in asked.items()}


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case: CacheCase):
    check_cached(case)


@pytest.mark.parametrize("case", GRID[::8], ids=str)
def test_equal_calls_have_equal_bits(case: CacheCase):
    inputs = build(case.call)
    request, _ = request_of(case, inputs, fill(case, inputs))
    first = [x.clone() for x in (fa.run(request).out, fa.run(request).lse)]
    for _ in range(3):
        again = fa.run(request)
        assert torch.equal(again.out, first[0])
        assert torch.equal(again.lse, first[1])


def different_runs(request: Any, expected: list[Any], runs: int) -> int:
    """How many of so many runs, launched one after the other without waiting, have other bits."""
    wrong = torch.zeros((), dtype=torch.int32, device=DEVICE)
    for _ in range(runs):
        made = fa.run(request)
        wrong += (made.out.view(torch.int16) != expected[0].view(torch.int16)).any() | (made.lse != expected[1]).any()
    return int(wrong.item())


@pytest.mark.skipif(DEVICE == "cpu", reason="about threads of a GPU")
@pytest.mark.parametrize("flawed", [False, True], ids=["sound", "flawed"])
@pytest.mark.parametrize("case", NAPPING, ids=str)
def test_naps_change_bits_only_where_a_guard_is_missing(
    case: CacheCase, flawed: bool, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Racecheck reported the first of them: group 1 would read maxima that group 0 has yet to write."""
    if family is Family.FA3:
        pytest.skip("about the merge of the mma.sync kernel")
    inputs = build(case.call)
    request, _ = request_of(case, inputs, fill(case, inputs))
    expected = [x.clone() for x in (fa.run(request).out, fa.run(request).lse)]
    use_headers(headers_with_naps(tmp_path / "cuda", CACHE_FLAW if flawed else CACHE_NAPS), monkeypatch)
    assert bool(different_runs(request, expected, 100 if flawed else 500)) is flawed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", APPENDS)
def test_new_tokens_are_written_and_attended(name: str, causal: bool):
    check_append(with_new_tokens(**APPENDS[name]), causal=causal)


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("name", APPENDS)
def test_a_captured_call_follows_what_its_arrays_hold(name: str, splits: int):
    """One graph: lengths, pages, rows, new tokens and the cache change in place between replays."""
    if DEVICE == "cpu":
        pytest.skip("CUDA graphs")
    first, *others = (with_new_tokens(**APPENDS[name], seed=seed) for seed in range(4))
    device = on_device(first)
    fa.flash_attn_with_kvcache(**device, causal=True, num_splits=splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = fa.flash_attn_with_kvcache(**device, causal=True, num_splits=splits)
    for shift, asked in enumerate(others):
        asked["cache_seqlens"] = asked["cache_seqlens"] + np.int32(shift)
        for key, x in on_device(asked).items():
            if isinstance(x, torch.Tensor):
                device[key].copy_(x)
        graph.replay()
        host = on_host(asked)
        close(made, fa.flash_attn_with_kvcache(**host, causal=True), **HALF)
        np.testing.assert_array_equal(download(device["k_cache"]), host["k_cache"], err_msg="bits of the cache")


def test_entries_outside_the_cache_are_no_keys():
    check_entries_outside()


class TestRoom:
    """Lengths on the device are not looked at by a call: the kernels tell of those that do not fit."""

    @pytest.fixture(autouse=True)
    def no_debug(self) -> None:
        if DEVICE == "cpu":
            pytest.skip("lengths in host memory are checked by the call")
        fa.check()

    @pytest.mark.parametrize("length", [63, 64, 65, 2**30])
    def test_a_length(self, length: int):
        check_length(length)

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_new_tokens(self, interleaved: bool):
        check_new_tokens_without_room(interleaved=interleaved)

    @pytest.mark.parametrize("name", UNFIT)
    def test_what_the_cpu_backend_refuses(self, name: str):
        check_unfit(name)

    @pytest.mark.parametrize("splits", [1, 4])
    def test_a_captured_call_tells_of_each_replay(self, splits: int):
        random = np.random.default_rng(0)
        k, v, table = map(upload, pages_of(random))
        q, new_k, new_v = (upload(random.standard_normal((2, 3, heads, 32)).astype(np.float16)) for heads in (4, 2, 2))
        lengths = torch.tensor([5, 30], dtype=torch.int32, device=DEVICE)
        call = lambda: fa.flash_attn_with_kvcache(  # noqa: E731
            q, k, v, new_k, new_v, cache_seqlens=lengths, block_table=table, causal=True, num_splits=splits
        )
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = call()
        for asked, unfit in (([5, 61], None), ([62, 30], 0), ([10, 10], None), ([62, 65], 1)):
            lengths.copy_(torch.tensor(asked, dtype=torch.int32))
            graph.replay()
            if unfit is None:
                fa.check()
                continue
            with pytest.raises(fa.CacheOverflowError, match=f"sequence {unfit} of") as caught:
                fa.check(torch.device(DEVICE).index or 0)
            assert caught.value.sequence == unfit
            fa.check()
            assert torch.isfinite(made).all()


@pytest.mark.parametrize("layout", list(fa.KvLayout))
def test_pages_are_written_and_copied(layout: fa.KvLayout):
    check_pages(layout)


@pytest.mark.parametrize("paged", [True, False])
def test_a_cache_of_more_than_2_31_elements(paged: bool):
    """Its last slots are written and read; the same call on a cache of just these has the same bits."""
    if DEVICE == "cpu":
        pytest.skip("sizes for a GPU")
    with FileLock(Path(tempfile.gettempdir()) / "atomr-flashattn-big-memory.lock"):
        if torch.cuda.mem_get_info(DEVICE)[0] < 40 << 30:
            pytest.skip("needs 40 GB of free GPU memory")
        made, expected = (_last_slots(many, paged=paged) for many in (True, False))
        torch.cuda.empty_cache()
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.isfinite(made[0]).all()


def _last_slots(many: bool, *, paged: bool) -> tuple[Any, Any, Any]:
    """o, and the slots of K and V that 4 new tokens of 1 sequence with 300 went to; all other slots are NaN."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
    whole = lambda *values: torch.tensor(values, dtype=torch.int32, device=DEVICE)  # noqa: E731
    rows = MANY // (16 * 8 * 128) + 100 if many else 100
    q, new, old = normal(1, 4, 16, 128), normal(2, 1, 4, 8, 128), normal(2, 300, 8, 128)
    shape = (rows, 16, 8, 128) if paged else (2, rows * 16, 8, 128)
    caches = [torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE) for _ in old]
    for cache, x in zip(caches, old, strict=True):
        cache.view(-1, 8, 128)[-320:-20] = x
    if paged:
        asked = {"block_table": torch.arange(rows - 20, rows, dtype=torch.int32, device=DEVICE)[None], "cache_seqlens": whole(300)}
    else:
        end = rows * 16
        asked = {"cache_batch_idx": whole(1), "cache_leftpad": whole(end - 320), "cache_seqlens": whole(end - 20)}
    out = fa.flash_attn_with_kvcache(q, *caches, *new, **asked, causal=True, num_splits=1)
    return out, *(cache.view(-1, 8, 128)[-20:-16].clone() for cache in caches)
