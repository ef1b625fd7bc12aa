"""KernelSpec -> cubin: from the disk cache when it is there, from NVRTC when it is not, once whoever else wants it at the same time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..env import settings
from ..errors import CompileError
from ..kernels.spec import KernelSpec
from . import headers, nvrtc
from .cache import CacheKey, KernelCache, Record, default_cache

__all__ = ["CompiledKernel", "cache_key", "compile_kernel", "compile_many"]

_KEY_SCHEMA = b"1"  # raise it when the meaning of an entry changes


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """A kernel's machine code and what ptxas said of it, the same whether it was compiled now or found on disk.

    Attributes:
        spec: what it computes.
        cubin: ELF image for ``spec.arch``.
        registers: per thread.
        spill_bytes: stored plus loaded, per thread.
        shared_bytes: static plus dynamic shared memory, per block.
        seconds: what this call took.
        compile_seconds: what NVRTC took, when it ran.
        cache_hit: whether the cubin came from disk.
        log: NVRTC's log.
    """

    spec: KernelSpec
    cubin: bytes = field(repr=False)
    registers: int
    spill_bytes: int
    shared_bytes: int
    seconds: float
    compile_seconds: float
    cache_hit: bool
    log: str = field(repr=False)


def compile_kernel(spec: KernelSpec, cache: KernelCache | None = None, *, recompile: bool = False) -> CompiledKernel:
    """The machine code of ``spec``, from ``cache`` (default: the one that the environment names) or from NVRTC.

    A hit takes 1 ms in a fresh process, 0.1 ms later, and does not load NVRTC; a compile half a second. ``recompile`` takes the place of
    an entry that turned out to be of no use.

    Raises:
        NvrtcMissingError: NVRTC is not installed.
        CompileError: NVRTC refused the source; the message holds its log and the path of the saved ``.cu``.
    """
    started = time.perf_counter()
    cache = default_cache() if cache is None else cache
    text = spec.source()
    key = cache_key(spec, text)
    if cache is None:
        record, cubin = _compile(spec, key, text, None)
        return _result(spec, record, cubin, started=started, hit=False)
    entry = None if recompile else cache.get(key)
    if entry is None:
        with cache.single_flight(key):
            entry = None if recompile else cache.get(key)
            if entry is None:
                record, cubin = _compile(spec, key, text, cache)
                cache.put(key, record, cubin, text)
                return _result(spec, record, cubin, started=started, hit=False)
    return _result(spec, entry.record, entry.cubin, started=started, hit=True)


def compile_many(
    specs: Iterable[KernelSpec],
    workers: int | None = None,
    progress: Callable[[KernelSpec, CompiledKernel | CompileError], None] | None = None,
    cache: KernelCache | None = None,
) -> list[CompiledKernel | CompileError]:
    """Compile ``specs`` in parallel; the result of each, a kernel or its error, in their order.

    Threads are enough: NVRTC runs without the interpreter lock and scales with the cores. One kernel that does not compile does not stop
    the others; anything else (NVRTC missing, Ctrl-C) ends the whole.

    Args:
        specs: what to compile; equal ones are compiled once.
        workers: threads, at least 1; default: the cores that this process may use.
        progress: called in the caller's thread after each kernel, in the order in which they finish.
        cache: as in :func:`compile_kernel`.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed  # 10 ms of import that a call does not need

    order = list(specs)
    unique = list(dict.fromkeys(order))
    outcomes: dict[KernelSpec, CompiledKernel | CompileError] = {}
    pool = ThreadPoolExecutor(max(1, min(len(unique), _cores() if workers is None else workers)), thread_name_prefix="nvrtc")
    try:
        futures = {pool.submit(compile_kernel, spec, cache): spec for spec in unique}
        for future in as_completed(futures):
            spec = futures[future]
            try:
                outcomes[spec] = future.result()
            except CompileError as error:
                outcomes[spec] = error
            if progress is not None:
                progress(spec, outcomes[spec])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [outcomes[spec] for spec in order]


def cache_key(spec: KernelSpec, text: str) -> CacheKey:
    """Key of ``spec`` whose source is ``text``: digest of source, headers, options and NVRTC build. No path of this machine is in it.

    Raises:
        CompileError: a header is missing.
        NvrtcMissingError: NVRTC is not installed.
    """
    digest = hashlib.sha256()
    included = headers.closure_digest(text)
    options = map(str.encode, nvrtc.compile_options(spec.arch.value))
    for part in (_KEY_SCHEMA, nvrtc.nvrtc_digest().encode(), included, *options, text.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return CacheKey(spec.kernel_name, digest.hexdigest())


def _compile(spec: KernelSpec, key: CacheKey, text: str, cache: KernelCache | None) -> tuple[Record, bytes]:
    folder = settings().save_source
    if folder is not None:
        _save(folder, key, text)
    try:
        made = nvrtc.compile_source(spec.kernel_name, text, spec.arch.value, [headers.headers_dir()])
    except CompileError as error:
        saved = (cache.save_source(key, text) if cache is not None else None) or _save(_scratch(), key, text)
        raise CompileError(error.args[0].splitlines()[0], spec=spec, log=error.log, source_path=saved) from error
    record = Record(
        name=spec.kernel_name,
        key=key.digest,
        arch=spec.arch.value,
        nvrtc=nvrtc.nvrtc_version(),
        registers=made.report.registers,
        spill_bytes=made.report.spill_bytes,
        static_shared_bytes=made.report.static_shared_bytes,
        compile_seconds=made.seconds,
        log=made.log,
    )
    return record, made.cubin


def _result(spec: KernelSpec, record: Record, cubin: bytes, *, started: float, hit: bool) -> CompiledKernel:
    return CompiledKernel(
        spec=spec,
        cubin=cubin,
        registers=record.registers,
        spill_bytes=record.spill_bytes,
        shared_bytes=record.static_shared_bytes + spec.shared_memory,
        seconds=time.perf_counter() - started,
        compile_seconds=record.compile_seconds,
        cache_hit=hit,
        log=record.log,
    )


def _save(folder: Path, key: CacheKey, text: str) -> Path | None:
    """Write a source for people to read; None when the folder does not take it."""
    path = folder / f"{key.stem}.cu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return path


@cache
def _scratch() -> Path:
    """A private temporary folder of this process, for sources that failed and have no cache to lie in."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix="atomr-flashattn-"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
