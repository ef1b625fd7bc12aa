"""Compiled kernels on disk: found again in a fraction of a millisecond, by any process, on any machine with the same toolchain.

An entry is three files with one stem, ``<kernel name>-<16 hex digits of its key>``:

- ``.cubin``: what NVRTC made, as it is, so that cuobjdump and nvdisasm read it in place
- ``.cu``: the source it was made from
- ``.json``: the whole key, the SHA-256 of the cubin, and what the compiler reported. It is written last, and a cubin whose digest it does
  not hold is not an entry: torn, truncated and half-written files are misses.

``cuda.core.utils`` has a file cache too. This one differs where it counts here: a hit loads neither cuda.core (0.15 s to import) nor NVRTC
(0.01-0.18 s to load) into a process that only wants to launch; no path of the building machine is part of a key and files can be
read by all, so a cache can be shipped; it verifies what it reads, and keeps registers and spills. What somebody else can have written is
not loaded (:mod:`.trust`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..env import settings
from ..errors import CacheError, CacheWarning
from . import trust
from .trust import Trust, UntrustedError

__all__ = ["CacheEntry", "CacheKey", "KernelCache", "Record", "default_cache"]

_SUFFIXES = (".json", ".cubin", ".cu")
_ENTRY = re.compile(r"[a-z0-9_]+-[0-9a-f]{16}")  # a stem of ours; other files in the folder are not touched
_LOCK_SECONDS = 120.0  # longest wait for another process that compiles the same kernel; then compile it here too
_LOCK_POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What a kernel is found by: its name for people, ``digest`` (64 hex digits over everything that decides its machine code) for us."""

    name: str
    digest: str

    @property
    def stem(self) -> str:
        """File name without suffix; names are cut where file systems end (255 bytes)."""
        return f"{self.name[:200]}-{self.digest[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is kept beside a cubin: what ptxas reported (:class:`~.nvrtc.PtxasReport`), and by which compiler it was made, when it ran."""

    name: str
    key: str
    arch: str
    nvrtc: str  # "major.minor" of the compiler
    registers: int
    spill_bytes: int
    static_shared_bytes: int
    compile_seconds: float
    log: str
    cubin_sha256: str = ""
    cubin_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A kernel read from disk."""

    record: Record
    cubin: bytes


class KernelCache:
    """One folder of compiled kernels, safe to share between threads and processes; between users, as SECURITY.md says.

    What fails while a kernel is looked up or kept is no error: the caller gets a miss, and a :class:`CacheWarning` once per folder and
    operation. A folder or file that somebody else can have written is such a miss. What fails when it was asked for (:meth:`list`,
    :meth:`verify`, :meth:`clear`) raises :class:`CacheError`; so does everything with ``strict``, for a cache that is being made to be
    shipped. Folders are made with mode 0700, and with 0755 where they are to be shipped.
    """

    def __init__(self, directory: str | os.PathLike[str], *, readonly: bool = False, strict: bool = False) -> None:
        self.directory = Path(directory)
        self.readonly = readonly
        self.strict = strict
        self._warned: set[str] = set()
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return sum(1 for _ in self._stems())

    def get(self, key: CacheKey) -> CacheEntry | None:
        """The entry of ``key``; None when there is none, or none that is whole."""
        base = os.path.join(self.directory, key.stem)  # noqa: PTH118 - pathlib costs 20 us here
        try:
            folder = self._trusted()
            if folder is None:
                return None
            text = trust.read_trusted(base + ".json", folder)
            cubin = trust.read_trusted(base + ".cubin", folder)
        except FileNotFoundError:
            return None
        except UntrustedError as error:
            self._leave_out(error)
            return None
        except OSError as error:
            self._warn("read", error)
            return None
        record = _parse(text)
        if record is None or record.key != key.digest or record.cubin_sha256 != hashlib.sha256(cubin).hexdigest():
            return None
        return CacheEntry(record, cubin)

    def put(self, key: CacheKey, record: Record, cubin: bytes, source: str) -> bool:
        """Keep a kernel. Returns whether it was kept; a folder that is read-only or full is warned about once."""
        if self.readonly:
            return False
        whole = {**asdict(record), "cubin_sha256": hashlib.sha256(cubin).hexdigest(), "cubin_bytes": len(cubin)}
        try:
            if not self._made():
                return False
            trust.write_file(self.directory / (key.stem + ".cu"), source.encode())
            trust.write_file(self.directory / (key.stem + ".cubin"), cubin)
            trust.write_file(self.directory / (key.stem + ".json"), json.dumps(whole, indent=1).encode())
        except OSError as error:
            self._warn("write", error)
            return False
        return True

    def save_source(self, key: CacheKey, source: str) -> Path | None:
        """Keep the text of a kernel that did not compile, for its error message; None when it cannot be kept."""
        path = self.directory / (key.stem + ".cu")
        try:
            if self.readonly or not self._made():
                return None
            trust.write_file(path, source.encode())
        except OSError:
            return None
        return path

    @contextlib.contextmanager
    def single_flight(self, key: CacheKey) -> Iterator[None]:
        """Hold back everybody else, in this and other processes, who wants to make ``key``; look again with :meth:`get` inside.

        A lock that cannot be had (read-only folder, a file system without locks, an owner that hangs) is not waited for: two may then
        compile the same kernel, and both results are right.
        """
        with self._guard:
            lock = self._locks.setdefault(key.digest, threading.Lock())
        with lock, self._file_lock(key):
            yield

    @contextlib.contextmanager
    def _file_lock(self, key: CacheKey) -> Iterator[None]:
        if self.readonly:
            yield
            return
        import filelock

        lock = None
        try:
            if self._made():
                path = trust.lock_folder(self.directory) / f"{key.digest[:16]}.lock"
                lock = filelock.FileLock(path, timeout=_LOCK_SECONDS, thread_local=False)
                lock.acquire(poll_interval=_LOCK_POLL_SECONDS)
        except (OSError, NotImplementedError):  # filelock.Timeout is an OSError
            yield
            return
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def list(self) -> tuple[Record, ...]:
        """The records of all whole-looking entries, by name. Cubins are not read: :meth:`verify` does that."""
        records = (_parse(self._read(stem + ".json")) for stem in self._stems())
        return tuple(sorted((record for record in records if record is not None), key=lambda record: (record.name, record.key)))

    def verify(self) -> tuple[int, tuple[str, ...]]:
        """Read every entry and remove what is not whole. Returns the number of good entries and the stems of the removed ones.

        Entries that :meth:`problems` names are neither: they are not loaded, and stay for people to look at.

        Raises:
            CacheError: the folder cannot be read, or a bad entry cannot be removed.
        """
        good, bad = 0, []
        folder = self._examined()
        stems = () if folder.problem else self._stems()
        for stem in stems:
            if any(self._problems_of(stem, folder)):
                continue
            record = _parse(self._read(stem + ".json"))
            if record is not None and record.cubin_sha256 == hashlib.sha256(self._read(stem + ".cubin")).hexdigest():
                good += 1
            else:
                bad.append(stem)
        for stem in bad:
            self._remove(stem)
        return good, tuple(bad)

    def problems(self) -> tuple[str, ...]:
        """What is not loaded because somebody else can have written it, with the reason: the whole folder, or entries in it.

        Raises:
            CacheError: the folder cannot be read.
        """
        folder = self._examined()
        if folder.problem:
            return (f"{self.directory}: {folder.problem}",)
        return tuple(problem for stem in self._stems() for problem in self._problems_of(stem, folder))

    def clear(self) -> int:
        """Remove every entry, saved source and lock. Returns the number of entries removed; files of others in the folder stay.

        Raises:
            CacheError: the folder cannot be read, or an entry cannot be removed.
        """
        stems = list(self._stems())
        for stem in stems:
            self._remove(stem)
        sources = (path for path in self.directory.glob("*.cu") if _ENTRY.fullmatch(path.stem))
        for leftover in (*sources, *self.directory.glob(".new-*"), *self.directory.glob("locks/*.lock")):
            with contextlib.suppress(OSError):
                leftover.unlink()
        return len(stems)

    def size(self) -> int:
        """Bytes on disk of all entries with their sources."""
        total = 0
        for stem in self._stems():
            for suffix in _SUFFIXES:
                with contextlib.suppress(FileNotFoundError):
                    total += (self.directory / (stem + suffix)).stat().st_size
        return total

    def _stems(self) -> Iterator[str]:
        try:
            names = sorted(os.listdir(self.directory))  # noqa: PTH208
        except FileNotFoundError:
            return
        except OSError as error:
            raise CacheError(f"cannot read the kernel cache {self.directory}: {error.strerror or error}") from error
        seen = {name.rpartition(".")[0] for name in names if name.endswith((".json", ".cubin"))}
        yield from sorted(stem for stem in seen if _ENTRY.fullmatch(stem))

    def _read(self, name: str) -> bytes:
        """Contents of a file; empty when it is gone."""
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise CacheError(f"cannot read {self.directory / name}: {error.strerror or error}") from error

    def _remove(self, stem: str) -> None:
        for suffix in _SUFFIXES:
            try:
                (self.directory / (stem + suffix)).unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(f"cannot remove {self.directory / (stem + suffix)}: {error.strerror or error}") from error

    def _made(self) -> bool:
        """Whether the folder may be written, which is made where it is missing.

        Raises:
            OSError: it cannot be made.
            CacheError: with ``strict``, a folder that others can write.
        """
        trust.make_folder(self.directory, mode=0o755 if self.strict else 0o700)
        return self._trusted() is not None

    def _trusted(self) -> Trust | None:
        """Whose files are loaded from the folder; None, with a warning, when nothing is.

        Raises:
            OSError: it cannot be looked at.
            CacheError: with ``strict``, instead of the warning.
        """
        folder = trust.check_folder(os.fspath(self.directory), readonly=self.readonly)
        if not folder.problem:
            return folder
        if self.strict:
            raise CacheError(f"cannot use the kernel cache {self.directory}: {folder.problem}")
        trust.warn_folder(str(self.directory), folder.problem)
        return None

    def _leave_out(self, error: UntrustedError) -> None:
        trust.warn_once(
            f"entry {self.directory}",
            f"{error.filename} is not loaded: {error.strerror}; it is compiled again. atomr-flashattn cache verify names all such files",
        )

    def _examined(self) -> Trust:
        try:
            return trust.examine_folder(os.fspath(self.directory), readonly=self.readonly)
        except FileNotFoundError:
            return Trust()
        except OSError as error:
            raise CacheError(f"cannot read the kernel cache {self.directory}: {error.strerror or error}") from error

    def _problems_of(self, stem: str, folder: Trust) -> Iterator[str]:
        for suffix in (".json", ".cubin"):
            with contextlib.suppress(FileNotFoundError):
                problem = trust.file_problem((self.directory / (stem + suffix)).lstat(), folder.owners)
                if problem:
                    yield f"{stem}{suffix}: {problem}"

    def _warn(self, operation: str, error: OSError) -> None:
        if self.strict:
            raise CacheError(f"cannot {operation} the kernel cache {self.directory}: {error.strerror or error}") from error
        with self._guard:
            if operation in self._warned:
                return
            self._warned.add(operation)
        warnings.warn(
            f"cannot {operation} the kernel cache {self.directory} ({error.strerror or error}); every process then compiles for itself. "
            "Set ATOMR_FLASHATTN_CACHE_DIR to a folder that can be written, or ATOMR_FLASHATTN_DISABLE_CACHE=1 to silence this",
            CacheWarning,
            stacklevel=4,
        )


def _parse(text: bytes) -> Record | None:
    """The record in a ``.json`` file; None when it is not one, a field of another type included."""
    try:
        data = json.loads(text)
        values: dict[str, Any] = {field.name: data[field.name] for field in fields(Record)}
    except (ValueError, TypeError, KeyError):
        return None
    if any(type(values[field.name]).__name__ != field.type for field in fields(Record)):
        return None
    return Record(**values)


@cache
def _opened(directory: Path, readonly: bool) -> KernelCache:  # noqa: FBT001 - a cache key
    return KernelCache(directory, readonly=readonly)


def default_cache() -> KernelCache | None:
    """The cache that the environment names; None when it is switched off or the user has no folder for it."""
    current = settings()
    if current.cache_disabled or current.cache_dir is None:
        return None
    return _opened(current.cache_dir, current.cache_readonly)
