from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomr_accel_flashattn.env import settings
from atomr_accel_flashattn.errors import CacheWarning, CompileError, NvrtcMissingError
from atomr_accel_flashattn.jit import compile as compile_module, headers, nvrtc
from atomr_accel_flashattn.jit.cache import KernelCache, default_cache
from atomr_accel_flashattn.jit.compile import CompiledKernel, cache_key, compile_kernel, compile_many
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskSpec
from atomr_accel_flashattn.kernels.spec import KernelSpec
from atomr_accel_flashattn.types import SmArch
from tests.jit.kernels import FORWARD, MASK

_SPILLING = """\
ptxas info    : Function properties for helper
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Function properties for k
ptxas         .     32 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 360 bytes cmem[0]
"""


def report(kernel: CompiledKernel) -> tuple[int, int, int, float, str]:
    return kernel.registers, kernel.spill_bytes, kernel.shared_bytes, kernel.compile_seconds, kernel.log


def test_a_hit_is_the_kernel_that_was_compiled_with_its_report(tmp_path: Path):
    cache = KernelCache(tmp_path)
    cold, warm = compile_kernel(FORWARD, cache), compile_kernel(FORWARD, cache)
    assert (cold.cache_hit, warm.cache_hit) == (False, True)
    assert warm.cubin == cold.cubin
    assert warm.cubin.startswith(b"\x7fELF")
    assert FORWARD.kernel_name.encode() in warm.cubin
    assert report(warm) == report(cold)
    assert warm.registers > 0
    assert warm.shared_bytes == FORWARD.shared_memory
    assert warm.seconds < cold.seconds


def test_a_hit_takes_two_milliseconds_at_most(tmp_path: Path):
    cache = KernelCache(tmp_path)
    compile_kernel(FORWARD, cache)
    times = []
    for _ in range(200):  # a second: a core that is shared with another process is slow for longer than one hit takes
        fresh = KernelCache(tmp_path)
        nvrtc.nvrtc_digest.cache_clear()
        headers._closure.cache_clear()
        started = time.thread_time()  # what the hit takes of a processor: other processes of a busy machine do not count
        assert compile_kernel(FORWARD, fresh).cache_hit
        times.append(time.thread_time() - started)
    assert min(times) < 2e-3


def test_the_key_holds_what_decides_the_code_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key = cache_key(FORWARD, "text")
    assert cache_key(FORWARD, "text") == key
    others = [cache_key(FORWARD, "text "), cache_key(replace(FORWARD, arch=SmArch.SM_90), "text")]
    with monkeypatch.context() as patch:
        patch.setattr(headers, "closure_digest", lambda _text: b"other headers")
        others.append(cache_key(FORWARD, "text"))
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "nvrtc_digest", lambda: "other compiler")
        others.append(cache_key(FORWARD, "text"))
    assert len({key.digest, *(other.digest for other in others)}) == 5

    key = cache_key(FORWARD, FORWARD.source())
    shutil.copytree(headers.headers_dir(), tmp_path / "elsewhere")
    monkeypatch.setattr(headers, "headers_dir", lambda: tmp_path / "elsewhere")
    assert cache_key(FORWARD, FORWARD.source()) == key


def test_a_damaged_entry_is_compiled_again(tmp_path: Path):
    cache = KernelCache(tmp_path)
    good = compile_kernel(MASK, cache)
    (path,) = tmp_path.glob("*.cubin")
    path.write_bytes(good.cubin[:100])
    assert not compile_kernel(MASK, cache).cache_hit
    assert compile_kernel(MASK, cache).cache_hit
    assert path.read_bytes() == good.cubin


def test_a_cache_that_cannot_be_written_still_compiles(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = KernelCache(blocked / "cache")
    with pytest.warns(CacheWarning):
        assert not compile_kernel(MASK, cache).cache_hit


def test_recompile_replaces_an_entry(tmp_path: Path):
    cache = KernelCache(tmp_path)
    compile_kernel(MASK, cache)
    assert not compile_kernel(MASK, cache, recompile=True).cache_hit
    assert compile_kernel(MASK, cache).cache_hit


def test_a_kernel_that_does_not_compile_shows_log_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DropoutMaskSpec, "source", lambda spec: f"// {spec.kernel_name}\nint x = undefined_name;\n")
    with pytest.raises(CompileError, match=r"NVRTC 13\.\d+ failed with NVRTC_ERROR_COMPILATION for sm_80") as caught:
        compile_kernel(MASK, KernelCache(tmp_path))
    error = caught.value
    assert error.spec is MASK
    assert 'identifier "undefined_name" is undefined' in error.log
    assert error.source_path is not None
    assert error.source_path.parent == tmp_path
    assert "undefined_name" in error.source_path.read_text()
    for part in (MASK.kernel_name, str(error.source_path), "undefined_name"):
        assert part in str(error)
    assert len(KernelCache(tmp_path)) == 0


def test_the_source_of_a_failure_is_saved_without_a_cache_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DropoutMaskSpec, "source", lambda _: "error")
    monkeypatch.setattr(compile_module, "_scratch", lambda: tmp_path)
    with pytest.raises(CompileError) as caught:
        compile_kernel(MASK, KernelCache(tmp_path / "shipped", readonly=True))
    assert caught.value.source_path is not None
    assert caught.value.source_path.read_text() == "error"


def test_serialised_wgmma_is_a_failed_build(monkeypatch: pytest.MonkeyPatch):
    log = "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    monkeypatch.setattr(nvrtc, "_text", lambda *_: log)
    with pytest.raises(CompileError, match=r"serialised wgmma.*C7514"):
        nvrtc.compile_source("k", 'extern "C" __global__ void k() {}', "sm_80")


def test_nvrtc_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import cuda.pathfinder

    def missing(_: str) -> None:
        raise cuda.pathfinder.DynamicLibNotFoundError("nvrtc not found anywhere")

    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", missing)
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda _: None)
    caches = (nvrtc._load, nvrtc._bindings, nvrtc.nvrtc_digest, nvrtc.nvrtc_version)
    for memory in caches:
        memory.cache_clear()
    try:
        with pytest.raises(NvrtcMissingError, match=r"pip install 'cuda-toolkit\[nvrtc\]==13"):
            compile_kernel(MASK, KernelCache(tmp_path))
        with pytest.raises(NvrtcMissingError):
            nvrtc.compile_source("k", "", "sm_80")
    finally:
        for memory in caches:
            memory.cache_clear()


def test_half_an_nvrtc_is_named(monkeypatch: pytest.MonkeyPatch):
    real = nvrtc._bindings()

    class WithoutBuiltins:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def nvrtcCompileProgram(self, *_: object) -> tuple[Any]:  # noqa: N802 - NVRTC's name
            return (real.nvrtcResult.NVRTC_ERROR_BUILTIN_OPERATION_FAILURE,)

    monkeypatch.setattr(nvrtc, "_bindings", WithoutBuiltins)
    with pytest.raises(NvrtcMissingError, match=r"only in part.*pip install"):
        nvrtc.compile_source("k", "", "sm_80")
    text = b"a b"
    assert list(text[1:2]) == [32], "NVRTC ended an empty log in the blank that all of Python shares"


def test_the_report_adds_spills_and_takes_the_kernels_registers():
    assert nvrtc.parse_report(_SPILLING) == nvrtc.PtxasReport(registers=255, spill_bytes=56, static_shared_bytes=2048)
    assert nvrtc.parse_report("") == nvrtc.PtxasReport(0, 0, 0)


def test_spills_are_reported_by_a_real_compile():
    text = """extern "C" __global__ void __launch_bounds__(1024) k(float* p, int n) {
      float x[96];
      for (int i = 0; i < 96; i++) x[i] = p[i * 1024 + threadIdx.x];
      for (int r = 0; r < n; r++)
        _Pragma("unroll") for (int i = 0; i < 96; i++) x[i] = x[i] * x[(i + 7) % 96] + x[(i + 31) % 96];
      for (int i = 0; i < 96; i++) p[i * 1024 + threadIdx.x] = x[i];
    }"""
    made = nvrtc.compile_source("k", text, "sm_80")
    assert made.report.registers <= 64
    assert made.report.spill_bytes > 0


def test_the_environment_chooses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATOMR_FLASHATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ATOMR_FLASHATTN_SAVE_SOURCE", str(tmp_path / "sources"))
    monkeypatch.delenv("ATOMR_FLASHATTN_DISABLE_CACHE", raising=False)
    settings.cache_clear()
    try:
        compile_kernel(MASK)
        assert compile_kernel(MASK).cache_hit
        assert default_cache() is default_cache()
        assert [path.suffix for path in (tmp_path / "sources").iterdir()] == [".cu"]
        monkeypatch.setenv("ATOMR_FLASHATTN_DISABLE_CACHE", "1")
        settings.cache_clear()
        assert default_cache() is None
        assert not compile_kernel(MASK).cache_hit
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_many_kernels_in_parallel_keep_their_order_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = [replace(MASK, arch=arch) for arch in (SmArch.SM_80, SmArch.SM_90, SmArch.SM_120)]
    bad = replace(MASK, varlen=True)
    write = DropoutMaskSpec.source
    monkeypatch.setattr(DropoutMaskSpec, "source", lambda spec: "error" if spec == bad else write(spec))
    seen: list[KernelSpec] = []
    order = [specs[0], bad, specs[1], specs[2], specs[0]]
    results = compile_many(order, workers=2, progress=lambda spec, _: seen.append(spec), cache=KernelCache(tmp_path))
    assert [result.spec for result in results] == order
    assert [isinstance(result, CompileError) for result in results] == [False, True, False, False, False]
    assert sorted(seen, key=str) == sorted({*specs, bad}, key=str)
    assert compile_many([], cache=KernelCache(tmp_path)) == []


_PROCESSES = 8


def _meet(barrier: threading.Barrier) -> None:
    globals()["_barrier"] = barrier


def _compile_in_a_process(folder: str, log: str) -> bool:
    """Compile one kernel at the same moment as the others, noting each real compile with one appended line."""
    real = nvrtc.compile_source

    def noted(*args: Any) -> nvrtc.Compiled:
        with Path(log).open("a") as file:
            file.write("compiled\n")
        time.sleep(0.5)
        return real(*args)

    nvrtc.compile_source = noted
    globals()["_barrier"].wait(timeout=60)
    return compile_kernel(FORWARD, KernelCache(folder)).cache_hit


def test_eight_processes_that_want_one_kernel_compile_it_once(tmp_path: Path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    with context.Pool(_PROCESSES, initializer=_meet, initargs=(context.Barrier(_PROCESSES),)) as pool:
        hits = pool.starmap(_compile_in_a_process, [(str(tmp_path / "cache"), str(log))] * _PROCESSES, chunksize=1)
    assert log.read_text() == "compiled\n"
    assert sorted(hits) == [False] + [True] * (_PROCESSES - 1)


def test_a_hit_loads_neither_nvrtc_nor_cuda_core(tmp_path: Path):
    compile_kernel(MASK, KernelCache(tmp_path))
    program = (
        "import sys, json\n"
        "from atomr_accel_flashattn.jit.cache import KernelCache\n"
        "from atomr_accel_flashattn.jit.compile import compile_kernel\n"
        "from tests.jit.kernels import MASK\n"
        f"hit = compile_kernel(MASK, KernelCache({str(tmp_path)!r})).cache_hit\n"
        "print(json.dumps([hit, sorted(m for m in sys.modules if m.startswith(('cuda.', 'filelock')))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(done.stdout) == [True, []]
