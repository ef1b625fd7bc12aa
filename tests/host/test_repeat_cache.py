"""Repeated calls over a KV cache launch what fresh ones launch, and refuse what those refuse, without a request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import (  # noqa: E402 - after the skip
    HealthCheck,
    given,
    settings,
    strategies as st,
)

import atomr_accel_flashattn as fa  # noqa: E402
from atomr_accel_flashattn import env  # noqa: E402
from atomr_accel_flashattn.arrays.torch_hooks import hooks  # noqa: E402
from atomr_accel_flashattn.requests import kv_cache  # noqa: E402
from atomr_accel_flashattn.requests.forward import ForwardRequest  # noqa: E402
from atomr_accel_flashattn.torch_ops import repeat  # noqa: E402
from tests.fakes.gpu import STREAM  # noqa: E402
from tests.fakes.tensors import fake  # noqa: E402

from .cache_calls import CHANGES, CacheCall, NotingGpu, install, launches_of, launches_of_a_fresh  # noqa: E402

pytestmark = pytest.mark.torch

VARIANTS = {"as it is": {}, **CHANGES}


@pytest.fixture(params=[fa.SmArch.SM_90, fa.SmArch.SM_90A], ids=["fa2", "fa3"])
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[NotingGpu]:
    yield from install(monkeypatch, request.param)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests that are made."""
    made: list[Any] = []
    check = ForwardRequest.__post_init__

    def noted(request: Any) -> None:
        made.append(request)
        check(request)

    monkeypatch.setattr(ForwardRequest, "__post_init__", noted)
    return made


@pytest.mark.parametrize("change", VARIANTS)
def test_a_call_and_one_that_differs_in_one_thing_launch_what_fresh_ones_do(
    gpu: NotingGpu, asked: list[Any], monkeypatch: pytest.MonkeyPatch, change: str
):
    calls = [CacheCall(), CacheCall(**VARIANTS[change])]
    for call in calls:
        launched, _ = launches_of(gpu, call)
        assert launched, "a test of launches needs some"
    for which in (0, 1, 0, 0, 1, 1, 1, 0):
        call = calls[which].anew()
        expected = launches_of_a_fresh(gpu, call, monkeypatch)
        asked.clear()
        assert launches_of(gpu, call) == expected
        assert not asked, "a call like it was made before"


@given(st.lists(st.sampled_from(list(VARIANTS)), min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=2, max_size=8))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_calls_launches_what_fresh_ones_do(
    gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch, pool: list[str], order: list[int]
):
    for which in order:
        call = CacheCall(**VARIANTS[pool[which % len(pool)]])
        expected = launches_of_a_fresh(gpu, call, monkeypatch)
        assert launches_of(gpu, call) == expected


@pytest.mark.parametrize("change", ["as it is", "new tokens", "a plan", "packed", "a length", "four splits, LSE", "fp8 with descales"])
def test_a_call_like_the_last_one_builds_no_key(gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch, change: str):
    call = CacheCall(**VARIANTS[change])
    for _ in range(2):
        launches_of(gpu, call.anew())
    monkeypatch.setattr("atomr_accel_flashattn.torch_ops.repeat_cache.find", None)
    assert launches_of(gpu, call.anew())[0]


@pytest.mark.parametrize("change", VARIANTS)
def test_an_array_whose_storage_was_freed_is_refused_by_a_repeated_call_too(gpu: NotingGpu, change: str):
    call = CacheCall(**VARIANTS[change])
    launches_of(gpu, call.anew())
    for name, array in call.arguments.items():
        if not isinstance(array, torch.Tensor) or array.storage_offset():
            continue  # a view that begins behind its memory keeps an address
        other = call.anew()
        launches_of(gpu, other)
        gpu.noted.clear()
        other.arguments[name].untyped_storage().resize_(0)
        with pytest.raises(fa.ArrayTypeError, match="without memory"):
            other.run()
        assert not gpu.noted


def test_a_length_without_slots_is_refused_and_any_other_is_filled_in(gpu: NotingGpu, asked: list[Any]):
    for length in (3, 0, 144, 17, None):
        call = CacheCall(lengths=length)
        launched, _ = launches_of(gpu, call)
        assert launched
        (made,) = (x for (_, _, dtype), x in gpu.memory.items() if dtype is torch.int32)
        assert made.tolist() == [144 if length is None else length] * 2
    assert len(asked) == 2, "one for a number, and one for all slots"
    gpu.noted.clear()
    for wrong in (-1, 145, 1 << 40):
        with pytest.raises(fa.SeqLensError, match=f"cache_seqlens: got {wrong}; allowed are 0..144"):
            CacheCall(lengths=wrong).run()
    with pytest.raises(fa.SeqLensError, match="got None with k"):
        CacheCall(new=1, lengths=None).run()
    assert not gpu.noted


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ({"causal": True}, {"causal": 1.0}, fa.UnsupportedArgumentError),
        ({"num_splits": 1}, {"num_splits": True}, fa.SplitError),
        ({"num_splits": 1}, {"num_splits": 1.0}, fa.SplitError),
        ({"batch_invariant": True}, {"batch_invariant": 1.0}, fa.UnsupportedArgumentError),
        ({"rotary_interleaved": False}, {"rotary_interleaved": 0.0}, fa.UnsupportedArgumentError),
        ({"return_softmax_lse": True}, {"return_softmax_lse": 1.0}, fa.UnsupportedArgumentError),
        ({"window_size": (3, 0)}, {"window_size": (3.0, 0)}, fa.WindowError),
    ],
    ids=str,
)
def test_numbers_of_a_wrong_type_are_refused_though_equal_ones_have_a_shortcut(
    gpu: NotingGpu, right: dict[str, Any], wrong: dict[str, Any], error: type[Exception]
):
    for _ in range(2):
        launches_of(gpu, CacheCall(numbers=right))
        with pytest.raises(error):
            CacheCall(numbers=wrong).run()


def test_numbers_of_numpy_are_answered(gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch):
    for number in (np.int64(4), 4, np.int64(4)):
        call = CacheCall(numbers={"num_splits": number})
        assert launches_of(gpu, call) == launches_of_a_fresh(gpu, call, monkeypatch)


def test_the_addresses_that_were_seen_are_bounded(gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("atomr_accel_flashattn.torch_ops.repeat_cache._MOST_SEEN", 2)
    calls = [CacheCall(new=1) for _ in range(6)]
    for call in (*calls, *calls):
        launches_of(gpu, call)
        (found,) = repeat.shortcuts.values()
        assert len(found.seen) <= 2
    for call in calls:
        assert launches_of(gpu, call) == launches_of_a_fresh(gpu, call, monkeypatch)


def test_rows_in_the_place_of_a_table_are_refused_though_rows_have_a_shortcut(gpu: NotingGpu):
    call = CacheCall(page=0, rows=True)
    launches_of(gpu, call)
    given = dict(call.arguments)
    given["block_table"] = given.pop("cache_batch_idx")
    with pytest.raises(fa.FlashAttnError):
        fa.flash_attn_with_kvcache(**given)


@pytest.mark.parametrize("of", ["k_cache", "v_cache", "q", "k", "v", "out", "learned_sink", "cache_seqlens", "block_table"])
@pytest.mark.parametrize("written", ["k_cache", "out"])
def test_memory_that_is_written_and_read_is_refused_though_there_is_a_shortcut(gpu: NotingGpu, written: str, of: str):
    if of == written:
        return
    call = CacheCall(new=1, out=True, learned_sink=True)
    launches_of(gpu, call.anew())
    gpu.noted.clear()
    given = call.anew().arguments
    own, other = given[written], given[of]
    memory = fake(torch.zeros(max(own.untyped_storage().nbytes(), other.untyped_storage().nbytes()), dtype=torch.uint8))
    for name, array in ((written, own), (of, other)):
        size = array.numel() * array.element_size()
        given[name] = memory[:size].view(array.dtype).view(array.shape)
    for _ in range(2):
        with pytest.raises(fa.OutputError):
            fa.flash_attn_with_kvcache(**given)
    assert not gpu.noted


def test_caches_in_turns_in_one_array_have_a_shortcut_and_such_that_share_elements_none(gpu: NotingGpu, asked: list[Any]):
    call = CacheCall(new=1, together=True)
    for _ in range(3):
        launches_of(gpu, call.anew())
    assert len(asked) == 1
    swapped = call.anew().arguments
    swapped["k_cache"], swapped["v_cache"] = swapped["v_cache"], swapped["k_cache"]
    for _ in range(3):
        fa.flash_attn_with_kvcache(**swapped)
    assert len(asked) == 2, "the other order is another distance"
    launches_of(gpu, call.anew())
    assert len(asked) == 2
    same = call.anew().arguments
    same["v_cache"] = same["k_cache"].view(same["k_cache"].dtype)
    with pytest.raises(fa.OutputError):
        fa.flash_attn_with_kvcache(**same)


@pytest.mark.parametrize(
    ("change", "written"),
    [
        ("new tokens and out", ["k_cache", "v_cache", "out"]),
        ("out", ["out"]),
        ("as it is", []),
        ("fp8 new tokens", ["k_cache", "v_cache"]),
        ("fp8 by slot, new tokens", ["k_cache", "v_cache", "k_descale", "v_descale"]),
    ],
)
def test_writing_is_told_to_autograd(gpu: NotingGpu, change: str, written: list[str]):
    for _ in range(3):
        call = CacheCall(**VARIANTS[change])
        before = {name: x._version for name, x in call.arguments.items()}
        launches_of(gpu, call)
        assert [name for name, x in call.arguments.items() if x._version > before[name]] == written


@pytest.mark.parametrize("name", ["q", "k_cache", "learned_sink"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_refused_though_there_is_a_shortcut_and_served_without(gpu: NotingGpu, asked: list[Any], name: str, packed: bool):
    call = CacheCall(learned_sink=True, packed=packed)
    launches_of(gpu, call.anew())
    name = "k" if packed and name == "k_cache" else name
    for _ in range(2):
        wanting = call.anew()
        wanting.arguments[name].requires_grad_()
        gpu.noted.clear()
        with pytest.raises(fa.FeatureNotBuiltError):
            wanting.run()
        assert not gpu.noted
        with torch.no_grad():
            assert launches_of(gpu, wanting)[0]
            asked.clear()
            assert launches_of(gpu, wanting)[0]
            assert not asked
    assert launches_of(gpu, call.anew())[0]


def test_a_plan_that_was_never_scheduled_or_is_for_other_calls_is_refused_though_there_is_a_shortcut(gpu: NotingGpu, asked: list[Any]):
    for _ in range(2):
        launches_of(gpu, CacheCall(plan=True))
    assert len(asked) == 1, "plans of one shape share a shortcut"
    call = CacheCall(plan=True)
    call.arguments["step_plan"]._buffers.scheduled = False
    gpu.noted.clear()
    with pytest.raises(fa.StepPlanError, match="before the first schedule"):
        call.run()
    other = CacheCall().arguments | {"step_plan": CacheCall(plan=True, entries=5).arguments["step_plan"]}
    gpu.noted.clear()
    for wrong, error in ((other, "allowed are calls of the shape"), (CacheCall().arguments | {"step_plan": 3}, "allowed is a StepPlan")):
        with pytest.raises(fa.StepPlanError, match=error):
            fa.flash_attn_with_kvcache(**wrong)
    assert not gpu.noted


def test_the_stream_is_that_of_now_and_outputs_are_new(gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch):
    """As in a graph that is captured, whose stream is another: nothing of a call before is used again."""
    made: list[Any] = []

    def empty(shape: Any, strides: Any, dtype: Any) -> Any:
        made.append(fake(torch.empty_strided(shape, strides, dtype=dtype)))
        return made[-1]

    call = CacheCall(lengths=5, new=1, numbers={"num_splits": 4, "return_softmax_lse": True})
    launches_of(gpu, call)
    hooks.empty_on_current = empty
    filled: list[Any] = []
    fill = type(call.arguments["q"]).new_full
    monkeypatch.setattr(type(call.arguments["q"]), "new_full", lambda *a, **o: filled.append(fill(*a, **o)) or filled[-1])
    for stream in (STREAM, 1234, 5):
        made.clear()
        monkeypatch.setattr(hooks, "raw_stream", lambda index, stream=stream: stream + index)
        launched, outputs = launches_of(gpu, call.anew())
        assert {each[-1] for each in launched} == {stream}
        assert [x[3] for x in outputs] == [x.data_ptr() for x in made[:2]], "o and LSE"
        assert len(made) == 3, "and room for the parts"
    assert len(filled) == 3, "a kept length would belong to one stream, or to a graph"


def test_another_device_has_its_own_plan(gpu: NotingGpu, asked: list[Any]):
    for _ in range(2):
        for index in (0, 1):
            call = CacheCall()
            for x in call.arguments.values():
                x.index = index
            assert {each[-1] for each in launches_of(gpu, call)[0]} == {STREAM + index}
    assert len(asked) == 2


def test_a_table_on_another_device_is_refused_though_there_is_a_plan(gpu: NotingGpu):
    launches_of(gpu, CacheCall())
    call = CacheCall()
    call.arguments["block_table"].index = 1
    with pytest.raises(fa.DeviceMismatchError, match="block_table: got an array on cuda:1"):
        call.run()


def test_debug_makes_no_shortcut(gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_cache, "copy_to_host", lambda info: info.source.numpy())
    monkeypatch.setenv("ATOMR_FLASHATTN_DEBUG", "1")
    env.settings.cache_clear()
    try:
        for _ in range(2):
            launches_of(gpu, CacheCall())
    finally:
        monkeypatch.delenv("ATOMR_FLASHATTN_DEBUG")
        env.settings.cache_clear()
    assert not repeat.shortcuts


def test_a_launch_that_fails_raises_in_a_repeated_call(gpu: NotingGpu):
    launches_of(gpu, CacheCall())
    gpu.status = 701
    with pytest.raises(fa.LaunchError):
        CacheCall().run()


def test_threads_share_plans_and_launch_their_own(gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch):
    """Each thread has arrays of its own, and its stream says which it is."""
    names = ["as it is", "four splits, LSE", "new tokens", "packed"]
    calls = [CacheCall(**VARIANTS[name]) for name in names]
    stream = lambda _index: STREAM + int(threading.current_thread().name)  # noqa: E731
    monkeypatch.setattr(hooks, "raw_stream", stream)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream)
    expected = {}
    for index, call in enumerate(calls):
        work = threading.Thread(target=lambda index=index, call=call: expected.update({index: launches_of(gpu, call)[0]}), name=str(index))
        work.start()
        work.join()
    gpu.noted.clear()
    threads = [threading.Thread(target=lambda call=call: [call.run() for _ in range(20)], name=str(i)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(len(calls)):
        own = [each for each in gpu.noted if each[-1] == STREAM + index]
        assert own == expected[index] * 20


@pytest.mark.parametrize("first", ["q", "k_cache", "k", "v", "rotary_cos", "alibi_slopes"])
def test_which_address_is_odd_decides_on_the_plan(gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch, first: str):
    for moved in (first, "q", "k_cache", "k", "v", "rotary_cos", "alibi_slopes", first):
        call = CacheCall(
            seqlen_q=80, new=2, rotary=32, slopes=1, wide=True, moved=moved, offset=2 if moved in {"rotary_cos", "alibi_slopes"} else 4
        )
        assert call.arguments[moved].data_ptr() & 15 == 8
        for _ in range(2):
            expected = launches_of_a_fresh(gpu, call, monkeypatch)
            assert launches_of(gpu, call) == expected
