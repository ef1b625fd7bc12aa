"""Compiles a kernel's own source for the CPU, on top of emulator.h, and runs it on NumPy memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from atomr_accel_flashattn.jit.headers import headers_dir

if TYPE_CHECKING:
    from atomr_accel_flashattn.kernels.spec import KernelSpec

__all__ = ["compiler", "load", "run"]

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "build" / "emulator"
LEAVES = sorted(f"ptx/{path.name}" for path in (HERE / "ptx").glob("*.cuh"))  # what takes the place of the GPU
RUNTIME = "emulator.h"  # which they, and kernels, are compiled on top of
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas")

_ENTRY = """
int run_blocks(void (*kernel)(const void*), const void* p, unsigned grid, unsigned threads, unsigned seed, char* message, size_t size)"""
# Compiled once for all kernels: four tenths of a second that each would take.
_SCHEDULER = f"""#include "emulator.h"
{_ENTRY} {{
  return emulator::launch(grid, threads, seed, message, size, [=] {{ kernel(p); }});
}}
"""
_RUN = (
    _ENTRY
    + """;
extern "C" int run(const void* p, unsigned grid, unsigned threads, unsigned seed, char* message, size_t size) {{
  return run_blocks([](const void* p) {{ {name}(*static_cast<const {params}*>(p)); }}, p, grid, threads, seed, message, size);
}}
"""
)


def compiler() -> str | None:
    """A C++20 compiler, or None where there is none (the emulator tests are skipped there)."""
    return shutil.which(os.environ.get("CXX", "g++"))


def run(spec: KernelSpec, params: ctypes.Structure, grid: int, *, seed: int = 0) -> None:
    """Runs all blocks of the grid. The seed draws the order of threads; an odd one makes copies land as late as they may."""
    message = ctypes.create_string_buffer(2048)
    if _library(spec).run(ctypes.byref(params), grid, spec.threads, seed, message, len(message)):
        raise RuntimeError(f"{spec.kernel_name}: {message.value.decode()}")


@cache
def _library(spec: KernelSpec) -> ctypes.CDLL:
    """Shared library of one kernel, compiled once per source."""
    return load(spec.body() + _RUN.format(params=_params(spec), name=spec.kernel_name))


@cache
def load(source: str) -> ctypes.CDLL:
    """Shared library of what may include the project's headers."""
    text = '#include "emulator.h"\n' + source
    headers, runtime = _headers(), _runtime()
    stem = headers / hashlib.sha256(text.encode()).hexdigest()[:24]
    library = stem.with_suffix(".so")
    if not library.exists():
        cpp, partial = stem.with_suffix(".cpp"), stem.with_suffix(f".{os.getpid()}")
        cpp.write_text(text)
        _compile("-I", str(runtime), "-I", str(headers), "-shared", "-o", str(partial), str(runtime / "scheduler.o"), str(cpp))
        partial.replace(library)
    return ctypes.CDLL(str(library))


def _params(spec: KernelSpec) -> str:
    """The type of the kernel's one parameter, which its entry names."""
    found = re.search(r"const __grid_constant__ (fa::\w+) p\)", spec.body())
    assert found is not None
    return found[1]


@cache
def _headers() -> Path:
    """A folder with the project's headers, the emulator's in the place of the GPU's."""
    folder = _folder(_contents(headers_dir()) + _contents(HERE))
    with FileLock(folder / "lock"):
        if not (folder / "complete").exists():
            shutil.copytree(headers_dir(), folder, dirs_exist_ok=True)
            for name in LEAVES:
                shutil.copy(HERE / name, folder / name)
            (folder / "complete").touch()
    return folder


def _contents(folder: Path) -> bytes:
    """Names and contents of all headers in ``folder``."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in {".cuh", ".h"})
    return b"".join(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() for path in paths)


@cache
def _runtime() -> Path:
    """A folder with emulator.h precompiled, and the object that runs the threads."""
    folder = _folder((HERE / RUNTIME).read_bytes() + _SCHEDULER.encode())
    with FileLock(folder / "lock"):
        if not (folder / "scheduler.o").exists():
            header, scheduler = folder / RUNTIME, folder / "scheduler.cpp"
            shutil.copy(HERE / RUNTIME, header)
            _compile("-x", "c++-header", "-o", f"{header}.gch", str(header))
            scheduler.write_text(_SCHEDULER)
            _compile("-c", "-o", f"{folder}/scheduler.o", str(scheduler))
    return folder


def _folder(content: bytes) -> Path:
    folder = FOLDER / hashlib.sha256(content + str(_FLAGS).encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compile(*arguments: str) -> None:
    done = subprocess.run([str(compiler()), *_FLAGS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulator could not compile {arguments[-1]}:\n{done.stderr[:4000]}")
