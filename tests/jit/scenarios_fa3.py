"""Launches of the FA3 family: tensor maps follow addresses, counters follow streams. Each function is a scenario of test_launch.py."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from typing import Any

import pytest

from atomr_accel_flashattn.errors import LaunchError
from atomr_accel_flashattn.kernels.fa3_fwd import Fa3FwdParams
from atomr_accel_flashattn.kernels.params import TensorMapSpec
from atomr_accel_flashattn.launch import counters, driver as driver_module, launcher as launch_module, tensor_map
from atomr_accel_flashattn.launch.counters import counters_for
from atomr_accel_flashattn.launch.launcher import Launch
from atomr_accel_flashattn.launch.tensor_map import encode, move
from atomr_accel_flashattn.types import DType
from tests.fakes.libcuda import Map, value as fake
from tests.jit.kernels import WGMMA
from tests.jit.scenarios import in_threads, loaded, pointers

_GRID, _STEP = 7, 64
_PER_THREAD = 2  # CU_STREAM_PER_THREAD
_SPEC = TensorMapSpec(DType.BF16, 4096, (64, 300, 8, 2), (1024, 128, 307200), (64, 128, 1, 1))
_PACKED = TensorMapSpec(DType.BF16, 4096, (64, 4, 300, 2, 2), (128, 1024, 512, 307200), (64, 4, 16, 1, 1))


def _at(stream: int) -> tuple[int, ...]:
    return pointers(stream, _STEP)


def _params(stream: int = 4096) -> Fa3FwdParams:
    """Parameters whose maps read what a launch into ``stream`` brings, and which libcuda.c looks through."""
    fake("step").value, fake("maps_at").value = _STEP, Fa3FwdParams.q_map.offset
    fake("counters_at").value = Fa3FwdParams.counters.offset
    params = Fa3FwdParams(tiles=5)
    params.tensor_maps = tuple(replace(_SPEC, ptr=address) for address in _at(stream)[:3])
    params.counts = True
    return params


def _made(params: Fa3FwdParams | None = None) -> Launch:
    return loaded(0, WGMMA).launch_of(params or _params(), _GRID, Fa3FwdParams.SLOTS)


def _use_device(index: int) -> None:
    driver_module.driver().cuCtxSetCurrent(driver_module.primary_context(index))


def _ran(count: int) -> bool:
    return (fake("launches").value, fake("torn").value, fake("forbidden").value) == (count, 0, 0)


def a_map_is_encoded_as_it_is_described() -> None:
    _use_device(0)
    for dtype, element in ((DType.F16, 6), (DType.BF16, 9)):
        for columns, swizzle in ((64, 3), (32, 2)):
            made = Map.from_buffer_copy(encode(replace(_SPEC, dtype=dtype, box=(columns, 128, 1, 1)), 0))
            assert (made.address, list(made.sizes), list(made.strides)) == (4096, [64, 300, 8, 2, 0], [1024, 128, 307200, 0])
            assert (list(made.box), list(made.steps)) == ([columns, 128, 1, 1, 0], [1, 1, 1, 1, 0])
            assert (made.type, made.rank, made.interleave, made.swizzle, made.promotion, made.fill) == (element, 4, 0, swizzle, 3, 0)


def a_map_of_packed_heads_has_five_dimensions() -> None:
    _use_device(0)
    made = Map.from_buffer_copy(encode(_PACKED, 0))
    assert (made.address, made.rank, list(made.sizes), list(made.strides)) == (4096, 5, [64, 4, 300, 2, 2], [128, 1024, 512, 307200])
    assert (list(made.box), list(made.steps)) == ([64, 4, 16, 1, 1], [1] * 5)


def a_map_that_is_encoded_while_another_is_does_not_touch_it() -> None:
    """As a signal handler may, in the same thread."""
    _use_device(0)
    other = replace(_SPEC, ptr=8192, sizes=(64, 20, 8, 2))
    expected, inner, call = encode(_SPEC, 0), [], tensor_map._call

    def interrupted(*arguments: Any) -> int:
        tensor_map._call = call
        inner.append(encode(other, 0))
        return call(*arguments)

    tensor_map._call = interrupted
    assert (encode(_SPEC, 0), inner) == (expected, [encode(other, 0)])


def a_map_that_the_driver_refuses_is_named() -> None:
    with pytest.raises(LaunchError, match=r"encoding a tensor map of sizes \(64, 300, 8, 2\) and byte strides \(1020, .*failed") as caught:
        encode(replace(_SPEC, strides=(1020, 128, 307200)), 0)
    assert caught.value.cuda_error == "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(LaunchError, match="moving a tensor map to 0x18 failed"):
        move(1 << 20, 0x18, 0)


def a_thread_without_a_context_encodes_moves_and_launches() -> None:
    failures: list[BaseException] = []

    def work(stream: int) -> None:
        try:
            _made(_params(stream)).launch(stream, _at(stream))
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    in_threads(work, [4096])
    made = _made()
    in_threads(lambda stream: made.launch(stream, _at(stream)), [8192])
    assert not failures
    assert fake("moves").value == 3
    assert _ran(2)


def a_launch_that_moves_launches_with_maps_of_those_addresses() -> None:
    _use_device(0)
    made = _made()
    encoded = fake("encodes").value
    for stream in (4096, 4096, 8192, 12288, 8192, 8192):
        made.launch(stream, _at(stream))
    assert _ran(6)
    assert fake("encodes").value == encoded
    assert fake("moves").value == 9


def one_map_moves_alone() -> None:
    _use_device(0)
    made = _made()
    fake("step").value = 0
    same = (4096,) * 10
    made.launch(4096, same)
    moved = fake("moves").value
    for i in range(3):
        addresses = tuple(8192 if i == j else 4096 for j in range(3))
        before = fake("torn").value
        made.launch(4096, (*addresses, *same[3:]))
        assert fake("torn").value == before + 1  # the driver wants them all at 4096: one is not
        made.launch(4096, same)
    assert fake("moves").value == moved + 6
    assert fake("torn").value == 3


def a_move_that_fails_half_way_is_made_good_by_the_next_launch() -> None:
    _use_device(0)
    made = _made()
    made.launch(4096, _at(4096))
    q, k, *rest = _at(8192)
    with pytest.raises(LaunchError, match="moving a tensor map"):
        made.launch(8192, (q, k + 8, *rest))
    made.launch(4096, _at(4096))
    assert _ran(2)


def arrays_without_elements_keep_their_map() -> None:
    _use_device(0)
    fake("step").value = 0
    params, empty = Fa3FwdParams(tiles=5), replace(_SPEC, ptr=16)
    params.tensor_maps = (_SPEC, empty, empty)
    made = _made(params)
    for address in (4096, 8192):
        made.launch(4096, (address, *(0,) * 9))
    assert fake("launches").value == 2
    assert fake("moves").value == 1


def threads_that_share_a_launch_tear_neither_maps_nor_counters() -> None:
    _use_device(0)
    made = _made()

    def work(stream: int) -> None:
        _use_device(0)
        for n in range(1500):
            mine = stream + 65536 * (n % 3)
            made.launch(mine, _at(mine))

    in_threads(work, [4096 * (i + 1) for i in range(8)])
    assert _ran(12000)
    assert fake("allocs").value == 1


def launches_that_are_made_anew_have_their_maps_and_counters() -> None:
    _use_device(0)
    for stream in (4096, 8192, 4096):
        _made(_params(stream)).launch(stream, _at(stream))
    assert _ran(3)


def a_stream_keeps_its_counters_and_shares_them_with_nobody() -> None:
    _use_device(0)
    streams = [0, 4096, 8192, 12288]
    first = [counters_for(0, stream) for stream in streams]
    assert [counters_for(0, stream) for stream in streams] == first
    assert len({*first}) == len(streams)
    assert counters_for(0, 1) == first[0]  # CU_STREAM_LEGACY is stream 0
    assert {*first}.isdisjoint(counters_for(1, stream) for stream in streams)


def counters_of_device_1_are_memory_of_device_1() -> None:
    _use_device(0)
    counters_for(1, 4096)
    assert fake("alloc_device").value == 1
    assert int(driver_module.check(driver_module.driver().cuCtxGetCurrent(), "")) == int(driver_module.primary_context(0))
    counters_for(0, 4096)
    assert fake("alloc_device").value == 0
    assert fake("allocs").value == 2


def a_handle_that_comes_back_is_another_stream() -> None:
    """Work of the stream that was destroyed may still be running."""
    _use_device(0)
    before = counters_for(0, 4096)
    fake("stream_generation").value = 1
    assert counters_for(0, 4096) != before


def every_thread_has_a_default_stream_of_its_own() -> None:
    seen: list[int] = []
    in_threads(lambda stream: seen.extend(counters_for(0, stream) for _ in range(3)), [_PER_THREAD] * 4)
    assert len({*seen}) == 4


def captured_launches_have_counters_of_their_own() -> None:
    _use_device(0)
    made = _made()
    made.launch(4096, _at(4096))
    fake("capturing").value = 1
    captured = set()
    for _ in range(5):
        made.launch(4096, _at(4096))
        captured.add(fake("counters", ctypes.c_uint64).value)
    fake("capturing").value = 0
    made.launch(4096, _at(4096))
    assert _ran(7)
    assert len(captured) == 5


def counters_can_be_made_while_anything_is_captured() -> None:
    _use_device(0)
    fake("capturing").value = 1
    assert counters_for(0, 4096)
    in_threads(lambda device: _expect(counters_for(device, 4096)), [1])
    assert (fake("allocs").value, fake("forbidden").value) == (2, 0)
    status, memory = driver_module.driver().cuMemAlloc(8)
    assert int(status) == 900, "the capture mode of the thread was not put back"
    assert not memory


def a_block_that_is_used_up_is_followed_by_another() -> None:
    counters._PAIRS = 4
    _use_device(0)
    fake("capturing").value = 1
    pairs = [counters_for(0, 4096) for _ in range(30)]
    assert len({*pairs}) == 30
    assert fake("allocs").value == 8
    assert all(list((ctypes.c_int * 2).from_address(pair)) == [0, 0] for pair in pairs)


def threads_that_come_first_together_share_one_block() -> None:
    _use_device(0)
    seen: list[int] = []
    in_threads(lambda stream: seen.append(counters_for(0, stream)), [4096 * (i + 1) for i in range(16)])
    assert len({*seen}) == 16
    assert fake("allocs").value == 1


def memory_that_is_not_there_is_an_error_now_and_none_later() -> None:
    _use_device(0)
    fake("alloc_status").value = 2
    for _ in range(2):
        with pytest.raises(LaunchError, match="allocating zeros failed") as caught:
            counters_for(0, 4096)
        assert caught.value.cuda_error == "CUDA_ERROR_OUT_OF_MEMORY"
    fake("alloc_status").value = 0
    first = counters_for(0, 4096)
    assert list((ctypes.c_int * 2).from_address(first)) == [0, 0]


def only_streams_that_cannot_be_captured_are_not_asked_for() -> None:
    _use_device(0)
    made, asked = _made(), []

    def counted(device: int, stream: int) -> int:
        asked.append(stream)
        return counters_for(device, stream)

    launch_module.counters_for = counted
    for stream in (0, 0, 4096, 4096, 0, 0, 1, 1):
        made.launch(stream, _at(4096))
    assert asked == [0, 4096, 4096, 0, 1]
    assert fake("launches").value == 8


def counters_that_could_not_be_had_are_asked_for_again() -> None:
    counters._PAIRS = 1
    _use_device(0)
    made = _made()
    made.launch(4096, _at(4096))
    fake("alloc_status").value = 2
    for _ in range(2):
        with pytest.raises(LaunchError, match="allocating zeros failed"):
            made.launch(0, _at(0))
    fake("alloc_status").value = 0
    fake("step").value = 0
    made.launch(0, (0,) * 10)
    made.launch(0, (0,) * 10)
    fake("step").value = _STEP
    made.launch(4096, _at(4096))
    assert fake("launches").value == 4
    assert counters_for(0, 0) != counters_for(0, 4096)


def a_kernel_that_does_not_count_asks_for_no_counters() -> None:
    _use_device(0)
    params = _params()
    params.counts = False
    fake("counters_at").value = 0
    launch_module.counters_for = lambda *_: _expect(None)
    made = _made(params)
    for stream in (4096, 8192, 4096, 12288):
        made.launch(stream, _at(stream))
    assert _ran(4)


def fewer_maps_than_the_kernel_reads_are_refused() -> None:
    _use_device(0)
    params = _params()
    params.tensor_maps = params.tensor_maps[:2]
    with pytest.raises(ValueError, match="shorter"):
        _made(params)


def _expect(value: Any) -> None:
    assert value


if __name__ == "__main__":
    globals()[sys.argv[1]]()
