"""The stand-ins themselves: they compute, note, hold back and refuse; and what contradicts a kernel is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnMsg, FlashAttnProps
from tests.fakes import libcuda
from tests.fakes.arrays import FakeArray
from tests.fakes.gpu import FakeGpu
from tests.fakes.waiting import PATIENCE, until


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    made = FakeGpu()
    made.install(monkeypatch)
    yield made
    made.driver.complete()


def arrays(seed: int = 0, heads_kv: int = 2) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((1, 40, heads, 16)).astype(np.float16) for heads in (2, heads_kv, heads_kv))


def on_gpu(*host: np.ndarray) -> fa.Fa2FwdRequest:
    return fa.Fa2FwdRequest(*(FakeArray(array).info() for array in host))


@pytest.mark.parametrize("heads_kv", [2, 1])
def test_kernels_compute_what_their_parameters_say_and_plans_repeat_them(gpu: FakeGpu, heads_kv: int) -> None:
    for seed in range(3):
        host = arrays(seed, heads_kv)
        out = fa.run(on_gpu(*host)).out
        np.testing.assert_allclose(out.array, fa.run(fa.Fa2FwdRequest(*host)).out, atol=2e-3)
    assert gpu.repeated == [False, True, True]
    assert gpu.last.heads_per_kv == 2 // heads_kv


def test_a_launch_that_contradicts_its_kernel_is_seen(gpu: FakeGpu) -> None:
    request = on_gpu(*arrays())
    fa.run(request)
    gpu.specs[0] = replace(gpu.specs[0], exact_head_dim=True)
    with pytest.raises(AssertionError):
        fa.run(request)


def test_a_lost_device_is_named(gpu: FakeGpu) -> None:
    request = on_gpu(*arrays())
    gpu.status = 700
    with pytest.raises(fa.DeviceLostError, match="restart the process"):
        fa.run(request)


def test_launches_are_refused_and_interrupted_where_the_test_says_so(gpu: FakeGpu) -> None:
    request = on_gpu(*arrays())
    gpu.status = 701
    with pytest.raises(fa.LaunchError):
        fa.run(request)
    gpu.status, gpu.raises = 0, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        fa.run(request)
    gpu.raises = None
    fa.run(request)
    assert len(gpu.launches) == 1


def test_the_actor_launches_on_it_and_waits_for_what_is_held(gpu: FakeGpu) -> None:
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        gpu.driver.hold()
        host = arrays()
        reply = actor.ask(FlashAttnMsg.Forward(on_gpu(*host), lse=False))
        until(lambda: gpu.launches, "a launch")
        assert not reply.done()
        gpu.driver.complete()
        answer = reply.result(PATIENCE)
        np.testing.assert_allclose(answer.out.array, fa.run(fa.Fa2FwdRequest(*host)).out, atol=2e-3)
    whats = [entry[0] for entry in gpu.driver.log]
    assert whats.index("stream") < whats.index("launch") < whats.index("destroy")
    assert gpu.driver.live_events == 0


@pytest.mark.torch
def test_tensors_of_the_card_keep_their_memory(gpu: FakeGpu) -> None:
    torch = pytest.importorskip("torch")
    from tests.fakes.tensors import fake

    host = torch.zeros(3)
    assert fake(host).is_cuda
    assert fake(host).data_ptr() == host.data_ptr()
    assert fake(host).device == torch.device("cuda", 0)


def test_a_process_takes_the_c_library_for_the_driver(tmp_path: Path) -> None:
    if libcuda.build(tmp_path) is None:
        pytest.skip("the fake driver needs a C compiler")
    code = (
        "from tests.fakes import libcuda; from atomr_accel_flashattn.launch import driver\n"
        "assert driver.device_count() == 2\n"
        "libcuda.value('init_status').value = 100\n"
        "print(driver.device_properties(1).name, libcuda.value('launches').value)"
    )
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, cwd=root, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Fake GPU 0\n"
