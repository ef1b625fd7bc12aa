"""The CUDA headers that a source includes, directly or through others, and one digest over them: what a kernel's cache entry depends on.

A new header, or a change of one that a kernel does not include, so leaves its cubin and its tuned tile as they are.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Final

from ..errors import CompileError

__all__ = ["closure_digest", "headers_dir", "include_closure"]

_FOLDER: Final = Path(__file__).resolve().parent.parent / "cuda"
_INCLUDE = re.compile(rb'\n#include "([^"\n]+)"')  # a literal prefix is searched ten times as fast as any blanks (a test: no other form)


def headers_dir() -> Path:
    """Folder of the CUDA headers; their includes are written relative to it."""
    return _FOLDER


def include_closure(text: str) -> tuple[str, ...]:
    """Paths, relative to :func:`headers_dir`, of all headers that ``text`` includes, each once and sorted.

    Every line that begins with ``#include "`` counts, also one that the preprocessor would skip.

    Raises:
        CompileError: a header is missing; names it and who includes it.
    """
    return _closure(_includes(text.encode()), str(headers_dir()))[0]


def closure_digest(text: str) -> bytes:
    """SHA-256 over the names and contents of those headers. Read once per process and set of includes.

    Raises:
        CompileError: a header is missing; names it and who includes it.
    """
    return _closure(_includes(text.encode()), str(headers_dir()))[1]


def _includes(text: bytes) -> tuple[str, ...]:
    return tuple(sorted({name.decode() for name in _INCLUDE.findall(b"\n" + text)}))


@cache
def _closure(roots: tuple[str, ...], folder: str) -> tuple[tuple[str, ...], bytes]:
    contents: dict[str, bytes] = {}
    waiting = [(name, "the source of the kernel") for name in roots]
    while waiting:
        name, includer = waiting.pop()
        if name not in contents:
            contents[name] = text = _read(folder, name, includer)
            waiting += [(each, name) for each in _includes(text)]
    names = tuple(sorted(contents))
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + len(contents[name]).to_bytes(8, "little") + contents[name])
    return names, digest.digest()


def _read(folder: str, name: str, includer: str) -> bytes:
    try:
        with open(f"{folder}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - pathlib and a buffer take twice as long
            return file.read()
    except OSError as error:
        raise CompileError(
            f'#include "{name}" in {includer}: cannot read it in {folder} ({error.strerror or error}); reinstall the package'
        ) from error
