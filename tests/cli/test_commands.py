from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.cli import info as info_module
from atomr_accel_flashattn.cli.compile_ahead import GPU_ARCHS, MASKS, all_specs, specs_for
from atomr_accel_flashattn.cli.output import size_text, time_text
from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup
from atomr_accel_flashattn.launch.driver import DeviceProperties, device_count
from tests.cli.conftest import Ask, Invoke

ONE_KERNEL = ("compile", "--arch", "sm_80", "--dtype", "f16", "--head-dim", 32, "--mask", "full")
ITS_NAME = "fa2_fwd_sm80_f16_d32"
no_gpu = pytest.mark.skipif(device_count() > 0, reason="says what a machine without a GPU says")


def test_help_lists_every_command(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("demo", "info", "matrix", "compile", "cache", "bench", "tune"):
        assert command in result.stdout


def test_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "atomr_accel_flashattn", "cache", "--help"], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"atomr-flashattn {fa.__version__}\n"


def test_a_file_that_cannot_be_written_is_one_line_too(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("matrix", "--write", tmp_path / "missing.md")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: FileNotFoundError: ")
    assert len(result.stderr.splitlines()) == 1


def test_error_is_one_line_and_no_traceback(invoke: Invoke) -> None:
    result = invoke("compile", "--arch", "sm_75")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: DispatchError: arch: got sm_75; allowed are sm_80, ")
    assert len(result.stderr.splitlines()) == 1


# --- info -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache_dir")
def test_info_shows_versions_settings_and_cache(invoke: Invoke) -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for word in ("atomr-accel-flashattn", "cuda-bindings", "NVRTC", "backend", "0 kernels"):
        assert word in result.stdout


def test_info_json(ask: Ask, cache_dir: Path) -> None:
    found = ask("info")
    assert found["versions"]["atomr-accel-flashattn"] == fa.__version__
    assert found["versions"]["NVRTC"].startswith("13.")
    assert found["settings"]["cache_dir"] == found["cache"]["directory"] == str(cache_dir)
    assert len(found["devices"]) == device_count()


@no_gpu
def test_info_says_why_there_is_no_device(ask: Ask) -> None:
    assert "driver" in ask("info")["no_device"]


def test_info_shows_a_device_and_one_that_no_kernel_runs_on(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [DeviceProperties("NVIDIA H100 80GB HBM3", (9, 0), 132, 85 * 10**9), DeviceProperties("Tesla T4", (7, 5), 40, 16 * 10**9)]
    monkeypatch.setattr(info_module, "device_count", lambda: len(devices))
    monkeypatch.setattr(info_module, "device_properties", devices.__getitem__)
    text = invoke("info").stdout
    assert "NVIDIA H100 80GB HBM3" in text
    assert "sm_90" in text
    assert "got 7.5" in text


def test_info_survives_a_user_without_a_cache_folder(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_module, "settings", fa.Settings)
    assert "no home" in ask("info")["cache"]["refused"]


# --- compile ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache_dir")
def test_compile_fills_a_cache_to_ship_and_hits_it_the_second_time(ask: Ask, invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "to ship"
    first = ask(*ONE_KERNEL, "--out", out)
    assert first["directory"] == str(out)
    (kernel,) = first["kernels"]
    assert kernel["kernel"].startswith(ITS_NAME)
    assert not kernel["cache_hit"]
    assert kernel["registers"] > 0
    assert kernel["cubin_bytes"] == next(out.glob("*.cubin")).stat().st_size

    again = invoke(*ONE_KERNEL, "--out", out)
    assert again.exit_code == 0
    assert "0 compiled, 1 from the cache, 0 failed" in again.stdout
    assert [record["name"] for record in ask("cache", "list", "--dir", out)["kernels"]] == [kernel["kernel"]]


def test_dry_run_names_the_kernels_and_makes_none(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    names = invoke(*ONE_KERNEL, "--feature", "alibi", "--feature", "varlen", "--dry-run").stdout.split()
    assert [name.partition("b2")[2] for name in names] == ["", "_varlen", "_alibi", "_alibi_varlen"]
    assert [kernel["kernel"] for kernel in ask(*ONE_KERNEL, "--dry-run")["kernels"]] == names[:1]
    assert not cache_dir.exists()


def test_archs_default_to_those_of_the_machine(ask: Ask) -> None:
    archs = {kernel["arch"] for kernel in ask("compile", "--dry-run")["kernels"]}
    assert archs == {arch.value for arch in GPU_ARCHS} if device_count() == 0 else len(archs) >= 1


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--arch", "sm_75", "arch: got sm_75"),
        ("--dtype", "int8", "dtype: got int8"),
        ("--dtype", "e4m3", "'fp8' is not built"),
        ("--head-dim", "300", "head_dim: got 300"),
        ("--mask", "diagonal", "mask: got diagonal"),
        ("--feature", "paged", "feature: got paged"),
    ],
)
def test_compile_refuses_by_name(invoke: Invoke, option: str, value: str, named: str) -> None:
    result = invoke("compile", "--arch", "sm_80", option, value)
    assert result.exit_code == 1
    assert named in result.stderr


def test_compile_ends_with_the_compilers_log(invoke: Invoke, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomr_accel_flashattn.kernels.source.kernel_source", lambda _spec: "this is no CUDA")
    result = invoke(*ONE_KERNEL)
    assert result.exit_code == 1
    assert "1 failed" in result.stdout
    assert "error: CompileError" in result.stderr
    assert "this is no CUDA" in next(cache_dir.glob("*.cu")).read_text()
    assert str(cache_dir) in result.stderr
    assert "log:" in result.stderr


@pytest.mark.usefixtures("cache_dir")
def test_kernels_that_cannot_be_kept_are_an_error(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke(*ONE_KERNEL, "--out", tmp_path / "file")
    assert result.exit_code == 1
    assert "CacheError: cannot " in result.stderr
    assert "compiled" not in result.stdout


@pytest.mark.parametrize("switch", ["CACHE_READONLY", "DISABLE_CACHE"])
def test_a_cache_that_may_not_be_filled_is_an_error_before_anything_is_compiled(
    invoke: Invoke, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv(f"ATOMR_FLASHATTN_{switch}", "1")
    result = invoke(*ONE_KERNEL)
    assert result.exit_code == 1
    assert f"CacheError: no cache to fill: ATOMR_FLASHATTN_{switch} is set; name a folder with --out" in result.stderr
    assert not cache_dir.exists()


def test_sinks_are_compiled_only_where_a_window_has_a_left_bound() -> None:
    specs = specs_for([fa.SmArch.SM_80], [fa.DType.F16], [64], MASKS, ["sink_tokens"])
    assert len(specs) == 6  # the sliding masks are two bands at compile time, with a right bound and without; each with sinks and without
    assert all(spec.left_bound for spec in specs if spec.sink_tokens)
    with pytest.raises(fa.DispatchError, match="got sink_tokens with mask causal; allowed with sliding_causal"):
        specs_for([fa.SmArch.SM_80], [fa.DType.F16], [64], ["causal"], ["sink_tokens"])


def test_short_sequences_have_their_kernels_too_where_those_are_others() -> None:
    specs = specs_for([fa.SmArch.SM_90A, fa.SmArch.SM_90], [fa.DType.F16], [128, 256], ["causal"], ["varlen"])
    short_q = DispatchKey(fa.SmArch.SM_90A, fa.DType.F16, 128, causal=True, varlen=True, extras=Extras(short_q=True))
    assert lookup(short_q) in specs
    assert lookup(replace(short_q, extras=Extras())) in specs
    assert len(specs) == len(set(specs)) == 2 * (3 + 2)  # packed or not: sm_90a has two tiles at 128, else there is one


def test_grouped_heads_have_their_kernels_where_they_are_packed() -> None:
    specs = specs_for([fa.SmArch.SM_90A, fa.SmArch.SM_90], [fa.DType.F16], [96], ["full"], ["gqa", "alibi"])
    packed = [spec for spec in specs if spec.pack_gqa]
    assert [(spec.arch, spec.alibi) for spec in packed] == [(fa.SmArch.SM_90A, False)]
    assert len(specs) == len(set(specs)) == 5  # ALiBi or not on each arch, and the packed one


def test_all_is_the_full_product_each_kernel_once() -> None:
    specs = all_specs([fa.SmArch.SM_90])
    assert len(specs) == len(set(specs))
    bools = 2**7  # varlen, alibi, softcap, learned sink, dropout, alignment, scale_first
    masks = 6  # bounds on the right, on the left, on both, on none; with sinks where there is one on the left
    tiles = 6  # one a width
    assert len(specs) == 2 * tiles * 2 * masks * bools + 2  # types, tiles, exact or padded; and the two keep patterns


# --- cache ------------------------------------------------------------------------------------------------------------------------------


def test_cache_commands(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    assert ask("cache", "size") == {"directory": str(cache_dir), "kernels": 0, "bytes": 0}
    assert ask(*ONE_KERNEL)["kernels"]
    held = ask("cache", "size")
    assert held["kernels"] == 1
    assert held["bytes"] > 1000
    assert ITS_NAME in invoke("cache", "list").stdout
    assert "1 kernels" in invoke("cache", "size").stdout
    assert ask("cache", "verify") == {"directory": str(cache_dir), "good": 1, "removed": []}
    cleared = ask("cache", "clear")
    assert (cleared["removed"], cleared["freed_bytes"]) == (1, held["bytes"])
    assert "removed 0 kernels" in invoke("cache", "clear").stdout


def test_verify_removes_a_damaged_kernel_and_says_so(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    ask(*ONE_KERNEL)
    cubin = next(cache_dir.glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1])
    result = invoke("cache", "verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["removed"] == [cubin.stem]
    assert invoke("cache", "verify").exit_code == 0


def test_cache_without_any_folder_is_a_named_error(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomr_accel_flashattn.cli.cache.settings", fa.Settings)
    result = invoke("cache", "list")
    assert result.exit_code == 1
    assert "CacheError: no cache folder" in result.stderr


@pytest.mark.parametrize("command", ["verify", "clear"])
def test_files_of_others_are_never_removed(invoke: Invoke, tmp_path: Path, command: str) -> None:
    for name in ("package.json", "mine.cu"):
        (tmp_path / name).write_text("{}")
    result = invoke("cache", command, "--dir", tmp_path)
    assert result.exit_code == 1
    assert "mine.cu; nothing was removed" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"package.json", "mine.cu"}


def test_a_folder_that_is_named_and_not_there_is_a_named_error(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("cache", "verify", "--dir", tmp_path / "typo")
    assert result.exit_code == 1
    assert "CacheError: no folder" in result.stderr


# --- bench ------------------------------------------------------------------------------------------------------------------------------


def test_bench_lists_its_cells(ask: Ask, invoke: Invoke) -> None:
    cells = [cell["cell"] for cell in ask("bench", "--list")["cells"]]
    assert len(cells) > 36
    assert invoke("bench", "--list", "--cells", "gqa").stdout.count("gqa_d128") == 4
    assert invoke("bench", "--list", "--cells", "no such cell").exit_code == 2


@no_gpu
def test_bench_without_a_gpu_is_a_named_error(invoke: Invoke) -> None:
    result = invoke("bench")
    assert result.exit_code == 1
    assert "DeviceMismatchError: bench: got a machine without a GPU" in result.stderr


# --- what people read -------------------------------------------------------------------------------------------------------------------


def test_sizes_and_times_have_the_unit_that_fits() -> None:
    assert [size_text(size) for size in (0, 17, 1234, 34e6, 2.5e9)] == ["0 B", "17 B", "1.23 kB", "34 MB", "2.5 GB"]
    assert [time_text(seconds) for seconds in (12.3e-6, 4.56e-3, 0.25, 12.0, 345.0)] == ["12.3 us", "4.56 ms", "250 ms", "12 s", "345 s"]
