"""Who may write what is loaded: owner and mode of a cache folder, of the way to it, and of each file in it.

A cubin runs with the rights of the process that loads it, and its digest lies beside it, so whoever can write the folder can put any code
there. Files are loaded when nobody but this user, root, and the administrator of a read-only cache can have written them:

- The folder and each file that is read belong to one of them, and neither group nor others may write them.
- Each folder above, and each symbolic link on the way, belongs to one of them, and nobody else may rename what is in it. A sticky folder
  such as ``/tmp`` is good enough, and so is one that only the private group of its owner may write (umask 002). Folders above the home of
  this user are the affair of whoever made that home.
- The administrator of a cache that ``ATOMR_FLASHATTN_CACHE_READONLY`` declares is the owner of its folder. Nothing of theirs may stand in
  a folder that everybody may write, not even a sticky one: there anybody could have made it.

The way is walked once a process and folder, in 0.1 ms; after that one ``stat`` tells whether it is still the same folder.
Systems without POSIX owners (Windows) are not checked: there a user's folders are private by default.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from ..errors import CacheWarning

__all__ = [
    "SET_ASIDE",
    "Trust",
    "UntrustedError",
    "check_folder",
    "examine_folder",
    "file_problem",
    "lock_folder",
    "make_folder",
    "read_trusted",
    "warn_folder",
    "warn_once",
    "write_file",
]

SET_ASIDE: Final = ".untrusted"  # suffix of tuned tiles from a folder that others could write; for people to look at, never read

_POSIX: Final = os.name == "posix"
_READ: Final = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_MOST_LINKS: Final = 40  # as the kernel has it
_BEING_EMPTIED: Final = 0o1700  # mode of a folder of ours from the moment others cannot write it until it is empty; others then help
_KERNEL_FILE: Final = r"[a-z0-9_]+-[0-9a-f]{16}\.(json|cubin|cu)|\.new-.*"  # compiled when they are needed, which is hardly ever
_TILES_FILE: Final = "tuned_tiles.json"
_HARMLESS: Final = rf"locks|\.nfs.*|.*{re.escape(SET_ASIDE)}|{re.escape(_TILES_FILE)}"
_NO_OWNERS: Final[frozenset[int]] = frozenset()


class UntrustedError(PermissionError):
    """A file or folder that somebody else can have written; ``strerror`` says why. It ends as a warning and a miss."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What is known of a folder.

    Attributes:
        problem: why nothing is loaded from it, and what to do; empty where files are.
        owners: whose files are loaded.
        narrow: the problem is the mode of a folder of our own, which :func:`check_folder` may change.
    """

    problem: str = ""
    owners: frozenset[int] = _NO_OWNERS
    narrow: bool = False


_known: dict[tuple[str, bool], tuple[tuple[int, int, int, int], Trust]] = {}
_said: set[str] = set()
_guard = threading.Lock()


def check_folder(folder: str, *, readonly: bool = False) -> Trust:
    """Whether files are loaded from ``folder``; one of our own that others can write is emptied and set to 0700, with a warning.

    Raises:
        OSError: it does not exist, or cannot be looked at.
    """
    identity = _identity(folder)
    known = _known.get((folder, readonly))
    if known is not None and known[0] == identity:
        return known[1]
    with _guard:
        trust = examine_folder(folder, readonly=readonly)
        narrowed = ""
        if trust.narrow:
            refused = _narrow(folder)
            narrowed = "" if refused else trust.problem
            trust = Trust(f"{trust.problem} and is left so: {refused}") if refused else examine_folder(folder)
        _known[folder, readonly] = (_identity(folder), trust)
    if narrowed:
        warn_once(
            f"narrowed {folder}",
            f"the cache folder {folder} is emptied and set to mode 0700 because {narrowed}: kernels are compiled once more, and "
            f"tuned tiles, where there were any, are kept in a file *{SET_ASIDE}",
        )
    return trust


def examine_folder(folder: str, *, readonly: bool = False) -> Trust:
    """What :func:`check_folder` finds, without its memory and without changing anything.

    Raises:
        OSError: it does not exist, or cannot be looked at.
    """
    if not _POSIX:
        return Trust()
    place, way = _way(folder)
    found = way[place]
    ours = frozenset((0, os.geteuid()))
    owners = ours | {found.st_uid} if readonly else ours
    if found.st_uid not in owners:
        return Trust(
            f"it belongs to user {found.st_uid}; name a folder of your own with ATOMR_FLASHATTN_CACHE_DIR, or set "
            "ATOMR_FLASHATTN_CACHE_READONLY=1 if this is the cache of an administrator whose code you run"
        )
    home = _home(way)
    for name, passed in way.items():
        if stat.S_ISDIR(passed.st_mode) and home.startswith(f"{name.rstrip('/')}/"):
            continue
        problem = _problem_on_the_way(passed, way[os.path.dirname(name)], owners, last=name == place)  # noqa: PTH120
        if problem:
            return Trust(f"{'it' if name == place else name} {problem}")
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISDIR(found.st_mode) and (mode & 0o022 or mode == _BEING_EMPTIED):
        narrow = found.st_uid == os.geteuid() and not readonly
        remedy = "" if narrow else "; its owner sets it with chmod go-w"
        what = "was writable by others and is not yet emptied" if mode == _BEING_EMPTIED else "is writable by others"
        return Trust(f"it {what} (mode {mode:04o}){remedy}", narrow=narrow)
    return Trust(owners=owners)


def file_problem(found: os.stat_result, owners: frozenset[int]) -> str:
    """Why a file is not loaded that has this ``lstat`` or ``fstat``; empty when it is."""
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link"
    if not _POSIX or stat.S_ISDIR(found.st_mode):
        return ""  # a folder cannot be read as a file: that has its own error
    if found.st_uid not in owners:
        return f"it belongs to user {found.st_uid}"
    if found.st_mode & 0o022:
        return f"it is writable by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return "" if stat.S_ISREG(found.st_mode) else "it is no regular file"


def read_trusted(path: str, trust: Trust) -> bytes:
    """Contents of a file in a folder that :func:`check_folder` found good. What is checked is the opened file.

    Raises:
        UntrustedError: somebody else can have written it.
        OSError: it cannot be read.
    """
    try:
        file = os.open(path, _READ)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UntrustedError(errno.EPERM, "it is a symbolic link", path) from error
        raise
    try:  # 5 us less than open() and its two layers
        found = os.fstat(file)
        problem = file_problem(found, trust.owners)
        if problem:
            raise UntrustedError(errno.EPERM, problem, path)
        parts = [os.read(file, found.st_size + 1)]
        while len(parts[-1]) not in {0, found.st_size}:  # rare: a file system that reads in pieces
            parts.append(os.read(file, found.st_size + 1))
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(file)


def make_folder(folder: Path, *, mode: int = 0o700) -> None:
    """Make a folder, and those above it that are missing, each with ``mode`` less the umask.

    Raises:
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(mode=mode, exist_ok=True)
    except FileNotFoundError:
        if folder.parent == folder:
            raise
        make_folder(folder.parent, mode=mode)
        folder.mkdir(mode=mode, exist_ok=True)


def lock_folder(folder: Path) -> Path:
    """The folder of the lock files in a cache folder that is good, made where it is missing.

    Raises:
        UntrustedError: somebody else can write it: locks are opened for writing, and a link in their place leads anywhere.
        OSError: it cannot be made.
    """
    locks = folder / "locks"
    make_folder(locks)
    if not _POSIX:
        return locks
    found = locks.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise UntrustedError(errno.EPERM, "others can write it; remove it", str(locks))
    return locks


def write_file(target: Path, data: bytes) -> None:
    """Write through a temporary file beside ``target``, so that no reader sees half a file. Its mode is 0644 less the umask.

    Raises:
        OSError: it cannot be written.
    """
    temporary = target.with_name(f".new-{os.getpid()}-{threading.get_ident()}-{target.name[-32:]}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o644, exist_ok=False)  # never through a link, and never writable by a group, as umask 002 would have it
        temporary.write_bytes(data)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def warn_folder(folder: str, problem: str) -> None:
    """Say, once a process, that nothing is loaded from a folder."""
    warn_once(
        f"folder {folder}",
        f"nothing is loaded from the cache folder {folder}: {problem}. Every process compiles for itself, and tuned tiles are not used; "
        "SECURITY.md says whose files are loaded",
    )


def warn_once(topic: str, text: str) -> None:
    """A :class:`CacheWarning`, once a process for each ``topic``."""
    with _guard:
        if topic in _said:
            return
        _said.add(topic)
    warnings.warn(text, CacheWarning, stacklevel=5)


def _identity(folder: str) -> tuple[int, int, int, int]:
    found = os.stat(folder)  # noqa: PTH116 - pathlib costs 5 us here
    return found.st_dev, found.st_ino, found.st_uid, found.st_mode


def _way(folder: str) -> tuple[str, dict[str, os.stat_result]]:
    """The path of ``folder`` without links, and the ``lstat`` of every folder and link on the way to it, from the root down."""
    here, links = "/", 0
    way = {here: os.lstat(here)}
    ahead = os.path.join(os.getcwd(), folder).split("/")[::-1]  # noqa: PTH109, PTH118
    while ahead:
        part = ahead.pop()
        if part in {"", "."}:
            continue
        if part == "..":
            here = os.path.dirname(here)  # noqa: PTH120
            continue
        name = os.path.join(here, part)  # noqa: PTH118
        way[name] = os.lstat(name)
        if not stat.S_ISLNK(way[name].st_mode):
            here = name
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), folder)
        target = os.readlink(name)  # noqa: PTH115
        here = "/" if target.startswith("/") else here
        ahead += target.split("/")[::-1]
    return here, way


def _home(way: dict[str, os.stat_result]) -> str:
    """The home of this user, where it is theirs and the way leads through it; else empty."""
    try:
        home = _identity(os.path.expanduser("~"))  # noqa: PTH111
    except OSError:
        return ""
    found = (name for name, passed in way.items() if (passed.st_dev, passed.st_ino) == home[:2] and passed.st_uid == os.geteuid())
    return next(found, "")


def _problem_on_the_way(passed: os.stat_result, above: os.stat_result, owners: frozenset[int], *, last: bool) -> str:
    """Why the owner of a folder or link, or whoever may write it, could put another folder in the place of the one that is asked for."""
    if passed.st_uid not in owners and not (stat.S_ISDIR(passed.st_mode) and passed.st_uid == _owner_outside()):
        return f"belongs to user {passed.st_uid}, who can put another folder in its place; name another with ATOMR_FLASHATTN_CACHE_DIR"
    if passed.st_uid in owners - {0, os.geteuid()} and _others_write(above):
        return f"belongs to user {passed.st_uid} and stands where everybody may make one; its administrator moves it"
    if not last and stat.S_ISDIR(passed.st_mode) and not passed.st_mode & stat.S_ISVTX and _others_write(passed):
        mode = stat.S_IMODE(passed.st_mode)
        return f"is writable by others (mode {mode:04o}); set it with chmod go-w, or name another with ATOMR_FLASHATTN_CACHE_DIR"
    return ""


def _others_write(found: os.stat_result) -> bool:
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_private_group(found.st_uid, found.st_gid)


def _is_private_group(user: int, group: int) -> bool:
    """Whether a group has the name of its user and no other member, as those have that distributions make for each user."""
    import grp
    import pwd

    try:
        name, entry = pwd.getpwuid(user).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}


@cache
def _owner_outside() -> int | None:
    """In a user namespace (rootless containers), the owner that files of users outside show, root among them; None where there is none."""
    try:
        ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
        outside = int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if any(first <= outside < first + count for first, _, count in ranges) else outside


def _narrow(folder: str) -> str:
    """Set a folder of ours to 0700 and take out what others could have put there; what prevents it, in words, when something does.

    Between the two modes it is recognisable as not yet empty, to other processes and to later ones if this one is killed.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208
        foreign = [name for name in names if not re.fullmatch(f"{_KERNEL_FILE}|{_HARMLESS}", name)]
        if foreign:
            return f"it holds other files ({min(foreign)}); name a folder for this cache alone with ATOMR_FLASHATTN_CACHE_DIR"
        before = stat.S_IMODE(os.stat(folder).st_mode)  # noqa: PTH116
        if not before & 0o022 and before != _BEING_EMPTIED:
            return ""  # another process was faster
        if before & stat.S_ISVTX and before != _BEING_EMPTIED:
            return "it is sticky, as folders are that many share; name a folder for this cache alone with ATOMR_FLASHATTN_CACHE_DIR"
        os.chmod(folder, _BEING_EMPTIED)  # noqa: PTH101
        if stat.S_IMODE(os.stat(folder).st_mode) != _BEING_EMPTIED:  # noqa: PTH116
            return "its file system keeps no modes; name another folder with ATOMR_FLASHATTN_CACHE_DIR"
        try:
            _empty(Path(folder))
        except BaseException:
            os.chmod(folder, before)  # noqa: PTH101
            raise
        os.chmod(folder, 0o700)  # noqa: PTH101
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _empty(folder: Path) -> None:
    for name in os.listdir(folder):  # noqa: PTH208 - again: files may have come until the mode was set
        path = folder / name
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if name == _TILES_FILE:
                path.replace(folder / (name + SET_ASIDE))
            elif name == "locks" and not path.is_symlink() and path.stat().st_uid == os.geteuid():
                path.chmod(0o700)
                for lock in path.iterdir():
                    lock.unlink(missing_ok=True)
            elif re.fullmatch(_KERNEL_FILE, name):
                path.unlink(missing_ok=True)
