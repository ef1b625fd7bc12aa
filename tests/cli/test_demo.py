from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from atomr_accel_flashattn.cli import demo as demo_module
from atomr_accel_flashattn.cli.compile_ahead import GPU_ARCHS
from atomr_accel_flashattn.cli.demo import PICTURE
from atomr_accel_flashattn.demo import Backend, choose_backend, kernels_of, load_cases, run_case, runner
from atomr_accel_flashattn.demo.cases import dense_rows, long_context, minilm
from atomr_accel_flashattn.demo.picture import pooled_probabilities, probabilities
from atomr_accel_flashattn.dispatch import best_arch
from atomr_accel_flashattn.env import settings
from atomr_accel_flashattn.errors import ArchUnsupportedError, DeviceMismatchError, DriverTooOldError
from atomr_accel_flashattn.launch.driver import DeviceProperties, device_count
from atomr_accel_flashattn.types import Device, SmArch
from tests.cli.conftest import Invoke

PNG = b"\x89PNG\r\n\x1a\n"
SHORT = 512
no_gpu = pytest.mark.skipif(device_count() > 0, reason="says what a machine without a GPU says")


def test_demo_on_the_cpu_backend_runs_compiles_and_draws(invoke: Invoke, cache_dir: Path, tmp_path: Path) -> None:
    result = invoke("demo", "--device", "cpu", "--tokens", SHORT, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "CPU backend (as asked)" in result.stdout
    assert len(re.findall(r"reference_cpu +(?:recorded|float64) [\w ]+?  +\S+e-0\d +\S+e-0\d .*s  +ok", result.stdout)) == 2
    for arch in GPU_ARCHS:
        assert arch.value in result.stdout
    assert "miss" in result.stdout
    assert "What is supported" in result.stdout
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(PNG)
    assert len(list(cache_dir.glob("*.cubin"))) == 2 * len(GPU_ARCHS)


def test_demo_says_what_it_does_before_it_does_it(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, str] = {}

    def heard(name: str) -> None:
        """Keep what a reader of both streams has by now."""
        sys.stdout.flush()
        sys.stderr.flush()
        said[name] = "".join(stream.buffer.getvalue().decode() for stream in (sys.stderr, sys.stdout))

    for name in ("choose_backend", "load_cases", "run_case"):
        real = getattr(demo_module, name)
        monkeypatch.setattr(demo_module, name, lambda *given, name=name, real=real: (heard(name), real(*given))[1])
    assert invoke("demo", "--device", "cpu", "--tokens", SHORT, "--out", tmp_path, "--no-compile").exit_code == 0
    assert said["choose_backend"] == "looking for a GPU ...\n"
    assert "computing in float64 what is expected ..." in said["load_cases"]
    assert "Running on the CPU backend" in said["load_cases"]
    assert "running a long causal context ..." in said["run_case"]


def test_demo_at_80_columns_breaks_no_word(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wide = invoke("demo", "--device", "cpu", "--tokens", SHORT)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = invoke("demo", "--device", "cpu", "--tokens", SHORT)
    assert narrow.exit_code == wide.exit_code == 0
    lines = narrow.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 65
    kernels = [line.split()[0] for line in lines if re.match(r" +fa[23]_fwd", line)]
    assert kernels == re.findall(r"fa[23]_fwd\w+", wide.stdout)
    known = {word.strip(":,();") for word in wide.stdout.split()} | {"error", "refused", "sm_80", "90a"}
    words = {word.strip(":,();.") for word in narrow.stdout.split() if re.search("[A-Za-z]{3}", word)}
    assert words - known == set()


def test_demo_json(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("demo", "--device", "cpu", "--tokens", SHORT, "--out", tmp_path, "--no-compile", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [case["case"] for case in found["cases"]] == ["minilm", "long-context"]
    assert all(case["passed"] and case["error"] <= case["allowed"] for case in found["cases"])
    assert found["kernels"] == []
    assert found["picture"] == str(tmp_path / PICTURE)
    assert found["backend"]["name"] == "CPU"


def test_demo_without_matplotlib_says_so(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomr_accel_flashattn.cli.demo.find_spec", lambda _name: None)
    result = invoke("demo", "--device", "cpu", "--tokens", SHORT, "--out", tmp_path, "--no-compile")
    assert result.exit_code == 0
    assert "matplotlib is not installed" in result.stdout
    assert not (tmp_path / PICTURE).exists()


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_computed(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke("demo", "--device", "cpu", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "name a folder that you may write to" in " ".join(result.output.replace("│", " ").split())
    assert "CPU backend" not in result.output


def test_a_wrong_answer_ends_with_status_1(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomr_accel_flashattn.demo.cases.Case.error", lambda _case, _out: float("nan"))
    result = invoke("demo", "--device", "cpu", "--tokens", SHORT, "--out", tmp_path, "--no-compile")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


def test_unknown_device_is_a_usage_error(invoke: Invoke) -> None:
    assert invoke("demo", "--device", "tpu").exit_code == 2


@no_gpu
def test_demanding_a_gpu_without_one_is_a_named_error(invoke: Invoke) -> None:
    result = invoke("demo", "--device", "gpu")
    assert result.exit_code == 1
    assert "DeviceMismatchError: device: got 'gpu' on a machine without one" in result.stderr
    with pytest.raises(DeviceMismatchError):
        choose_backend("gpu")


@no_gpu
def test_without_a_gpu_the_cpu_is_taken_and_the_reason_given() -> None:
    assert choose_backend().why == "no GPU on this machine"


def test_a_gpu_that_cannot_be_used_is_left_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "driver", lambda: None)
    monkeypatch.setattr(runner, "device_count", lambda: 1)
    monkeypatch.setattr(runner, "device_properties", lambda _index: DeviceProperties("Tesla T4", (7, 5), 40, 16 * 10**9))
    assert "got 7.5" in choose_backend().why
    with pytest.raises(ArchUnsupportedError):
        choose_backend("gpu")

    def old() -> None:
        raise DriverTooOldError("the driver is old")

    monkeypatch.setattr(runner, "driver", old)
    assert choose_backend().why == "the driver is old"
    with pytest.raises(DriverTooOldError):
        choose_backend("gpu")


def test_a_gpu_that_can_be_used_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "driver", lambda: None)
    monkeypatch.setattr(runner, "device_count", lambda: 1)
    monkeypatch.setattr(runner, "device_properties", lambda _index: DeviceProperties("NVIDIA H100", (9, 0), 132, 85 * 10**9))
    assert choose_backend() == Backend(Device("cuda", 0), "NVIDIA H100")


def test_the_environment_narrows_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOMR_FLASHATTN_BACKEND", "cpu")
    settings.cache_clear()
    try:
        assert choose_backend().device.kind == "cpu"
    finally:
        monkeypatch.undo()
        settings.cache_clear()


@pytest.mark.gpu
def test_demo_on_the_gpu(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("demo", "--device", "gpu", "--out", tmp_path, "--no-compile", "--json")
    assert result.exit_code == 0, result.output
    family = "fa3_fwd_sm90a" if best_arch(Device("cuda", 0)) is SmArch.SM_90A else "fa2_fwd_sm"
    assert all(case["kernel"].startswith(family) for case in json.loads(result.stdout)["cases"])


def test_fixture_is_what_the_model_computed() -> None:
    case = minilm()
    assert case.q.shape == (1, len(case.tokens), 12, 32)
    assert case.q.dtype == np.float16
    assert case.tokens[1:4] == ("the", "lighthouse", "keeper")
    assert case.error(dense_rows(case.q, case.k, case.v, case.rows, causal=False)) < 1e-6


def test_long_context_is_the_same_every_time_and_knows_its_rows() -> None:
    first, second = (long_context(256) for _ in range(2))
    assert np.array_equal(first.q, second.q)
    assert first.rows[0] == 0
    assert first.rows[-1] == 255
    assert np.allclose(first.expected[:, 0], first.v[:, 0].repeat(4, axis=1))  # the first query sees the first key only


def test_maps_are_probabilities() -> None:
    for case in load_cases(256):
        lse = run_case(case, choose_backend("cpu")).lse
        weights = probabilities(case, lse, 3)
        assert np.allclose(weights.sum(axis=-1), 1, atol=1e-3)
        assert not case.causal or np.all(np.triu(weights, 1) == 0)
        pooled = pooled_probabilities(case, lse, 3, side=32)
        assert pooled.shape == (32, 32)
        assert pooled.max() <= 1.001


def test_every_case_has_a_kernel_on_every_arch() -> None:
    specs = kernels_of(load_cases(64), GPU_ARCHS)
    assert [spec.arch for spec in specs] == [arch for arch in GPU_ARCHS for _ in range(2)]
