"""libcuda.c, built where there is a C compiler: processes that have its folder in LD_LIBRARY_PATH take it for the driver."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["SOURCE", "Map", "build", "value"]

SOURCE = Path(__file__).with_name("libcuda.c")


def build(folder: Path) -> Path | None:
    """A folder with libcuda.so.1; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder / "libcuda.so.1", SOURCE, "-ldl"], check=True)
    return folder


def value(name: str, kind: Any = ctypes.c_int) -> Any:
    """The global ``fake_<name>`` of the library that this process has, to be read and set by its ``.value``."""
    return kind.in_dll(_library(), f"fake_{name}")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class Map(ctypes.Structure):
    """What the library makes of a tensor map."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("strides", ctypes.c_uint64 * 4),
        *((name, ctypes.c_uint * 5) for name in ("sizes", "box", "steps")),
        *((name, ctypes.c_uint) for name in ("type", "rank", "interleave", "swizzle", "promotion", "fill")),
    )
