"""What launch/launcher.py does with a driver: each function is a scenario of test_launch.py, whose libcuda is tests/fakes/libcuda.c."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from atomr_accel_flashattn.env import settings
from atomr_accel_flashattn.errors import DeviceLostError, DriverTooOldError, LaunchError, NoDriverError
from atomr_accel_flashattn.jit.cache import KernelCache
from atomr_accel_flashattn.kernels.forward import FwdParams
from atomr_accel_flashattn.kernels.spec import KernelSpec
from atomr_accel_flashattn.launch import driver as driver_module
from atomr_accel_flashattn.launch.error_word import devices_with_a_word, error_word, take_error
from atomr_accel_flashattn.launch.launcher import Launch, LoadedKernel, load_kernel
from tests.fakes.libcuda import value as fake
from tests.jit.kernels import FORWARD

_GRID = 7


def pointers(stream: int, step: int = 1) -> tuple[int, ...]:
    return tuple(range(stream, stream + step * len(FwdParams.SLOTS), step))


def loaded(device: int = 0, spec: KernelSpec = FORWARD) -> LoadedKernel:
    return load_kernel(spec, device, KernelCache(os.environ["SCENARIO_CACHE"]))


def prepared(device: int = 0, grid: int = _GRID) -> Launch:
    return loaded(device).launch_of(FwdParams(), grid, FwdParams.SLOTS)


def in_threads(work: Callable[[int], None], arguments: Iterable[int]) -> None:
    """Run ``work`` of each argument in a thread of its own, switching as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)


def a_launch_reaches_the_driver_as_it_was_made() -> None:
    made = prepared()
    made.launch(64, pointers(64))
    made.launch(128, pointers(128))
    made.launch(0, pointers(0))
    assert (fake("launches").value, fake("torn").value, fake("loads").value, fake("retains").value) == (3, 0, 1, 1)
    assert list(fake("grid", ctypes.c_uint * 3)) == [_GRID, 1, 1]
    assert list(fake("block", ctypes.c_uint * 3)) == [FORWARD.tile.threads, 1, 1]
    assert fake("launch_shared").value == FORWARD.shared_memory


def addresses_are_found_by_their_names() -> None:
    """Two launches of one plan share the addresses of a call: each takes those that its kernel has, in the kernel's order."""
    slots = ("keep", *reversed(FwdParams.SLOTS), "other")
    made = loaded().launch_of(FwdParams(), _GRID, slots)
    for stream in (64, 128):
        made.launch(stream, (1, *reversed(pointers(stream)), 2))
    assert (fake("launches").value, fake("torn").value) == (2, 0)


def parameters_are_copied_when_a_launch_is_made() -> None:
    params = FwdParams(batch=3)
    made = loaded().launch_of(params, _GRID, FwdParams.SLOTS)
    params.batch = 4
    made.launch(64, pointers(64))
    of_kernel = ctypes.cast(made.arguments()[2]._obj[0], ctypes.POINTER(FwdParams))
    assert of_kernel.contents.batch == 3


def a_kernel_is_loaded_once_however_many_threads_ask() -> None:
    kernels: list[LoadedKernel] = []
    threads = [threading.Thread(target=lambda: kernels.append(loaded())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake("loads").value == 1
    assert len({id(kernel) for kernel in kernels}) == 1


def threads_that_share_a_launch_never_tear_its_parameters() -> None:
    made = prepared()

    def work(stream: int) -> None:
        for _ in range(2000):
            made.launch(stream, pointers(stream))

    in_threads(work, [1000 * (i + 1) for i in range(8)])
    assert (fake("launches").value, fake("torn").value) == (16000, 0)


def a_thread_without_a_context_gets_the_one_of_device_0() -> None:
    made = prepared()
    made.launch(0, pointers(0))
    made.launch(0, pointers(0))
    assert (fake("launches").value, fake("refused").value) == (2, 1)
    assert current() == int(driver_module.primary_context(0))


def device_1_is_launched_on_and_the_current_context_stays() -> None:
    made = prepared(1)
    for before in (0, int(driver_module.primary_context(0)), int(driver_module.primary_context(1))):
        if before:
            driver_module.driver().cuCtxSetCurrent(before)
        made.launch(0, pointers(0))
        assert fake("last_device").value == 1
        assert current() == before
    assert (fake("launches").value, fake("refused").value) == (3, 2)


def each_device_has_its_own_kernel() -> None:
    assert loaded(0).function != loaded(1).function
    assert fake("loads").value == 2
    with pytest.raises(LaunchError, match="there is no GPU 2: 2 visible"):
        loaded(2)


def current() -> int:
    return int(driver_module.check(driver_module.driver().cuCtxGetCurrent(), "cuCtxGetCurrent"))


def a_cubin_that_does_not_load_is_compiled_once_more() -> None:
    cache = KernelCache(os.environ["SCENARIO_CACHE"])
    load_kernel(FORWARD, 0, cache)
    fake("bad_loads").value = 1
    assert not load_kernel(FORWARD, 1, cache).compiled.cache_hit
    assert fake("loads").value == 3


def a_cubin_that_never_loads_is_an_error() -> None:
    fake("bad_loads").value = 100
    with pytest.raises(LaunchError, match=r"loading a kernel for sm_80 on GPU 0 \(compute capability 8\.0\) failed") as caught:
        loaded()
    assert caught.value.cuda_error == "CUDA_ERROR_INVALID_IMAGE"
    assert caught.value.kernel_name == FORWARD.kernel_name
    assert fake("loads").value <= 2


def large_shared_memory_is_asked_for() -> None:
    spec = replace(FORWARD, head_dim=128, v_head_dim=128, tile=replace(FORWARD.tile, block_m=128))
    load_kernel(spec, 0, KernelCache(os.environ["SCENARIO_CACHE"]))
    assert spec.shared_memory > 48 * 1024
    assert fake("shared").value == spec.shared_memory


def a_refused_launch_is_named() -> None:
    made = prepared()
    fake("launch_status").value = 701
    with pytest.raises(LaunchError, match=f"launching {_GRID} blocks of 128 threads, .* on GPU 0 failed: what happened") as caught:
        made.launch(0, pointers(0))
    assert not isinstance(caught.value, DeviceLostError)
    assert caught.value.cuda_error == "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"


def a_sticky_error_says_that_the_device_is_lost() -> None:
    made = prepared()
    fake("launch_status").value = 700
    with pytest.raises(DeviceLostError, match="restart the process") as caught:
        made.launch(0, pointers(0))
    assert caught.value.cuda_error == "CUDA_ERROR_ILLEGAL_ADDRESS"


def debug_waits_for_the_kernel_and_raises_its_error() -> None:
    os.environ["ATOMR_FLASHATTN_DEBUG"] = "1"
    settings.cache_clear()
    made = prepared()
    made.launch(0, pointers(0))
    assert fake("syncs").value == 1
    fake("capturing").value = 1
    made.launch(0, pointers(0))
    assert fake("syncs").value == 1
    fake("capturing").value = 0
    fake("sync_status").value = 700
    with pytest.raises(DeviceLostError, match="running the kernel failed"):
        made.launch(0, pointers(0))


def an_old_driver_is_named() -> None:
    fake("version").value = 12080
    with pytest.raises(DriverTooOldError, match=r"for CUDA 12\.8; the kernels need CUDA 13\.0 \(driver 580\) or later"):
        loaded()
    assert driver_module.device_count() == 0


def a_driver_without_a_gpu_is_named() -> None:
    fake("init_status").value = 100
    with pytest.raises(NoDriverError, match="does not start: CUDA_ERROR_NO_DEVICE, what happened"):
        loaded()
    assert driver_module.device_count() == 0


def devices_are_described() -> None:
    assert driver_module.device_count() == 2
    assert driver_module.device_properties(1) == ("Fake GPU", (8, 0), 108, 1 << 30)
    assert driver_module.driver_version() == "13.0"


def too_few_addresses_are_refused() -> None:
    made = prepared()
    with pytest.raises(ValueError, match="same size"):
        made.launch(0, (1, 2, 3))
    assert fake("launches").value == 0


def the_error_word_of_a_device_is_taken_once() -> None:
    word = error_word(1)
    assert (fake("alloc_device").value, error_word(1), devices_with_a_word()) == (1, word, (1,))
    assert take_error(1) == 0
    ctypes.c_int32.from_address(word).value = 3
    before = fake("syncs").value
    assert [take_error(1), take_error(1), take_error(0)] == [3, 0, 0]
    assert fake("syncs").value > before
    fake("sync_status").value = 700
    with pytest.raises(DeviceLostError):
        take_error(1)


def an_error_word_can_be_made_while_anything_is_captured() -> None:
    fake("capturing").value = 1
    assert error_word(0)
    assert fake("forbidden").value == 0


if __name__ == "__main__":
    globals()[sys.argv[1]]()
