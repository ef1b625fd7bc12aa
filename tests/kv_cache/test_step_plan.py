"""StepPlan: what it refuses, what it does on the CPU, and on a GPU that runs the kernels' own source thread by thread."""

from __future__ import annotations

import copy
import ctypes
import pickle
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from tests.fakes.arrays import FakeArray
from tests.kv_cache.cases import with_plan

Q, PAGES = np.ones((2, 1, 4, 8), np.float16), np.ones((9, 16, 2, 8), np.float16)
TABLE, LENGTHS = np.arange(8, dtype=np.int32).reshape(2, 4), np.array([5, 60], np.int32)
NUMBERS: dict[str, Any] = {"batch": 2, "heads": 4, "heads_kv": 2, "head_dim": 8, "capacity": 64}
OFFSETS = fa.CumulativeSeqlens(np.array([0, 1, 2], np.int32))


def request_of(**asked: Any) -> fa.PagedAttentionRequest:
    return fa.PagedAttentionRequest(asked.pop("q", Q), PAGES, PAGES, asked.pop("block_table", TABLE), LENGTHS, **asked)


def test_on_the_cpu_it_changes_nothing():
    plan = fa.StepPlan(Q, **NUMBERS)
    plan.schedule(LENGTHS)
    planned = request_of(plan=plan)
    np.testing.assert_array_equal(fa.run(planned).out, fa.run(request_of()).out)
    given = {"cache_seqlens": LENGTHS, "block_table": TABLE}
    np.testing.assert_array_equal(
        fa.flash_attn_with_kvcache(Q, PAGES, PAGES, **given, step_plan=plan), fa.flash_attn_with_kvcache(Q, PAGES, PAGES, **given)
    )


def test_a_call_before_the_first_schedule_is_refused_on_the_cpu_too():
    plan = fa.StepPlan(Q, **NUMBERS)
    request = request_of(plan=plan)
    said = "plan: got a call before the first schedule of its StepPlan"
    with pytest.raises(fa.StepPlanError, match=said):
        fa.run(request)
    with pytest.raises(fa.StepPlanError, match=said):
        fa.flash_attn_with_kvcache(Q, PAGES, PAGES, cache_seqlens=LENGTHS, block_table=TABLE, step_plan=plan)
    plan.schedule_for(request)
    np.testing.assert_array_equal(fa.run(request).out, fa.run(request_of()).out)


@pytest.mark.parametrize(
    ("lengths", "declared", "message"),
    [
        ([900, 5], {}, r"seq_lens: got 900 tokens in sequence 0; allowed are 0\.\.64 tokens.*as the plan was declared"),
        ([5, -9], {}, "seq_lens: got -9 tokens in sequence 1"),
        ([64, 5], {"new_tokens": 1}, "seq_lens: got 64 tokens and 1 new tokens in sequence 0"),
        ([64, 5], {"new_tokens": None}, "seq_lens: got 64 tokens and 1 new tokens in sequence 0"),
        ([2, 5], {"left_pad": True}, "cache_leftpad: got 3 slots in sequence 0 with 2 in use"),
    ],
)
def test_lengths_that_do_not_fit_are_no_schedule(lengths: list[int], declared: dict[str, Any], message: str):
    plan = fa.StepPlan(Q, **NUMBERS, **declared)
    beside: dict[str, Any] = {"cu_seqlens_new": OFFSETS} if declared == {"new_tokens": None} else {}
    if "left_pad" in declared:
        beside["cache_leftpad"] = np.array([3, 3], np.int32)
    with pytest.raises(fa.SeqLensError, match=message):
        plan.schedule(np.array(lengths, np.int32), **beside)


def test_cumulative_lengths_of_a_schedule_are_looked_at():
    plan = fa.StepPlan(Q, **NUMBERS)
    with pytest.raises(fa.SeqLensError, match="seq_lens: got 896 tokens in sequence 1"):
        plan.schedule(fa.CumulativeSeqlens(np.array([0, 4, 900], np.int32)))


def test_one_that_is_made_of_a_request_is_that_of_its_numbers():
    assert fa.StepPlan.of(request_of()).shape == fa.StepPlan(Q, **NUMBERS).shape
    window = {"mask": fa.MaskKind.sliding_causal(8), "sink_tokens": 3}
    assert fa.StepPlan.of(request_of(**window)).shape == fa.StepPlan(Q, **NUMBERS, **window).shape
    packed = fa.StepPlan.of(request_of(q=Q[:, 0], cu_seqlens_q=OFFSETS))
    assert packed.shape == fa.StepPlan(Q, **NUMBERS, packed_q=True).shape


WRONG_NUMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": (r"batch: got -1; allowed is an integer in 0\.\.", {"batch": -1}),
    "heads": (r"heads: got 0; allowed is an integer in 1\.\.", {"heads": 0}),
    "ratio": (r"heads: got 3 with 2 KV heads; allowed is a multiple", {"heads": 3}),
    "no integer": (r"heads_kv: got 1\.5; allowed is an integer", {"heads_kv": 1.5}),
    "head dim": (r"head_dim: got 264; allowed is an integer in 1\.\.256", {"head_dim": 264}),
    "v head dim": (r"v_head_dim: got 0; allowed", {"v_head_dim": 0}),
    "queries": (r"seqlen_q: got True; allowed", {"seqlen_q": True}),
    "new tokens": (r"new_tokens: got -2; allowed", {"new_tokens": -2}),
    "capacity": (r"capacity: got None; allowed", {"capacity": None}),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_numbers_that_are_refused(name: str):
    message, change = WRONG_NUMBERS[name]
    with pytest.raises(fa.StepPlanError, match=message):
        fa.StepPlan(Q, **NUMBERS | change)


def test_other_arguments_that_are_refused():
    with pytest.raises(fa.ArrayTypeError, match="mask: got str; allowed is a MaskKind"):
        fa.StepPlan(Q, **NUMBERS, mask="causal")
    with pytest.raises(fa.SinkWithoutMaskError):
        fa.StepPlan(Q, **NUMBERS, sink_tokens=2)
    with pytest.raises(fa.UnsupportedArgumentError, match="left_pad"):
        fa.StepPlan(Q, **NUMBERS, left_pad="yes")
    for other in (Q, fa.DenseFwdRequest(Q, Q, Q)):
        with pytest.raises(fa.StepPlanError, match="allowed is a request on a KV cache"):
            fa.StepPlan.of(other)
    with pytest.raises(fa.StepPlanError, match=r"plan \(step_plan of flash_attn_with_kvcache\): got dict; allowed is a StepPlan, or None"):
        request_of(plan={})


# what the call has, what the plan was made with, and the change of the call
OTHER_CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "batch": ("batch=1", "batch=2", {"batch": 1}),
    "heads": ("heads=8", "heads=4", {"heads": 8}),
    "heads_kv": ("heads_kv=4", "heads_kv=2", {"heads_kv": 4}),
    "head_dim": ("head_dim=16", "head_dim=8", {"head_dim": 16}),
    "v_head_dim": ("v_head_dim=16", "v_head_dim=8", {"v_head_dim": 16}),
    "queries": ("seqlen_q=2", "seqlen_q=1", {"seqlen_q": 2}),
    "packed": ("packed_q=True", "packed_q=False", {"packed_q": True}),
    "mask": ("mask=MaskKind.causal()", "mask=MaskKind.full()", {"mask": fa.MaskKind.causal()}),
    "window": ("mask=MaskKind.window(3, 1)", "mask=MaskKind.full()", {"mask": fa.MaskKind.window(3, 1)}),
    "open window": ("mask=MaskKind.window(-1, 1)", "mask=MaskKind.full()", {"mask": fa.MaskKind.window(-1, 1)}),
    "sinks": (
        "mask=MaskKind.sliding_causal(4), sink_tokens=2",
        "mask=MaskKind.full(), sink_tokens=0",
        {"mask": fa.MaskKind.sliding_causal(4), "sink_tokens": 2},
    ),
    "capacity": ("capacity=80", "capacity=64", {"capacity": 80}),
    "new tokens": ("new_tokens=1", "new_tokens=0", {"new_tokens": 1}),
    "padding": ("left_pad=True", "left_pad=False", {"left_pad": True}),
    "all that differs": (
        "heads=8, capacity=80, mask=MaskKind.causal()",
        "heads=4, capacity=64, mask=MaskKind.full()",
        {"heads": 8, "capacity": 80, "mask": fa.MaskKind.causal()},
    ),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_calls_that_a_plan_was_not_made_for(name: str):
    got, made_with, change = OTHER_CALLS[name]
    said = f"plan (step_plan of flash_attn_with_kvcache): got a call with {got} and a StepPlan made with {made_with}; allowed"
    numbers = {"seqlen_q": 1, "v_head_dim": 8} | NUMBERS | change
    batch, rows = numbers["batch"], numbers["seqlen_q"]
    q = np.ones((batch, rows, numbers["heads"], numbers["head_dim"]), np.float16)
    k, v = (
        np.ones((batch, numbers["capacity"], numbers["heads_kv"], width), np.float16)
        for width in (numbers["head_dim"], numbers["v_head_dim"])
    )
    asked: dict[str, Any] = {key: change[key] for key in ("mask", "sink_tokens") if key in change}
    if "packed_q" in change:
        q, asked["cu_seqlens_q"] = q.reshape(-1, *q.shape[2:]), OFFSETS
    if "new_tokens" in change:
        asked |= {"k": k[:, :1].copy(), "v": v[:, :1].copy()}
    if "left_pad" in change:
        asked["cache_leftpad"] = np.zeros(batch, np.int32)
    lengths = LENGTHS[:batch] - 1
    fitting = fa.StepPlan(Q, **numbers | {name: x for name, x in change.items() if name != "heads"})
    assert fa.CachedFwdRequest(q, k, v, lengths, **asked, plan=fitting).plan is fitting
    with pytest.raises(fa.StepPlanError, match=re.escape(said) + ".*make a plan for each kind of layer"):
        fa.CachedFwdRequest(q, k, v, lengths, **asked, plan=fa.StepPlan(Q, **NUMBERS))


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({"num_splits": 1}, "num_splits=1"),
        ({"num_splits": 4}, "num_splits=4"),
        ({"options": fa.AttentionOptions(batch_invariant=True)}, "batch_invariant=True"),
    ],
)
def test_another_way_to_cut_keys_is_refused(asked: dict[str, Any], got: str):
    with pytest.raises(fa.StepPlanError, match=f"got a StepPlan with {got}; allowed is one of the two"):
        request_of(plan=fa.StepPlan(Q, **NUMBERS), **asked)


def test_what_a_schedule_refuses():
    plan = fa.StepPlan(Q, **NUMBERS)
    for error, message, arguments in (
        (fa.StepPlanError, "cu_seqlens_q: got an array; allowed is None, as the plan was declared", {"cu_seqlens_q": OFFSETS}),
        (fa.StepPlanError, "cache_leftpad: got an array; allowed is None", {"cache_leftpad": LENGTHS}),
        (fa.StepPlanError, "cu_seqlens_new: got an array; allowed is None", {"cu_seqlens_new": OFFSETS}),
        (fa.SeqLensError, r"seq_lens: got shape \(1,\); allowed is \(2,\)", {"seq_lens": LENGTHS[:1]}),
        (fa.DTypeError, "seq_lens: got type int64; allowed is int32", {"seq_lens": LENGTHS.astype(np.int64)}),
        (fa.DeviceMismatchError, "seq_lens", {"seq_lens": FakeArray(LENGTHS).info()}),
        (fa.StepPlanError, "seq_lens: got 1 sequences; allowed are 2", {"seq_lens": fa.CumulativeSeqlens(np.array([0, 4], np.int32))}),
    ):
        with pytest.raises(error, match=message):
            plan.schedule(**{"seq_lens": LENGTHS} | arguments)
    declared = fa.StepPlan(Q, **NUMBERS, packed_q=True, new_tokens=None, left_pad=True)
    whole: dict[str, Any] = {"cu_seqlens_q": OFFSETS, "cache_leftpad": LENGTHS, "cu_seqlens_new": OFFSETS}
    declared.schedule(LENGTHS, **whole)
    for name in whole:
        with pytest.raises(fa.StepPlanError, match=f"{name}: got None; allowed is an array"):
            declared.schedule(LENGTHS, **whole | {name: None})
    with pytest.raises(fa.StepPlanError, match="cu_seqlens_q: got up to 2 queries; allowed are 1"):
        declared.schedule(LENGTHS, **whole | {"cu_seqlens_q": fa.CumulativeSeqlens(np.array([0, 2, 3], np.int32))})
    with pytest.raises(fa.ArrayTypeError, match="cu_seqlens_q: got ndarray; allowed is a CumulativeSeqlens"):
        declared.schedule(LENGTHS, **whole | {"cu_seqlens_q": LENGTHS})


def test_a_packed_call_may_have_fewer_queries_than_its_plan():
    plan = fa.StepPlan(Q, **NUMBERS, packed_q=True, seqlen_q=5)
    assert request_of(q=Q[:, 0], cu_seqlens_q=OFFSETS, plan=plan).plan is plan
    with pytest.raises(fa.StepPlanError, match="got a call with seqlen_q=7 and a StepPlan made with seqlen_q=5"):
        request_of(q=Q[:, 0], cu_seqlens_q=fa.CumulativeSeqlens(OFFSETS.offsets, 7), plan=plan)


def test_chunks_take_a_plan():
    tokens, cache = np.ones((2, 2, 8), np.float16), np.ones((2, 64, 2, 8), np.float16)
    chunks = [fa.ChunkLayout(1, 5), fa.ChunkLayout(1, 60)]
    plan = fa.StepPlan(Q, **NUMBERS, packed_q=True, new_tokens=None, mask=fa.MaskKind.causal())
    request = fa.ChunkedPrefillRequest(Q[:, 0], tokens, tokens, cache, cache.copy(), chunks=chunks, plan=plan)
    plan.schedule_for(request)
    fa.run(request)


def test_copies_of_a_request_share_its_plan_and_no_other_process_has_it():
    request = request_of(plan=fa.StepPlan(Q, **NUMBERS))
    assert copy.copy(request).plan is copy.deepcopy(request).plan is request.plan
    with pytest.raises(fa.StepPlanError, match="got a StepPlan to be pickled; allowed is its own process"):
        pickle.dumps(request)


def test_it_says_what_it_is_for():
    assert "batch=2" in repr(fa.StepPlan(Q, **NUMBERS))


@pytest.mark.parametrize("beside", [{"split": True}, {"batch_invariant": True}, {}])
def test_keys_that_contradict_themselves(beside: dict[str, Any]):
    extras = fa.Extras(scheduled=True, kv_cache=bool(beside), **beside)
    for arch in (fa.SmArch.CPU, fa.SmArch.SM_80):
        with pytest.raises(fa.DispatchError):
            fa.lookup(fa.DispatchKey(arch, fa.DType.F16, 64, extras=extras))


@pytest.mark.parametrize("arch", [fa.SmArch.SM_80, fa.SmArch.SM_86, fa.SmArch.SM_90A, fa.SmArch.SM_120])
def test_an_sm_holds_as_many_blocks_as_the_tile_says(arch: fa.SmArch):
    for width in (32, 64, 96, 128, 192, 256):
        for rows in (16, 32, 64, 128):
            key = fa.DispatchKey(arch, fa.DType.BF16, width, paged=True, extras=fa.Extras(cache_rows=rows, scheduled=True))
            spec: Any = fa.lookup(key)
            blocks = spec.tile.min_blocks
            assert blocks * (spec.shared_memory + 1024) <= spec.arch.shared_memory_per_sm
            assert blocks * spec.threads * 255 <= 65536 or blocks == 1
            assert fa.lookup(replace(key, dtype=fa.DType.F16, alibi=True)).tile == spec.tile, "layers of one plan share their tile"


torch = pytest.importorskip("torch")

from atomr_accel_flashattn.arrays import new  # noqa: E402 - after the skip
from atomr_accel_flashattn.arrays.torch_hooks import meet_torch  # noqa: E402
from atomr_accel_flashattn.runtime import step  # noqa: E402
from tests.emulator.build import compiler  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import fresh_hooks  # noqa: E402
from tests.kv_cache import cases  # noqa: E402
from tests.kv_cache.kernel_cases import APPENDS, HALF, with_new_tokens  # noqa: E402
from tests.kv_cache.test_kernels import on_card  # noqa: E402

needs_emulator = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fresh_hooks(monkeypatch)
    meet_torch()
    card = FakeGpu()
    card.properties = card.properties._replace(multiprocessors=3)
    card.install(monkeypatch, fa.SmArch.SM_90A)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    monkeypatch.setattr(cases, "upload", on_card)
    monkeypatch.setattr(new, "_tensor_on", lambda _like, values: on_card(values))
    return card


def paged(lengths: list[int], *, seed: int = 0) -> dict[str, Any]:
    """Arguments of a decode over pages, NumPy."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float16)  # noqa: E731
    table = random.permutation(20 * len(lengths)).astype(np.int32).reshape(len(lengths), 20)
    q, k, v = normal(len(lengths), 1, 4, 32), *(normal(20 * len(lengths), 16, 2, 32) for _ in range(2))
    return {"q": q, "k_cache": k, "v_cache": v, "block_table": table, "seq_lens": np.array(lengths, np.int32)}


@pytest.mark.torch
@needs_emulator
class TestOnACard:
    def test_one_plan_serves_all_layers_and_follows_the_lengths_of_its_schedule(self, gpu: FakeGpu):
        host = [paged([320, 0, 33], seed=layer) for layer in range(2)]
        card = [{name: on_card(x) for name, x in layer.items()} for layer in host]
        plan = fa.StepPlan.of(fa.PagedAttentionRequest(**card[0]))
        requests = [fa.PagedAttentionRequest(**layer, plan=plan) for layer in card]
        for lengths in ([320, 0, 33], [0, 0, 0], [1, 320, 2], [16, 160, 0]):
            gpu.launches.clear()
            for on_host, on_device in zip(host, card, strict=True):
                on_host["seq_lens"][:] = lengths
                on_device["seq_lens"].copy_(torch.tensor(lengths))
            plan.schedule(card[0]["seq_lens"])
            for asked, request in zip(host, requests, strict=True):
                expected = fa.run(fa.PagedAttentionRequest(**asked))
                made = fa.run(request)
                np.testing.assert_allclose(made.out.numpy().astype(np.float32), expected.out.astype(np.float32), **HALF)
                np.testing.assert_allclose(made.lse.numpy(), expected.lse, atol=1e-3)
            headers = [spec.HEADER for spec, *_ in gpu.launches]
            assert headers == ["step_schedule", *["step_kvcache", "step_combine"] * 2]
            assert {stream for *_, stream in gpu.launches} == {STREAM}
        assert not gpu.workspaces[1:], "calls brought a workspace of their own"

    def test_a_repeated_call_makes_its_launches_and_nothing_else(self, gpu: FakeGpu):
        card = {name: on_card(x) for name, x in paged([40, 7]).items()}
        plan = fa.StepPlan.of(fa.PagedAttentionRequest(**card))
        for _ in range(2):
            plan.schedule(card["seq_lens"])
            fa.run(fa.PagedAttentionRequest(**card, plan=plan))
        assert gpu.repeated == [False, False, False, True, True, True]

    def test_a_call_without_its_plan_takes_another_kernel(self, gpu: FakeGpu):
        card = {name: on_card(x) for name, x in paged([40, 7]).items()}
        plan = fa.StepPlan.of(fa.PagedAttentionRequest(**card))
        plan.schedule(card["seq_lens"])
        fa.run(fa.PagedAttentionRequest(**card, plan=plan))
        fa.run(fa.PagedAttentionRequest(**card))
        assert "fa2_kvcache" in [spec.HEADER for spec, *_ in gpu.launches[3:]]

    def test_a_call_before_the_first_schedule_is_refused(self, gpu: FakeGpu):
        card = {name: on_card(x) for name, x in paged([40, 7]).items()}
        plan = fa.StepPlan.of(fa.PagedAttentionRequest(**card))
        with pytest.raises(fa.StepPlanError, match="a call before the first schedule of its StepPlan"):
            fa.run(fa.PagedAttentionRequest(**card, plan=plan))
        assert not gpu.launches

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_schedule_that_never_ran_gives_nan(self, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, packed: bool):
        """As one that was captured in a graph: the host was asked for it, and the plan's memory has none."""
        card = {name: on_card(x) for name, x in paged([40, 7, 0]).items()}
        if packed:
            card |= {"q": card["q"][:, 0], "cu_seqlens_q": fa.CumulativeSeqlens(on_card(np.array([0, 1, 1, 3], np.int32)), 2)}
        make = gpu.empty_workspace

        def poisoned(*arguments: Any, **options: Any) -> Any:
            made = make(*arguments, **options)
            ctypes.memset(made.ptr, 0xA5, arguments[1])
            return made

        monkeypatch.setattr(step, "empty_workspace", poisoned)
        plan = fa.StepPlan.of(fa.PagedAttentionRequest(**card))
        plan._buffers.scheduled = True
        request = fa.PagedAttentionRequest(**card, plan=plan)
        made = fa.run(request)
        assert made.out.isnan().all()
        assert made.lse.isnan().all()
        plan.schedule_for(request)
        made = fa.run(request)
        np.testing.assert_allclose(made.out.numpy(), fa.run(fa.PagedAttentionRequest(**card)).out.numpy(), **HALF)

    @pytest.mark.parametrize("offsets", [None, (0, 1, 1, 3), (0, 1, 1, 1)])
    @pytest.mark.parametrize(("wrong", "length"), [(1, 999), (1, -4), (2, -1)])
    def test_wrong_lengths_are_told_of_sequences_without_keys_or_queries_too(
        self, gpu: FakeGpu, offsets: tuple[int, ...] | None, wrong: int, length: int
    ):
        card = {name: on_card(x) for name, x in paged([40, 7, 9]).items()}
        if offsets is not None:
            card |= {"q": card["q"][:, 0], "cu_seqlens_q": fa.CumulativeSeqlens(on_card(np.array(offsets, np.int32)), 2)}
        request = with_plan(fa.PagedAttentionRequest(**card))
        for each, told in ((7 + 2 * (wrong == 2), 0), (length, wrong + 1)):
            card["seq_lens"][wrong] = each
            request.plan.schedule_for(request)
            fa.run(request)
            assert gpu.take_error(0) == told

    @pytest.mark.parametrize("name", APPENDS)
    def test_new_tokens_count(self, gpu: FakeGpu, name: str):
        asked = with_new_tokens(**APPENDS[name])
        host, card = ({key: place(x) if isinstance(x, np.ndarray) else x for key, x in asked.items()} for place in (np.copy, on_card))
        expected, lse = fa.flash_attn_with_kvcache(**host, causal=True, return_softmax_lse=True)
        table = asked.get("block_table")
        plan = fa.StepPlan(
            card["q"],
            batch=3,
            heads=4,
            heads_kv=2,
            head_dim=32,
            capacity=64 if table is None else 80,
            seqlen_q=asked["q"].shape[1],
            mask=fa.MaskKind.causal(),
            new_tokens=asked["k"].shape[1],
            left_pad=table is None,
        )
        plan.schedule(card["cache_seqlens"], cache_leftpad=card.get("cache_leftpad"))
        made, made_lse = fa.flash_attn_with_kvcache(**card, causal=True, return_softmax_lse=True, step_plan=plan)
        np.testing.assert_allclose(made.numpy().astype(np.float32), expected.astype(np.float32), **HALF)
        np.testing.assert_allclose(made_lse.numpy(), lse, atol=1e-3)
        assert [spec.HEADER for spec, *_ in gpu.launches] == ["step_schedule", "kv_append", "step_kvcache", "step_combine"]

    def test_another_stream_is_that_of_the_caller(self, gpu: FakeGpu):
        card = {name: on_card(x) for name, x in paged([40, 7]).items()}
        request = with_plan(fa.PagedAttentionRequest(**card))
        request.plan.schedule(card["seq_lens"], stream=99)
        assert [stream for *_, stream in gpu.launches] == [STREAM, 99]

    def test_a_batch_of_none_has_an_empty_answer(self, gpu: FakeGpu):
        host = {name: x if name.endswith("cache") else x[:0] for name, x in paged([40]).items()}
        card = {name: on_card(x) for name, x in host.items()}
        plan = fa.StepPlan.of(fa.PagedAttentionRequest(**card))
        plan.schedule(card["seq_lens"])
        assert fa.run(fa.PagedAttentionRequest(**card, plan=plan)).out.shape == (0, 1, 4, 32)
        assert not gpu.launches

    def test_tiles_of_another_architecture_are_refused(self, gpu: FakeGpu):
        card = {name: on_card(x) for name, x in paged([40, 7]).items()}
        plan = fa.StepPlan.of(fa.PagedAttentionRequest(**card))
        plan.schedule(card["seq_lens"])
        with pytest.raises(fa.DispatchError, match="got a StepPlan with tiles_for; allowed is the tile that the plan was made for"):
            fa.run(fa.PagedAttentionRequest(**card, plan=plan), tiles_for=fa.SmArch.SM_86)
        assert len(gpu.launches) == 1

    @pytest.mark.usefixtures("gpu")
    def test_what_no_kernel_has_is_refused(self):
        with pytest.raises(fa.StepPlanError, match="head_dim: got 20; allowed on a GPU is a multiple of 8"):
            fa.StepPlan(on_card(Q), **NUMBERS | {"head_dim": 20})
        with pytest.raises(fa.ShapeError, match="units of work; allowed are"):
            fa.StepPlan(on_card(Q), **NUMBERS | {"batch": 1 << 20, "seqlen_q": 1 << 20})
