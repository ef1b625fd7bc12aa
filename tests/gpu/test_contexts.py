"""What only a real driver can show: that it refuses a function under a foreign context, and that the launch then still happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from atomr_accel_flashattn.dispatch import arch_of_capability
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskParams
from atomr_accel_flashattn.kernels.spec import Family
from atomr_accel_flashattn.launch.driver import check, current_context, device_count, device_properties, driver, primary_context
from atomr_accel_flashattn.launch.launcher import Launch, load_kernel
from atomr_accel_flashattn.reference.philox import keep_mask
from tests.jit.kernels import MASK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device_count() == 0, reason="no GPU")]

_ROWS, _KEYS, _SEED, _THRESHOLD = 64, 32, 42, 128
_PATTERN = keep_mask(_SEED, 0, streams=[0], rows=range(_ROWS), cols=range(_KEYS), threshold=_THRESHOLD)[0]


@pytest.fixture
def family() -> Family:
    """The dropout mask kernel's."""
    return MASK.family


@dataclass
class Patch:
    """One block of the dropout mask kernel: 64 x 32 bytes on a GPU, written by a launch and read back."""

    made: Launch
    keep: int
    rng: int
    index: int

    def launch(self) -> None:
        self.made.launch(0, (self.keep, self.rng, 0, 0))

    def check_and_poison(self) -> None:
        host = np.empty((_ROWS, _KEYS), np.uint8)
        with current_context(self.index):
            check(driver().cuMemcpyDtoH(host.ctypes.data, self.keep, host.nbytes), "cuMemcpyDtoH")
            check(driver().cuMemsetD8(self.keep, 7, host.nbytes), "cuMemsetD8")
            check(driver().cuCtxSynchronize(), "cuCtxSynchronize")
        assert (host == _PATTERN).all()


def patch_on(index: int) -> Patch:
    kernel = load_kernel(replace(MASK, arch=arch_of_capability(*device_properties(index).compute_capability)), index)
    with current_context(index):
        keep = int(check(driver().cuMemAlloc(_ROWS * _KEYS), "cuMemAlloc"))
        rng = int(check(driver().cuMemAlloc(16), "cuMemAlloc"))
        check(driver().cuMemsetD8(keep, 7, _ROWS * _KEYS), "cuMemsetD8")
        seed = np.array([_SEED, 0], np.int64)
        check(driver().cuMemcpyHtoD(rng, seed.ctypes.data, seed.nbytes), "cuMemcpyHtoD")
    params = DropoutMaskParams(batch=1, heads=1, seqlen_q=_ROWS, seqlen_k=_KEYS, dropout_threshold=_THRESHOLD)
    return Patch(kernel.launch_of(params, 1, DropoutMaskParams.SLOTS), keep, rng, index)


@pytest.fixture
def patch() -> Iterator[Patch]:
    made = patch_on(0)
    yield made
    with current_context(0):
        check(driver().cuMemFree(made.keep), "cuMemFree")
        check(driver().cuMemFree(made.rng), "cuMemFree")


def in_a_new_thread(work: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def current() -> int:
    return int(check(driver().cuCtxGetCurrent(), "cuCtxGetCurrent"))


def test_a_thread_without_a_context_launches(patch: Patch):
    def work() -> None:
        assert current() == 0
        patch.launch()
        assert current() == int(primary_context(0))
        patch.check_and_poison()

    in_a_new_thread(work)


def test_a_foreign_context_is_refused_by_cuda_then_left_as_it_was(patch: Patch):
    cuda = driver()
    foreign = check(cuda.cuCtxCreate(None, 0, check(cuda.cuDeviceGet(0), "cuDeviceGet")), "cuCtxCreate")
    try:
        assert int(foreign) != int(primary_context(0))
        patch.launch()
        assert current() == int(foreign)
    finally:
        check(cuda.cuCtxDestroy(foreign), "cuCtxDestroy")
    patch.check_and_poison()


@pytest.mark.skipif(device_count() < 2, reason="needs two GPUs")
def test_device_1_from_a_thread_that_uses_device_0():
    other = patch_on(1)

    def work() -> None:
        check(driver().cuCtxSetCurrent(primary_context(0)), "cuCtxSetCurrent")
        other.launch()
        assert current() == int(primary_context(0))
        other.check_and_poison()

    in_a_new_thread(work)
