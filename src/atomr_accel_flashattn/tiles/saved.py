"""Tiles that were measured on this machine: a small JSON file beside the kernels in the cache folder, which ``lookup`` consults.

An entry belongs to one kernel in all but its tile, on one kind of device, compiled from one state of the headers that it includes. It is
found by what is asked, never by the data. The file is read once per process; a folder without one costs an attempt to open it. What is
wrong with the file, or with one entry, is a :class:`CacheWarning` during a call, and an error only while tiles are being saved. A file
that somebody else can have written is not read (:mod:`..jit.trust`).
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from ..env import settings
from ..errors import CacheError, CacheWarning, CompileError
from ..jit import trust
from ..jit.headers import closure_digest
from ..kernels.attention import AttentionSpec
from ..kernels.spec import Tile
from ..launch.driver import device_count, device_properties
from .space import misfit

__all__ = [
    "SAVED_TILES",
    "SavedTile",
    "device_identity",
    "forget_saved_tiles",
    "headers_identity",
    "kernel_without_tile",
    "read_saved_tiles",
    "remove_saved_tiles",
    "save_tiles",
    "saved_tile",
    "saved_tiles_problem",
]

SAVED_TILES: Final = "tuned_tiles.json"
_FORMAT: Final = 1  # raise it when the meaning of the file changes
_LOCK_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTile:
    """One entry.

    Attributes:
        device: name of the GPU, as the driver says it.
        compute_capability: of it, as ``"9.0"``.
        headers: first 16 hex digits of the digest of the CUDA headers that the kernel includes.
        kernel: name of the kernel without its tile.
        tile: the winner.
        shapes: what it was measured on.
        speedup: geometric mean over the shapes, over the tile that was in use before.
        when: UTC, ISO 8601.
    """

    device: str
    compute_capability: str
    headers: str
    kernel: str
    tile: Tile
    shapes: tuple[str, ...]
    speedup: float
    when: str

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What a file has one entry of."""
        return (self.device, self.compute_capability, self.headers, self.kernel)

    @property
    def current(self) -> bool:
        """Whether it was measured with the headers of this installation; others are kept and not used."""
        return bool(self.headers) and self.headers == headers_identity(self.kernel)


def headers_identity(kernel: str) -> str:
    """The state of the headers that a kernel includes, as entries write it; empty for a name that no kernel has.

    Args:
        kernel: its canonical name, with or without the tile.
    """
    header = kernel.partition("_sm")[0]  # names of kernels are that of their header, the architecture, and more
    try:
        return closure_digest(f'#include "kernels/{header}.cuh"\n').hex()[:16]
    except CompileError:
        return ""


def device_identity(index: int) -> tuple[str, str]:
    """(name, compute capability) of GPU ``index``, as entries write them."""
    found = device_properties(index)
    return found.name, "{}.{}".format(*found.compute_capability)


def kernel_without_tile(spec: AttentionSpec, *, short_q: bool = False, cache_rows: int = 0) -> str:
    """The canonical name of a kernel but for its tile: equal for the kernels that a search compares.

    Args:
        spec: the kernel.
        short_q: whether it has short q (``Extras.short_q``).
        cache_rows: the rows that its tile is chosen for (``Extras.cache_rows``, 64 for ``Extras.few_rows``); else 0.
    """
    told = [*(["shortq"] if short_q else []), *([f"rows{cache_rows}"] if cache_rows else [])]
    return "_".join(part for part in (*spec.kernel_name.split("_"), *told) if part != str(spec.tile))


def saved_tile(spec: AttentionSpec, *, short_q: bool = False, cache_rows: int = 0) -> Tile | None:
    """The tile that was saved for this kernel on the first visible GPU that has one; None where none was, or none that fits any more.

    Arguments: :func:`kernel_without_tile`.
    """
    here = settings()
    if here.tuned_tiles_disabled or here.cache_disabled or here.cache_dir is None:
        return None
    name = kernel_without_tile(spec, short_q=short_q, cache_rows=cache_rows)
    kept = _tiles_by_kernel(here.cache_dir).get(name)
    if not kept:
        return None
    tile = next((kept[device] for device in map(device_identity, range(device_count())) if device in kept), None)
    if tile is None:
        return None
    reason = misfit(replace(spec, tile=tile))
    if reason:
        _warn(f"the tile {tile} that was saved for {name} is ignored: {reason}; run atomr-flashattn tune again")
        return None
    return tile


def read_saved_tiles(folder: Path) -> tuple[SavedTile, ...]:
    """All entries of the file in ``folder``, current or not; empty, with a warning, when it is damaged, of another format, or others'."""
    path = os.path.join(folder, SAVED_TILES)  # noqa: PTH118 - pathlib costs 20 us here
    try:
        os.lstat(path)
        found = trust.examine_folder(str(folder), readonly=settings().cache_readonly)
        if found.problem:
            trust.warn_folder(str(folder), found.problem)
            return ()
        document = json.loads(trust.read_trusted(path, found))
    except FileNotFoundError:
        return ()
    except trust.UntrustedError as error:
        trust.warn_once(
            f"tiles {path}", f"{path} is not read: {error.strerror}. The tiles that come with the package are used; see SECURITY.md"
        )
        return ()
    except (OSError, ValueError) as error:
        _warn(f"cannot read {path} ({error}); the tiles that come with the package are used. Remove it, or run atomr-flashattn tune")
        return ()
    if not isinstance(document, dict) or document.get("format") != _FORMAT or not isinstance(document.get("tiles"), list):
        _warn(f"{path} is no file of saved tiles of format {_FORMAT}; the tiles that come with the package are used. Remove it")
        return ()
    entries = [_parse(entry) for entry in document["tiles"]]
    if None in entries:
        counted = f"{entries.count(None)} of {len(entries)} entries"
        _warn(f"{path}: {counted} are damaged, or of another version, and ignored; run atomr-flashattn tune again")
    return tuple(entry for entry in entries if entry is not None)


def saved_tiles_problem(folder: Path) -> str:
    """Name and reason of the file in a good ``folder`` that is not read, for somebody else can have written it; else empty."""
    with contextlib.suppress(FileNotFoundError):
        known = trust.examine_folder(str(folder), readonly=settings().cache_readonly)
        problem = "" if known.problem else trust.file_problem((folder / SAVED_TILES).lstat(), known.owners)
        return f"{SAVED_TILES}: {problem}" if problem else ""
    return ""


def save_tiles(tiles: Iterable[SavedTile], folder: Path) -> Path:
    """Add entries to the file in ``folder``, in the place of older ones for the same kernel, device and headers; returns its path.

    Other processes may do the same at the same time, and readers never see half a file.

    Raises:
        CacheError: the folder cannot be written, or its file is of another format, which a newer version may have written.
    """
    import filelock

    path = folder / SAVED_TILES
    try:
        trust.make_folder(folder)
        found = trust.check_folder(str(folder))
        if found.problem:
            raise CacheError(f"cannot keep tiles in {path}: nothing is loaded from its folder: {found.problem}")
        with filelock.FileLock(trust.lock_folder(folder) / "tuned_tiles.lock", timeout=_LOCK_SECONDS):
            _refuse_other_format(path)
            merged = {entry.identity: entry for entry in (*read_saved_tiles(folder), *tiles)}
            document = {"format": _FORMAT, "tiles": [asdict(merged[identity]) for identity in sorted(merged)]}
            trust.write_file(path, (json.dumps(document, indent=1) + "\n").encode())
    except (OSError, NotImplementedError) as error:  # filelock.Timeout is an OSError
        raise CacheError(f"cannot keep tiles in {path}: {error}; name a folder that can be written, or tune with --no-save") from error
    forget_saved_tiles()
    return path


def remove_saved_tiles(folder: Path) -> int:
    """Remove the file in ``folder``; returns how many entries it had.

    Raises:
        CacheError: it cannot be removed.
    """
    count = len(read_saved_tiles(folder))
    try:
        for name in (SAVED_TILES, SAVED_TILES + trust.SET_ASIDE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"cannot remove {folder / SAVED_TILES}: {error.strerror or error}") from error
    forget_saved_tiles()
    return count


def forget_saved_tiles() -> None:
    """Let the next lookup read the file again. What :func:`~atomr_accel_flashattn.dispatch.lookup` remembers is not forgotten by this."""
    _tiles_by_kernel.cache_clear()


@cache
def _tiles_by_kernel(folder: Path) -> Mapping[str, Mapping[tuple[str, str], Tile]]:
    """Kernel -> device -> tile, of the entries that count with these headers."""
    with contextlib.suppress(OSError):
        trust.check_folder(str(folder), readonly=settings().cache_readonly)  # which narrows one of our own
    found: dict[str, dict[tuple[str, str], Tile]] = {}
    for entry in read_saved_tiles(folder):
        if entry.current:
            found.setdefault(entry.kernel, {})[entry.device, entry.compute_capability] = entry.tile
    return found


def _parse(entry: Any) -> SavedTile | None:
    """An entry; None when a field is missing, unknown or of another type."""
    try:
        values, tile, shapes = dict(entry), dict(entry["tile"]), tuple(entry["shapes"])
        if any(type(value).__name__ != field.type for field in fields(Tile) if (value := tile.get(field.name, field.default)) is not None):
            return None
        made = SavedTile(**{**values, "tile": Tile(**tile), "shapes": shapes})
    except (TypeError, ValueError, KeyError):
        return None
    texts = (*made.identity, made.when, *made.shapes)
    return made if all(isinstance(text, str) for text in texts) and isinstance(made.speedup, (int, float)) else None


def _refuse_other_format(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError):  # what is damaged may be written over
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise CacheError(
                f"{path} is no file of saved tiles of format {_FORMAT}; it is left as it is: move it away, or name another folder"
            )


def _warn(text: str) -> None:
    warnings.warn(text, CacheWarning, stacklevel=3)
