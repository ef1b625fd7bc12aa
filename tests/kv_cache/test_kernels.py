"""The kernels over a KV cache behind requests: a fake GPU runs their own source thread by thread, and the oracle judges."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.arrays import new  # noqa: E402
from atomr_accel_flashattn.arrays.torch_hooks import meet_torch  # noqa: E402
from atomr_accel_flashattn.kernels.fa3_kvcache import wgmma_splits_for  # noqa: E402
from atomr_accel_flashattn.runtime import on_cache  # noqa: E402
from atomr_accel_flashattn.types import DType  # noqa: E402
from tests.cases import Alibi  # noqa: E402
from tests.emulator.build import compiler  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import fake, fresh_hooks  # noqa: E402
from tests.kv_cache import cases  # noqa: E402
from tests.kv_cache.cases import CacheCase, check_cached  # noqa: E402
from tests.kv_cache.kernel_cases import (  # noqa: E402
    APPENDS,
    FP8_APPENDS,
    GRID,
    HALF,
    PLANNED,
    PREFILL,
    UNFIT,
    check_append,
    check_entries_outside,
    check_fp8_append,
    check_length,
    check_new_tokens_without_room,
    check_pages,
    check_unfit,
    close,
    with_new_tokens,
)

pytestmark = [pytest.mark.torch, pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fresh_hooks(monkeypatch)
    meet_torch()
    card = FakeGpu()
    card.install(monkeypatch, fa.SmArch.SM_90A)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    monkeypatch.setattr(cases, "upload", on_card)
    monkeypatch.setattr(new, "_tensor_on", lambda _like, values: on_card(values))
    return card


def on_card(array: Any) -> Any:
    if array is None:
        return None
    host = np.ascontiguousarray(array).reshape(array.shape)  # which makes a dimension where there is none
    if host.dtype.name == "bfloat16":
        return fake(torch.from_numpy(host.view(np.int16).copy()).view(torch.bfloat16))
    if host.dtype.name.startswith("float8"):
        return fake(torch.from_numpy(host.view(np.uint8).copy()).view(getattr(torch, host.dtype.name)))
    return fake(torch.from_numpy(host.copy()))


def fills_a_warpgroup(case: CacheCase) -> bool:
    call = case.call
    ratio = call.heads // call.heads_kv
    packs = 64 % ratio == 0 and call.alibi is Alibi.NONE
    return max(call.lengths_q) * (ratio if packs else 1) >= 64 and case.block_size % 8 == 0


@pytest.mark.parametrize("case", GRID[::4], ids=str)
def test_pairs_of_features(gpu: FakeGpu, case: CacheCase):
    check_cached(case)
    split = case.num_splits > 1
    headers = [spec.HEADER for spec, *_ in gpu.launches]
    assert headers[0] == ("fa3_kvcache" if fills_a_warpgroup(case) else "fa2_kvcache")
    assert ("split_combine" in headers) >= split
    assert {stream for *_, stream in gpu.launches} == {STREAM}


@pytest.mark.parametrize("case", PLANNED[::6], ids=str)
def test_pairs_of_features_in_the_blocks_of_a_plan(gpu: FakeGpu, case: CacheCase):
    gpu.properties = gpu.properties._replace(multiprocessors=5)
    check_cached(case)
    assert [spec.HEADER for spec, *_ in gpu.launches] == ["step_schedule", "step_kvcache", "step_combine"]


@pytest.mark.parametrize("case", [case for case in PREFILL if sum(case.call.lengths_k) < 900][::5], ids=str)
def test_pairs_of_features_of_many_queries(gpu: FakeGpu, case: CacheCase):
    check_cached(case)
    headers = [spec.HEADER for spec, *_ in gpu.launches]
    splits = len(headers) if case.num_splits == 0 else 1 + (case.num_splits > 1)  # 0: as many as suit
    assert headers == ["fa3_kvcache", "split_combine"][:splits]


def test_keys_are_split_where_there_are_more_sms_than_tiles(gpu: FakeGpu):
    case = next(each for each in GRID if not each.num_splits)
    call = replace(case.call, lengths_q=(1,), lengths_k=(1100,), heads=4, heads_kv=2, left=None, right=0, sink_tokens=0)
    check_cached(replace(case, call=call))
    assert [spec.HEADER for spec, *_ in gpu.launches] == ["fa2_kvcache", "split_combine"]
    assert gpu.launches[0][1].splits > 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", APPENDS)
def test_new_tokens_are_written_and_attended(gpu: FakeGpu, name: str, causal: bool):
    check_append(with_new_tokens(**APPENDS[name]), causal=causal)
    assert [spec.HEADER for spec, *_ in gpu.launches][:2] == ["kv_append", "fa2_kvcache"]


@pytest.mark.parametrize("name", FP8_APPENDS)
def test_new_tokens_are_quantised_and_attended(gpu: FakeGpu, name: str):
    check_fp8_append(**FP8_APPENDS[name])
    assert [spec.HEADER for spec, *_ in gpu.launches][:2] == ["fp8_append", "fp8_kvcache"]


def test_tokens_that_do_not_fit_are_not_written(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    """Lengths on a GPU are not looked at: what fits is covered, and nothing beyond is touched."""
    asked = with_new_tokens(paged=True, new=5)
    asked["cache_seqlens"] = np.array([0, 78, 200], np.int32)  # of 80 slots
    card = {key: on_card(x) for key, x in asked.items()}
    before = card["k_cache"].numpy().copy()
    made = fa.flash_attn_with_kvcache(**card)
    changed = (card["k_cache"].numpy() != before).any(axis=(2, 3)).sum()
    assert changed == 5 + 2 + 0
    assert np.isfinite(made.numpy().astype(np.float32)).all()


def test_entries_outside_the_cache_are_no_keys(gpu: FakeGpu):
    check_entries_outside()
    assert [spec.HEADER for spec, *_ in gpu.launches] == ["fa2_kvcache"]


@pytest.mark.parametrize(("softcap", "splits"), [(0.0, 1), (20.0, 2)])
def test_entries_outside_the_cache_are_no_keys_of_many_queries(gpu: FakeGpu, softcap: float, splits: int):
    check_entries_outside(queries=70, page=24, softcap=softcap, num_splits=splits)
    assert [spec.HEADER for spec, *_ in gpu.launches] == ["fa3_kvcache", "split_combine"][:splits]


def test_many_queries_are_answered_by_wgmma_and_few_or_odd_pages_by_mma_sync(gpu: FakeGpu):
    q, k = (on_card(np.ones(shape, np.float16)) for shape in ((1, 64, 2, 32), (4, 16, 2, 32)))
    odd = on_card(np.ones((4, 12, 2, 32), np.float16))
    table, length = on_card(np.array([[0, 1, 2, 3]], np.int32)), on_card(np.array([48], np.int32))
    asked = {
        "fa3_kvcache": (q, k),
        "fa2_kvcache": (q[:, :63], k),
        "pages of 12": (q, odd),
    }
    headers = {name: fa.lookup(fa.PagedAttentionRequest(a, b, b, table, length).dispatch_key()).HEADER for name, (a, b) in asked.items()}
    assert headers == {"fa3_kvcache": "fa3_kvcache", "fa2_kvcache": "fa2_kvcache", "pages of 12": "fa2_kvcache"}
    invariant = fa.AttentionOptions(batch_invariant=True)
    key = fa.PagedAttentionRequest(q, k, k, table, length, options=invariant).dispatch_key
    assert key(fa.SmArch.SM_90).extras.family is fa.Family.FA2


def test_a_call_of_many_queries_alike_moves_its_tensor_maps(gpu: FakeGpu):
    random = np.random.default_rng(0)
    for _ in range(2):
        q, k, v = (random.standard_normal(shape).astype(np.float16) for shape in ((1, 70, 2, 32), (5, 16, 2, 32), (5, 16, 2, 32)))
        asked = q, k, v, np.array([[3, 0, 4, 1, 2]], np.int32), np.array([77], np.int32)
        causal: dict[str, Any] = {"mask": fa.MaskKind.causal(), "num_splits": 2}
        made = fa.run(fa.PagedAttentionRequest(*map(on_card, asked), **causal))
        close(made.out, fa.run(fa.PagedAttentionRequest(*asked, **causal)).out, **HALF)
    assert [spec.HEADER for spec, *_ in gpu.launches] == ["fa3_kvcache", "split_combine"] * 2
    assert gpu.repeated == [False, False, True, True]


def test_borrowed_tiles_may_cut_the_keys_of_a_split_call_into_one_part(gpu: FakeGpu):
    """The key was made for tiles of wgmma, of which these keys have eight; the borrowed ones of mma.sync leave them whole."""
    random = np.random.default_rng(0)
    asked = [random.standard_normal(shape).astype(np.float16) for shape in ((1, 64, 1, 256), (31, 16, 1, 256), (31, 16, 1, 256))]
    asked += [np.arange(31, dtype=np.int32)[None], np.array([490], np.int32)]
    request = fa.PagedAttentionRequest(*map(on_card, asked))
    assert request.dispatch_key().extras.split
    made = fa.run(request, tiles_for=fa.SmArch.SM_80)
    assert [spec.HEADER for spec, *_ in gpu.launches] == ["fa2_kvcache", "split_combine"]
    assert gpu.launches[0][1].splits == 1
    close(made.out, fa.run(fa.PagedAttentionRequest(*asked)).out, **HALF)


def test_more_parts_than_a_grid_has_are_refused(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    q, k = (on_card(np.ones(shape, np.float16)) for shape in ((1, 70, 2, 32), (4, 16, 2, 32)))
    table, length = on_card(np.array([[0, 1, 2, 3]], np.int32)), on_card(np.array([48], np.int32))
    monkeypatch.setattr(on_cache, "MAX_GRID", 255)
    with pytest.raises(fa.ShapeError, match="num_splits: got 128 for a call of 2 work tiles, 256 in all; allowed are 255"):
        fa.run(fa.PagedAttentionRequest(q, k, k, table, length, num_splits=128))
    assert not gpu.launches


@pytest.mark.parametrize("multiprocessors", [1, 40, 78, 114, 132, 160])
def test_the_planner_of_splits_is_never_slower_than_none_by_its_own_count(multiprocessors: int):
    q, k = (np.ones(shape, np.float16) for shape in ((1, 512, 8, 32), (2, 16, 1, 32)))
    problem = fa.PagedAttentionRequest(q, k, k, np.zeros((1, 4096), np.int32), np.array([9], np.int32)).problem
    assert problem.seqlen_k == 65536
    for tiles in (1, 7, 32, 100, 131, 132, 133, 500):
        splits = wgmma_splits_for(problem, tiles, 128, multiprocessors)
        assert 1 <= splits <= 64
        waves = -(-tiles * splits // multiprocessors)
        assert waves * -(-512 // splits) <= -(-tiles // multiprocessors) * 512
        assert wgmma_splits_for(replace(problem, seqlen_k=128), tiles, 128, multiprocessors) == 1
        assert wgmma_splits_for(replace(problem, num_splits=5), tiles, 128, multiprocessors) == 5
        window = replace(problem, band=problem.band._replace(left=100, right=0))
        assert wgmma_splits_for(window, tiles, 128, multiprocessors) <= splits
    assert wgmma_splits_for(problem, 32, 128, 132) == 4  # 512 queries of 8 heads that share K and V: 128 of 132 SMs
    assert wgmma_splits_for(problem, 0, 128, 132) == 1


def test_a_prompt_in_a_chunk_is_appended_and_attended_by_wgmma(gpu: FakeGpu):
    check_append(with_new_tokens(paged=True, new=33, rotary_dim=8), causal=True)
    assert [spec.HEADER for spec, *_ in gpu.launches][:2] == ["kv_append", "fa3_kvcache"]


def test_a_call_alike_goes_by_the_plan_of_before(gpu: FakeGpu):
    asked = with_new_tokens(paged=True, new=1, rotary_dim=8)
    card = {key: on_card(x) if isinstance(x, np.ndarray) else x for key, x in asked.items()}
    for _ in range(2):
        fa.flash_attn_with_kvcache(**card)
    assert gpu.repeated == [False, False, True, True]
    fa.flash_attn_with_kvcache(**card | {"rotary_interleaved": False})
    assert gpu.repeated[4:] == [False, False]


@pytest.mark.parametrize("arch", [fa.SmArch.SM_80, fa.SmArch.SM_86, fa.SmArch.SM_90, fa.SmArch.SM_100])
def test_every_width_and_number_of_rows_has_a_tile(arch: fa.SmArch):
    for width in (32, 64, 96, 128, 192, 256):
        for rows in (16, 32, 64, 128):
            key = fa.DispatchKey(arch, DType.BF16, width, paged=True, extras=fa.Extras(cache_rows=rows))
            spec: Any = fa.lookup(key)
            assert not spec.misfit()
            assert spec.shared_memory <= arch.shared_memory_per_block


@pytest.mark.parametrize("layout", list(fa.KvLayout))
def test_pages_of_a_card_are_written_and_copied_with_torch(gpu: FakeGpu, layout: fa.KvLayout):
    check_pages(layout)
    assert [spec.HEADER for spec, *_ in gpu.launches] == ["fa2_kvcache"]


@pytest.mark.usefixtures("gpu")
class TestRoom:
    """Lengths on a GPU are not looked at by a call: the kernels tell of those that do not fit."""

    @pytest.mark.parametrize("length", [63, 64, 65, 2**30])
    def test_a_length(self, length: int):
        check_length(length)

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_new_tokens(self, interleaved: bool):
        check_new_tokens_without_room(interleaved=interleaved)

    @pytest.mark.parametrize("name", UNFIT)
    def test_what_the_cpu_backend_refuses(self, name: str):
        check_unfit(name)

    def test_a_cache_checks_its_gpu(self):
        q = on_card(np.zeros((1, 1, 4, 32), np.float16))
        cache = fa.PagedKvCache(8, 4, 2, 32, like=q)
        first = cache.allocate(3)
        cache.advance(first, 3)
        fa.run(cache.request(q, first))
        cache.check()
        fa.run(fa.PagedAttentionRequest(q, cache.k, cache.v, cache.block_table(first), on_card(np.array([9], np.int32))))
        with pytest.raises(fa.CacheOverflowError, match="sequence 0"):
            cache.check()
        cache.check()

    @pytest.mark.parametrize("device", ["cuda", -1, 1.0, True])
    def test_a_device_that_is_none(self, device: Any):
        with pytest.raises(fa.DeviceMismatchError, match="device: got"):
            fa.check(device)


def test_a_cache_in_host_memory_has_nothing_to_check():
    fa.PagedKvCache(8, 4, 2, 32, dtype=DType.F32).check()
    fa.check(7)
    error = pickle.loads(pickle.dumps(fa.CacheOverflowError(3, 1)))  # noqa: S301 - our own bytes
    assert (error.sequence, error.device, str(error)) == (3, 1, str(fa.CacheOverflowError(3, 1)))
