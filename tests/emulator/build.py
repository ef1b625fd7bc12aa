"""Compiles a kernel's own source for the CPU, on top of emulator.h, and runs it on NumPy memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from atomr_accel_flashattn.jit.source import headers_digest, headers_dir, kernel_source

if TYPE_CHECKING:
    from atomr_accel_flashattn.jit.spec import KernelSpec

HERE = Path(__file__).resolve().parent
_FLAGS = ["-std=c++20", "-O2", "-shared", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]

_RUN = """
extern "C" int run(const fa::{params}* p, unsigned grid, unsigned threads, unsigned seed, char* message, size_t size) {{
  return emulator::launch(grid, threads, seed, message, size, [=] {{ {name}(*p); }});
}}
"""


def compiler() -> str | None:
    """A C++20 compiler, or None where there is none (the emulator tests are skipped there)."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def build(spec: KernelSpec, folder: Path) -> ctypes.CDLL:
    """Shared library of one kernel, compiled once per source."""
    params = "DropoutMaskParams" if spec.direction.name == "DROPOUT_MASK" else "FwdParams"
    text = '#include "emulator.h"\n' + kernel_source(spec) + _RUN.format(params=params, name=spec.kernel_name)
    own = b"".join((HERE / name).read_bytes() for name in ("emulator.h", "ptx.cuh"))
    digest = hashlib.sha256(text.encode() + headers_digest() + own).hexdigest()[:24]
    library = folder / f"{digest}.so"
    if not library.exists():
        headers = folder / f"{digest}.headers"
        shutil.copytree(headers_dir(), headers, dirs_exist_ok=True)
        for name in ("emulator.h", "ptx.cuh"):
            shutil.copy(HERE / name, headers / name)
        source = folder / f"{digest}.cpp"
        source.write_text(text)
        partial = folder / f"{digest}.{os.getpid()}.so"
        command = [str(compiler()), *_FLAGS, "-I", str(headers), "-o", str(partial), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            msg = f"the emulator could not compile {spec.kernel_name}:\n{done.stderr[:4000]}"
            raise RuntimeError(msg)
        partial.replace(library)
    return ctypes.CDLL(str(library))


def run(spec: KernelSpec, params: ctypes.Structure, grid: int, folder: Path, *, seed: int = 0) -> None:
    """Runs all blocks of the grid; an odd seed makes cp.async land as late as it may."""
    threads = 128 if spec.direction.name == "DROPOUT_MASK" else spec.tile.threads
    message = ctypes.create_string_buffer(256)
    if build(spec, folder).run(ctypes.byref(params), grid, threads, seed, message, len(message)):
        raise RuntimeError(f"{spec.kernel_name}: {message.value.decode()}")
