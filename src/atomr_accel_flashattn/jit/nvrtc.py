"""NVRTC: find it, call it, read what it says. CUDA C++ text goes in, a cubin and ptxas' report come out. No GPU and no driver is needed.

``cuda.bindings`` is called directly. ``cuda.core.Program`` adds nothing to a compile without name expressions, 0.15 s to the first
import, and two traps: its options hold a switch that slows down every later compile of the process (``ofast_compile``), and without a
driver its result hangs when it is printed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CompileError, NvrtcMissingError

__all__ = ["Compiled", "PtxasReport", "compile_options", "compile_source", "nvrtc_digest", "nvrtc_version", "parse_report"]

_SAMPLE_BYTES = 4096
_INSTALL = "Install it: pip install 'cuda-toolkit[nvrtc]==13.*'"
# C7510..C7519: ptxas could not overlap wgmma and serialised it; the kernel is right and several times slower.
_SERIALISED = re.compile(r"\(?\bC75\d\d\b\)?.*")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class PtxasReport:
    """What ``ptxas -v`` says of the one kernel in a cubin.

    ``registers`` per thread; ``spill_bytes`` stored plus loaded, per thread, over the kernel and every function it does not inline;
    ``static_shared_bytes`` per block, without the dynamic part that a launch asks for.
    """

    registers: int
    spill_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A finished compile: the cubin, the report, the whole log, and wall-clock seconds."""

    cubin: bytes
    report: PtxasReport
    log: str
    seconds: float


def compile_options(arch: str) -> tuple[str, ...]:
    """NVRTC options, without include paths: those are where headers lie on this machine, the options are what is made of them.

    ``-default-device``: NVRTC 13.0 takes generic lambdas as host functions otherwise. ``-no-cache``: we have our own.
    """
    return ("-std=c++20", f"-arch={arch}", "-default-device", "-no-cache", "--ptxas-options=-v")


def compile_source(name: str, source: str, arch: str, include_dirs: Sequence[Path] = ()) -> Compiled:
    """Compile ``source`` for ``arch`` (``"sm_80"``) to a cubin. Thread-safe; the interpreter lock is free meanwhile.

    Measured on 2 cores: 6 compiles of 0.43 s take 2.6 s in one thread and 1.4 s in two, so threads are all that a parallel build needs.

    Raises:
        NvrtcMissingError: the library, or the builtins library that belongs to it, is not installed.
        CompileError: NVRTC refused the text, or ptxas serialised wgmma.
    """
    nvrtc = _bindings()
    started = time.perf_counter()
    program = _call(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        options = [option.encode() for option in (*compile_options(arch), *(f"-I{path}" for path in include_dirs))]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(nvrtc, program)
        if status == nvrtc.nvrtcResult.NVRTC_ERROR_BUILTIN_OPERATION_FAILURE:
            raise NvrtcMissingError(f"NVRTC at {_load()} is there only in part: {log}. {_INSTALL}")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC {nvrtc_version()} failed with {status.name} for {arch}", spec=name, log=log)
        serialised = _SERIALISED.search(log)
        if serialised:
            raise CompileError(f"ptxas serialised wgmma, which costs most of the speed: {serialised.group()}", spec=name, log=log)
        cubin = b" " * _call(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        _call(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, parse_report(log), log, time.perf_counter() - started)


def parse_report(log: str) -> PtxasReport:
    """Registers, spills and static shared memory from the log of ``ptxas -v``; zeros for what it does not name."""
    registers = max((int(number) for number in _REGISTERS.findall(log)), default=0)
    spills = sum(int(stores) + int(loads) for stores, loads in _SPILLS.findall(log))
    shared = max((int(number) for number in _SHARED.findall(log)), default=0)
    return PtxasReport(registers, spills, shared)


@cache
def nvrtc_version() -> str:
    """``"major.minor"``. Loads the library.

    Raises:
        NvrtcMissingError: it is not installed.
    """
    nvrtc = _bindings()
    major, minor = _call(nvrtc, nvrtc.nvrtcVersion())
    return f"{major}.{minor}"


@cache
def nvrtc_digest() -> str:
    """Identity of the NVRTC build, patch level included, without loading it: size, first and last 4 KiB of the library file.

    NVRTC tells only major.minor of itself. The first page holds the size of every segment, the last the build id or the section table.

    Raises:
        NvrtcMissingError: it is not installed.
    """
    path = _library_path()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8, "little"))
        for position in (0, max(0, size - _SAMPLE_BYTES)):
            file.seek(position)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _library_path() -> Path:
    """Where NVRTC lies. NVIDIA's wheels are looked into first, as the loader does; only elsewhere is it loaded to be found."""
    if sys.platform == "linux":
        spec = importlib.util.find_spec("nvidia")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / "cu13" / "lib" / "libnvrtc.so.13"
            if path.is_file():
                return path
    return Path(_load())


@cache
def _load() -> str:
    """Load NVRTC and return its path."""
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        loaded = load_nvidia_dynamic_lib("nvrtc")
    except (DynamicLibNotFoundError, OSError) as error:
        raise NvrtcMissingError(
            f"NVRTC, which compiles the kernels, was not found or does not load ({str(error).splitlines()[0]}). {_INSTALL}"
        ) from error
    return str(loaded.abs_path)


@cache
def _bindings() -> Any:
    """``cuda.bindings.nvrtc`` with its library loaded."""
    _load()
    from cuda.bindings import nvrtc

    return nvrtc


def _call(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    """Unpack ``(status, value...)``; a call that is no compile fails only on misuse or without memory."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC failed with {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _text(nvrtc: Any, program: Any) -> str:
    # One more than it takes: an empty log takes one byte, and all of Python shares the objects of one.
    log: bytes = b" " * (_call(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)) + 1)
    _call(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0 ").decode(errors="replace")
