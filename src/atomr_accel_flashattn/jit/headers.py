"""The CUDA headers that kernels include: package data in cuda/."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

__all__ = ["headers_digest", "headers_dir"]


def headers_dir() -> Path:
    """Folder of the CUDA headers that every kernel includes."""
    return Path(__file__).resolve().parent.parent / "cuda"


@cache
def headers_digest() -> bytes:
    """SHA-256 over the names and contents of all headers: part of every cache key."""
    digest = hashlib.sha256()
    folder = str(headers_dir())
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 - a glob of paths and buffered files take twice as long, half of a cache hit
        if name.endswith(".cuh"):
            with open(f"{folder}/{name}", "rb", buffering=0) as file:  # noqa: PTH123
                digest.update(name.encode() + b"\0" + file.read())
    return digest.digest()
