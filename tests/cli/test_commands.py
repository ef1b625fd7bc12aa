from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.cli import compile_ahead as compile_module, info as info_module
from atomr_accel_flashattn.cli.compile_ahead import GPU_ARCHS, MASKS, all_specs, specs_for
from atomr_accel_flashattn.cli.output import print_rows, size_text, time_text
from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup, with_features
from atomr_accel_flashattn.env import VARIABLES, settings
from atomr_accel_flashattn.jit.cache import KernelCache
from atomr_accel_flashattn.jit.compile import compile_many
from atomr_accel_flashattn.kernels.bwd_postprocess import BackwardPostprocessSpec
from atomr_accel_flashattn.kernels.bwd_preprocess import BackwardPreprocessSpec
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskSpec
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec
from atomr_accel_flashattn.kernels.fa3_kvcache import Fa3KvCacheSpec
from atomr_accel_flashattn.kernels.forward import ForwardSpec
from atomr_accel_flashattn.kernels.kv_append import KvAppendSpec
from atomr_accel_flashattn.kernels.kvcache import Fa2KvCacheSpec, SplitCombineSpec
from atomr_accel_flashattn.kernels.merge_states import MergeStatesSpec
from atomr_accel_flashattn.kernels.spec import KernelSpec
from atomr_accel_flashattn.kernels.step import ScheduledKvCacheSpec, StepScheduleSpec
from atomr_accel_flashattn.kernels.used import forget_recorded, read_kernels, record_kernel
from atomr_accel_flashattn.launch import launcher
from atomr_accel_flashattn.launch.driver import DeviceProperties, device_count
from atomr_accel_flashattn.limits import BEFORE_FP8, NOT_BUILT
from tests.cli.conftest import Ask, Invoke

ONE_KERNEL = ("compile", "--arch", "sm_80", "--dtype", "f16", "--head-dim", 32, "--mask", "full")
ITS_NAME = "fa2_fwd_sm80_f16_d32"
no_gpu = pytest.mark.skipif(device_count() > 0, reason="says what a machine without a GPU says")


def test_help_lists_every_command(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("demo", "info", "matrix", "compile", "cache", "bench", "tune"):
        assert command in result.stdout
    assert "..." not in result.stdout.partition("Commands:")[2], "a summary is cut at 80 columns"


@pytest.mark.parametrize("command", ["demo", "info", "matrix", "compile", "cache", "bench", "tune"])
def test_every_command_has_its_help(invoke: Invoke, command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert ("--json" in result.stdout) == (command != "cache")


def test_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "atomr_accel_flashattn", "cache", "--help"], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"atomr-flashattn {fa.__version__}\n"


def test_short_options_and_completion_are_there(invoke: Invoke) -> None:
    assert invoke("-V").stdout == invoke("--version").stdout
    text = invoke("-h").stdout
    assert "--install-completion" in text
    assert "--show-completion" in text


@pytest.mark.parametrize(
    ("typed", "offered"), [("comp", "compile"), ("compile --mask sliding_f", "sliding_full"), ("compile --arch sm_1", "sm_120")]
)
def test_the_shell_completes_commands_and_values(typed: str, offered: str) -> None:
    words = f"atomr-flashattn {typed}"
    environ = {"_ATOMR_FLASHATTN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    assert offered in run_module(environ=environ).stdout.split()


def run_module(*arguments: str, environ: dict[str, str] | None = None, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atomr_accel_flashattn", *arguments]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=os.environ | (environ or {}), timeout=120, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [("--version",), ("matrix", "--json"), ("compile", "--arch", "sm_80", "--dry-run"), ("info",)])
def test_output_into_a_full_device_is_one_line_and_status_1(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run_module(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: OSError: ")
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = run_module("matrix", stdout=pipe)
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("matrix", "--write", "missing.md"),
        ("matrix", "--record", "missing.json"),
        ("compile", "--arch", "sm_75"),
        ("compile", "--arch", "all", "--arch", "sm_75"),
        ("compile", "--all", "--dtype", "f16"),
        ("compile", "--like", "missing.jsonl"),
        ("compile", "--jobs", 0),
        ("compile", "--out", __file__),
        ("cache", "list", "--dir", "missing"),
        ("cache", "clear", "--dir", __file__),
        ("bench", "--cells", "no such cell"),
        ("bench", "--peers", "no_such_peer"),
        ("bench", "--families", "fa9"),
        ("demo", "--device", "tpu"),
        ("demo", "--tokens", 1),
        ("tune",),
        ("tune", "--seqlen", 64, "--out", __file__),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_status_2(invoke: Invoke, arguments: tuple[object, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["x[v1]", "[bold]y[end]", ":smile:", "[/red]"])
def test_names_of_folders_are_printed_as_they_are(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / name
    monkeypatch.setenv("ATOMR_FLASHATTN_CACHE_DIR", str(folder))
    settings.cache_clear()
    try:
        for command in (("info",), ("cache", "size"), ("cache", "list"), ("cache", "verify"), ("cache", "clear"), ONE_KERNEL):
            result = invoke(*command)
            assert result.exit_code == 0, result.output
            assert str(folder) in result.stdout
        (folder / "mine.cu").touch()
        assert f"error: CacheError: {folder} is no kernel cache" in invoke("cache", "clear").stderr
        assert str(folder / "mine.cu") in invoke("matrix", "--record", folder / "mine.cu").stderr
        assert f"'{folder / 'no'}'" in invoke("matrix", "--record", folder / "no").stderr
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_a_variable_that_is_none_is_a_warning_of_every_command(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOMR_FLASHATTN_CACHE_DIRR", "x")
    settings.cache_clear()
    try:
        told = invoke("cache", "size").stderr
        assert told.startswith("warning: SettingsWarning: ATOMR_FLASHATTN_CACHE_DIRR: ")
        assert told.endswith("the nearest one is ATOMR_FLASHATTN_CACHE_DIR\n")
    finally:
        monkeypatch.undo()
        settings.cache_clear()


# --- info -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache_dir")
def test_info_shows_versions_settings_and_cache(invoke: Invoke) -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for word in ("atomr-accel-flashattn", "cuda-bindings", "NVRTC", "0 kernels", *VARIABLES.values()):
        assert word in result.stdout


def test_info_json(ask: Ask, cache_dir: Path) -> None:
    found = ask("info")
    assert found["versions"]["atomr-accel-flashattn"] == fa.__version__
    assert found["versions"]["NVRTC"].startswith("13.")
    assert found["settings"]["ATOMR_FLASHATTN_CACHE_DIR"] == found["cache"]["directory"] == str(cache_dir)
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


def test_dry_run_counts_and_names_the_kernels_and_makes_none(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    count, *names = invoke(*ONE_KERNEL, "--feature", "alibi", "--feature", "varlen", "--dry-run").stdout.splitlines()
    assert count == "4 kernels: 4 for sm_80"
    assert [name.partition("b2")[2] for name in names] == ["", "_varlen", "_alibi", "_alibi_varlen"]
    found = ask(*ONE_KERNEL, "--dry-run")
    assert found["count"] == 1
    assert [kernel["kernel"] for kernel in found["kernels"]] == names[:1]
    assert not cache_dir.exists()


def test_a_dry_run_of_all_counts_and_lists_nothing(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "_COMBINABLE", ("varlen", *compile_module._CACHED))
    result = invoke("compile", "--all", "--dry-run")
    first, second = result.stdout.splitlines()
    total = int(first.split()[0].replace(",", ""))
    assert total > 1000
    assert total == sum(int(each.split()[0].replace(",", "")) for each in first.partition(": ")[2].split(", "))
    assert second == "--json names them"
    assert result.stderr.strip() == "counting the kernels ..."


def test_at_80_columns_a_kernel_is_a_line(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    asked = (*ONE_KERNEL, "--feature", "varlen", "--out", tmp_path / "k")
    result = invoke(*asked)
    names = [record.name for record in KernelCache(tmp_path / "k").list()]
    assert len(names) == 2
    for text in (result.stdout, invoke("cache", "list", "--dir", tmp_path / "k").stdout):
        table = text.splitlines()
        assert sorted(line.split()[0] for line in table if line.strip().startswith("fa2_fwd")) == names
        assert len(table) < 10
    long = (*ONE_KERNEL, *(word for each in compile_module._COMBINABLE[1:8] for word in ("--feature", each)), "--dry-run")
    rows = [
        [spec["kernel"], "sm_80", "1", "2", "-", "3", "4", "hit"] for spec in json.loads(invoke(*long, "--json").stdout)["kernels"][:60]
    ]
    assert max(len(row[0]) for row in rows) > 60
    columns = ("kernel", "arch", "registers", "shared", "spills", "cubin", "time", "cache")
    screen = Console(file=io.StringIO(), width=80, markup=False)
    print_rows(screen, "", columns, rows, spare=("arch", "cubin", "shared", "cache", "spills", "registers", "time"))
    lines = [line for line in screen.file.getvalue().splitlines() if "fa2_fwd" in line]
    assert [line.split()[0] for line in lines] == [row[0] for row in rows]


def test_a_run_records_the_kernels_it_used_and_compile_makes_those(
    ask: Ask, invoke: Invoke, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "run" / "kernels.jsonl"
    monkeypatch.setenv("ATOMR_FLASHATTN_RECORD_KERNELS", str(record))
    settings.cache_clear()
    grouped = DispatchKey(fa.SmArch.SM_90A, fa.DType.BF16, 128, causal=True, gqa_ratio=4)
    used = [lookup(grouped), lookup(replace(grouped, arch=fa.SmArch.SM_80, dtype=fa.DType.F16, gqa_ratio=1))]
    used.append(lookup(with_features(DispatchKey(fa.SmArch.SM_90, fa.DType.F16, 64), ["dropout_mask"])))
    used += lookup(with_features(DispatchKey(fa.SmArch.SM_80, fa.DType.F16, 64), ["causal", "backward"])).steps()
    used.append(KvAppendSpec(arch=fa.SmArch.SM_80, dtype=fa.DType.F16, paged=True, wide_rotary=True))
    used += lookup(with_features(DispatchKey(fa.SmArch.SM_80, fa.DType.F16, 64), ["paged", "split"])).steps()
    planned: Any = lookup(with_features(DispatchKey(fa.SmArch.SM_80, fa.DType.F16, 64), ["paged", "scheduled"]))
    used += [StepScheduleSpec.before(planned), *planned.steps()]
    assert used[0].pack_gqa
    monkeypatch.setattr(launcher, "_load", lambda spec, _device, _cache: spec)
    monkeypatch.setattr(launcher, "_loaded", {})
    for spec in (*used, used[0]):
        launcher.load_kernel(spec, 0)
    forget_recorded()  # as another process
    launcher._loaded.clear()
    launcher.load_kernel(used[1], 1)
    monkeypatch.delenv("ATOMR_FLASHATTN_RECORD_KERNELS")
    settings.cache_clear()

    assert len(record.read_text().splitlines()) == len(used)
    assert read_kernels(record) == used
    assert [kernel["kernel"] for kernel in ask("compile", "--like", record, "--dry-run")["kernels"]] == [spec.kernel_name for spec in used]
    assert lookup(grouped) not in specs_for([fa.SmArch.SM_90A], [fa.DType.BF16], [128], ["causal"], [])
    assert [kernel["kernel"] for kernel in ask("compile", "--like", record)["kernels"]] == [spec.kernel_name for spec in used]
    assert len(list(cache_dir.glob("*.cubin"))) == len(used)
    assert "--like" in invoke("compile", "--like", record, "--mask", "full").stderr
    lines = record.read_text().splitlines()
    record.write_text("\n".join(line for line in lines if "fa2_bwd" in line) + "\n")
    assert len(ask("compile", "--like", record, "--dry-run")["kernels"]) == 3, "with what goes before and behind it"


@pytest.mark.parametrize("line", ["{", "[]", '{"header": "fa9_fwd"}', '{"header": "dropout_mask", "arch": "sm_90", "varlen": 1}'])
def test_a_record_of_kernels_that_is_none_names_its_line(invoke: Invoke, tmp_path: Path, line: str) -> None:
    (tmp_path / "kernels.jsonl").write_text(line + "\n")
    result = invoke("compile", "--like", tmp_path / "kernels.jsonl")
    assert result.exit_code == 1
    assert "kernels.jsonl, line 1: no kernel of this version" in result.stderr


def test_a_record_without_a_kernel_is_an_error(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "kernels.jsonl").touch()
    result = invoke("compile", "--like", tmp_path / "kernels.jsonl")
    assert (result.exit_code, "got a record without a kernel" in result.stderr) == (1, True)


def test_a_record_of_kernels_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATOMR_FLASHATTN_RECORD_KERNELS", str(tmp_path / "file" / "kernels.jsonl"))
    settings.cache_clear()
    with pytest.warns(fa.CacheWarning, match="cannot record kernels in "):
        record_kernel(lookup(DispatchKey(fa.SmArch.SM_90, fa.DType.F16, 64)))
    monkeypatch.undo()
    settings.cache_clear()


def test_archs_default_to_those_of_the_machine(ask: Ask) -> None:
    archs = {kernel["arch"] for kernel in ask("compile", "--dry-run")["kernels"]}
    assert archs == {arch.value for arch in GPU_ARCHS} if device_count() == 0 else len(archs) >= 1


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--arch", "sm_75", "arch: got sm_75"),
        ("--dtype", "int8", "dtype: got int8"),
        ("--dtype", "e4m3", "got e4m3 on sm_80, which has no fp8"),
        ("--feature", "fp8_kv", "got e4m3 on sm_80, which has no fp8"),
        ("--head-dim", "300", "head_dim: got 300"),
        ("--mask", "diagonal", "mask: got diagonal"),
        ("--feature", "split", "feature: got split"),
    ],
)
def test_compile_refuses_by_name(invoke: Invoke, option: str, value: str, named: str) -> None:
    result = invoke("compile", "--arch", "sm_80", option, value)
    assert result.exit_code == 2
    assert named in result.stderr


def test_compile_ends_with_the_compilers_log(invoke: Invoke, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelSpec, "source", lambda _spec: "this is no CUDA")
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
    result = invoke(*ONE_KERNEL, "--out", tmp_path / "file" / "kernels")
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
    # Packed or not: sm_90a has two tiles at 128, else there is one; and a block for each tile there, or persistent ones, and keys split
    # or not, with what combines the splits.
    assert len(specs) == len(set(specs)) == 2 * (3 * 2 * 2 + 2 + 2)


def test_grouped_heads_have_their_kernels_where_they_are_packed() -> None:
    specs = specs_for([fa.SmArch.SM_90A, fa.SmArch.SM_90], [fa.DType.F16], [96], ["full"], ["gqa", "alibi"])
    packed = [spec for spec in specs if spec.pack_gqa]
    assert {(spec.arch, spec.alibi) for spec in packed} == {(fa.SmArch.SM_90A, False)}
    assert [(getattr(spec, "split", False), spec.persistent) for spec in packed] == list(product((False, True), (True, False)))
    # ALiBi or not on each arch, and the packed one; persistent or not and split or not on sm_90a, and what combines splits
    assert len(specs) == len(set(specs)) == 2 + 2 * 2 * 3 + 1


def test_all_is_the_full_product_each_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = (64, 192)  # of six, which would take twelve seconds
    monkeypatch.setattr(compile_module, "HEAD_DIM_WIDTHS", widths)
    specs = all_specs([fa.SmArch.SM_90])
    assert len(specs) == len(set(specs))
    bools = 2**7  # varlen, alibi, softcap, learned sink, dropout, alignment, scale_first
    masks = 6  # bounds on the right, on the left, on both, on none; with sinks where there is one on the left
    assert {spec.head_dim for spec in specs if isinstance(spec, ForwardSpec)} == set(widths)
    of = Counter(type(spec) for spec in specs)
    forward = 2 * len(widths) * 2 * masks * bools  # types, tiles, exact or padded
    assert sum(of[kind] for kind in of if issubclass(kind, ForwardSpec)) == forward
    assert of[Fa2BackwardSpec] == 2 * forward * (1 if "deterministic" in NOT_BUILT else 2)  # blocks share keys or not
    assert of[DropoutMaskSpec] == 2
    assert of[KvAppendSpec] == 2 * 2 * 4  # types, kinds of cache, rotations
    features = 1 + 6  # one at a time, but dropout
    assert of[Fa2KvCacheSpec] <= 2 * 2 * len(widths) * 2 * masks * features * 8  # kinds of cache, types, ..., tiles and splits
    over_cache = {name for spec in specs if isinstance(spec, Fa2KvCacheSpec) for name in spec.names_of_set_flags()}
    assert {"sinktokens", "alibi", "softcap", "scalefirst", "learnedsink", "varlen", "split", "paged"} <= over_cache
    assert of[SplitCombineSpec] > 0
    assert of[MergeStatesSpec] == 2 * 3
    assert 0 < max(of[BackwardPreprocessSpec], of[BackwardPostprocessSpec]) < forward / 10, "backward kernels share what goes beside them"


def test_a_cache_is_compiled_with_every_tile_its_splits_and_appends(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    asked = (*ONE_KERNEL, "--feature", "paged")
    count, *names = invoke(*asked, "--dry-run").stdout.splitlines()
    kinds = Counter(name.partition("_sm80")[0] for name in names)
    planned = {"step_schedule": 4, "step_kvcache": 4, "step_combine": 4}
    assert kinds == {"fa2_fwd": 1, "fa2_kvcache": 8, "split_combine": 1, "kv_append": 4} | planned  # four numbers of rows, split or not
    assert count == "26 kernels: 26 for sm_80"
    assert all("paged" in name for name in names if name.startswith(("fa2_kvcache", "kv_append")))
    both = specs_for([fa.SmArch.SM_80], [fa.DType.F16], [64], ["causal"], ["paged", "kv_cache", "gqa", "dropout", "backward"])
    assert Counter(type(spec) for spec in both if "kv" in spec.HEADER) == {Fa2KvCacheSpec: 16, KvAppendSpec: 8, ScheduledKvCacheSpec: 8}
    hopper = specs_for([fa.SmArch.SM_90A], [fa.DType.F16], [64], ["causal"], ["paged"])
    of_wgmma = [spec for spec in hopper if isinstance(spec, Fa3KvCacheSpec) and spec.paged]
    flags = {(spec.pack_gqa, spec.split, spec.persistent) for spec in of_wgmma}
    assert flags == set(product((False, True), repeat=3))
    assert len(of_wgmma) == 2 * 8  # another tile for short q
    assert sum(isinstance(spec, SplitCombineSpec) for spec in hopper) == 1, "both families share what combines splits"
    for rows, split in product((16, 32, 64, 128), (False, True)):
        key = DispatchKey(fa.SmArch.SM_80, fa.DType.F16, 64, causal=True, paged=True, extras=Extras(cache_rows=rows, split=split))
        assert set(lookup(key).steps()) <= set(both)
    assert len(ask(*ONE_KERNEL, "--feature", "kv_cache", "--dry-run")["kernels"]) == 26
    small = [spec for spec in both if isinstance(spec, (KvAppendSpec, SplitCombineSpec))]
    assert not any(isinstance(made, fa.CompileError) for made in compile_many(small[:3], cache=KernelCache(cache_dir)))


def test_fp8_is_compiled_in_the_forms_that_have_kernels() -> None:
    plain = specs_for([fa.SmArch.SM_90A], [fa.DType.F8E4M3], [64], ["causal"], [])
    assert Counter(spec.HEADER for spec in plain) == {"fa3_fp8": 2}, "persistent or not, and never split"
    by_mma = Counter(spec.HEADER for spec in specs_for([fa.SmArch.SM_89], [fa.DType.F8E4M3], [64], ["causal"], []))
    assert by_mma == {"fp8_kvcache": 4 * 2, "split_combine": 1}, "numbers of rows; split or not"
    cached = Counter(spec.HEADER for spec in specs_for([fa.SmArch.SM_90A], [fa.DType.F8E4M3], [64], ["causal"], ["paged"]))
    assert cached["fp8_kvcache"] == cached["fa3_fp8_kvcache"] == 8, "numbers of rows, or heads packed and persistence; split or not"
    assert cached["fp8_append"] == 1 + 2 * 4, "tokens in fp8, or in one of two types with four rotations"


@pytest.mark.parametrize("option", [("--dtype", "e4m3"), ("--feature", "fp8_kv")], ids=str)
def test_fp8_is_compiled_for_the_archs_that_have_it(ask: Ask, monkeypatch: pytest.MonkeyPatch, option: tuple[str, str]) -> None:
    monkeypatch.setattr(compile_module, "device_count", lambda: 0)
    kernels = ask("compile", *option, "--feature", "paged", "--head-dim", "64", "--mask", "causal", "--dry-run")["kernels"]
    assert {kernel["arch"] for kernel in kernels} == {arch.value for arch in GPU_ARCHS if arch not in BEFORE_FP8}


def test_a_backward_is_compiled_with_what_goes_before_and_behind_it(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    asked = (*ONE_KERNEL, "--feature", "backward", "--feature", "alibi")
    count, *names = invoke(*asked, "--dry-run").stdout.splitlines()
    assert count == "6 kernels: 6 for sm_80"
    kinds = Counter(name.partition("_sm80")[0] for name in names)
    assert kinds == {"fa2_fwd": 2, "fa2_bwd": 2, "bwd_preprocess": 1, "bwd_postprocess": 1}
    assert [kernel["kernel"] for kernel in ask(*asked)["kernels"]] == names
    assert len(list(cache_dir.glob("*.cubin"))) == 6


def test_backward_kernels_of_specs_for_are_those_that_calls_launch() -> None:
    asked = [fa.SmArch.SM_90A], [fa.DType.F16], [64], ["causal"]
    key = DispatchKey(fa.SmArch.SM_90A, fa.DType.F16, 64, causal=True, extras=Extras(direction="bwd"))
    steps = lookup(key).steps()
    assert [type(step) for step in steps] == [BackwardPreprocessSpec, Fa2BackwardSpec, BackwardPostprocessSpec]
    without, with_backward = (specs_for(*asked, features) for features in ([], ["backward"]))
    assert set(with_backward) == {*without, *steps}
    split = lookup(replace(key, extras=replace(key.extras, head_split=True))).steps()
    assert set(specs_for(*asked, ["gqa", "backward"])) == {*specs_for(*asked, ["gqa"]), *steps, *split}
    assert split[0] == steps[0], "what goes before is the same"
    if "deterministic" in NOT_BUILT:
        with pytest.raises(fa.FeatureNotBuiltError, match="'deterministic' is not built"):
            specs_for(*asked, ["deterministic"])
    else:
        assert any(spec.deterministic for spec in specs_for(*asked, ["deterministic"]) if isinstance(spec, Fa2BackwardSpec))


# --- cache ------------------------------------------------------------------------------------------------------------------------------


def test_cache_commands(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    assert ask("cache", "size") == {"directory": str(cache_dir), "kernels": 0, "bytes": 0}
    assert ask(*ONE_KERNEL)["kernels"]
    held = ask("cache", "size")
    assert held["kernels"] == 1
    assert held["bytes"] > 1000
    assert ITS_NAME in invoke("cache", "list").stdout
    assert "1 kernels" in invoke("cache", "size").stdout
    assert ask("cache", "verify") == {"directory": str(cache_dir), "good": 1, "removed": [], "problems": []}
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


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_verify_names_what_somebody_else_can_have_written_and_leaves_it(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    ask(*ONE_KERNEL)
    cubin = next(cache_dir.glob("*.cubin"))
    cubin.chmod(0o666)
    (cache_dir / "tuned_tiles.json").touch()
    (cache_dir / "tuned_tiles.json").chmod(0o660)
    result = invoke("cache", "verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "directory": str(cache_dir),
        "good": 0,
        "removed": [],
        "problems": [
            f"{cubin.name}: it is writable by others (mode 0666)",
            "tuned_tiles.json: it is writable by others (mode 0660)",
        ],
    }
    text = invoke("cache", "verify").stdout
    assert "0 good, 0 damaged and removed, 2 not loaded because others can have written them" in text
    assert f"  {cubin.name}: it is writable by others" in text
    cache_dir.chmod(0o777)
    result = invoke("cache", "verify")
    assert result.exit_code == 1
    assert f"  {cache_dir}: it is writable by others (mode 0777)" in result.stdout
    assert invoke("cache", "list").exit_code == 0
    assert invoke("cache", "size").exit_code == 0
    assert (cubin.exists(), cache_dir.stat().st_mode & 0o777) == (True, 0o777), "commands that look change nothing"
    assert invoke("cache", "clear").exit_code == 0


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


# --- bench ------------------------------------------------------------------------------------------------------------------------------


def test_bench_lists_its_cells(ask: Ask, invoke: Invoke) -> None:
    cells = [cell["cell"] for cell in ask("bench", "--list")["cells"]]
    assert len(cells) > 36
    assert invoke("bench", "--list", "--cells", "gqa").stdout.count("gqa_d128") == 4
    assert invoke("bench", "--list", "--cells", "no such cell").exit_code == 2


def test_bench_of_decode_lists_its_own_cells(ask: Ask, invoke: Invoke) -> None:
    cells = {cell["cell"]: cell for cell in ask("bench", "decode", "--list")["cells"]}
    assert cells["decode_128x32k_page16"]["kv_bytes"] == 2 * 128 * 32768 * 8 * 128 * 2
    assert cells["slots_1x64k_page64_empty1023"]["sequences"] == 1024
    assert invoke("bench", "decode", "--list", "--cells", "slots").stdout.count("slots_1x64k") == 2
    assert invoke("bench", "decode", "--list", "--cells", "grid_d128").exit_code == 2
    for beside in (("--backward",), ("--host",), ("--families", "fa2"), ("--peers", "flex")):
        assert invoke("bench", "decode", *beside).exit_code == 2
    assert "bench: got a machine without a GPU" in invoke("bench", "decode", "--cells", "slots").stderr


def test_bench_of_the_backward_lists_its_own_cells_with_its_own_arithmetic(ask: Ask, invoke: Invoke) -> None:
    forward, backward = ({cell["cell"]: cell["flops"] for cell in ask("bench", "--list", *more)["cells"]} for more in ((), ("--backward",)))
    assert {name.partition("_")[0] for name in backward} == {"grid", "gqa", "varlen", "window", "deterministic"}
    assert all(backward[name] == 2.5 * flops for name, flops in forward.items() if name in backward)
    assert invoke("bench", "--list", "--cells", "deterministic").exit_code == 2
    for beside, said in (("--host", "--host, which measures a training step"), ("--families=fa2", "the backward has one family")):
        result = invoke("bench", "--backward", beside)
        assert (result.exit_code, said in " ".join(result.stderr.replace("│", "").split())) == (2, True)


@no_gpu
@pytest.mark.parametrize("more", [(), ("--backward",)])
def test_bench_without_a_gpu_is_a_named_error(invoke: Invoke, more: tuple[str, ...]) -> None:
    result = invoke("bench", *more)
    assert result.exit_code == 1
    assert "DeviceMismatchError: bench: got a machine without a GPU" in result.stderr


# --- what people read -------------------------------------------------------------------------------------------------------------------


def test_sizes_and_times_have_the_unit_that_fits() -> None:
    assert [size_text(size) for size in (0, 17, 1234, 34e6, 2.5e9)] == ["0 B", "17 B", "1.23 kB", "34 MB", "2.5 GB"]
    assert [time_text(seconds) for seconds in (12.3e-6, 4.56e-3, 0.25, 12.0, 345.0)] == ["12.3 us", "4.56 ms", "250 ms", "12 s", "345 s"]
