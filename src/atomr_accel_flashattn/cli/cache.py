"""``cache``: what lies in the kernel cache, kernels and tuned tiles, whether it is whole, and how to be rid of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..env import settings
from ..errors import CacheError
from ..jit.cache import KernelCache
from ..tiles.saved import SAVED_TILES, SavedTile, read_saved_tiles, remove_saved_tiles, saved_tiles_problem
from .output import Json, console, print_json, print_rows, size_text, time_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app", "cache_at"]

app = typer.Typer(help="The kernel cache: list, verify, clear, size.", no_args_is_help=True)

_OURS = re.compile(r"-[0-9a-f]{16}\.(json|cubin|cu)$")  # how KernelCache names what it writes
Directory = Annotated[
    Path | None, typer.Option("--dir", exists=True, file_okay=False, help="Another cache folder than the one that the environment names.")
]


def cache_at(directory: Path | None) -> KernelCache:
    """The cache in ``directory``, or the one that the environment names, which need not exist yet.

    Raises:
        CacheError: no folder is named anywhere.
    """
    folder = directory or settings().cache_dir
    if folder is None:
        raise CacheError("no cache folder: this user has no home; name one with --dir or ATOMR_FLASHATTN_CACHE_DIR")
    return KernelCache(folder, readonly=settings().cache_readonly)


def _cache_to_clean(directory: Path | None) -> KernelCache:
    """:func:`cache_at` for commands that remove files: refused when the folder holds files of the same kinds that we did not write.

    Raises:
        CacheError: a folder that is not ours alone.
    """
    cache = cache_at(directory)
    names = (path.name for path in cache.directory.iterdir()) if cache.directory.is_dir() else ()
    ours = (name for name in names if name != SAVED_TILES)
    foreign = sorted(name for name in ours if name.endswith((".json", ".cubin", ".cu")) and not _OURS.search(name))
    if foreign:
        raise CacheError(
            f"{cache.directory} is no kernel cache, for it holds {foreign[0]}; nothing was removed; name the right folder with --dir"
        )
    return cache


@app.command("list")
def list_entries(directory: Directory = None, as_json: Json = False) -> None:
    """List the kernels in the cache, and the tiles that were tuned on this machine."""
    cache = cache_at(directory)
    records, tiles = cache.list(), read_saved_tiles(cache.directory)
    if as_json:
        saved = [asdict(entry) | {"tile": str(entry.tile), "current": entry.current} for entry in tiles]
        print_json({"directory": cache.directory, "kernels": [asdict(record) for record in records], "tiles": saved})
        return
    screen = console()
    rows = [
        (
            record.name,
            record.arch,
            record.nvrtc,
            str(record.registers),
            f"{record.spill_bytes} B" if record.spill_bytes else "-",
            size_text(record.cubin_bytes),
            time_text(record.compile_seconds),
        )
        for record in records
    ]
    numeric = ("registers", "spills", "cubin", "compile")
    spare = ("arch", "cubin", "compile", "NVRTC", "spills", "registers")
    screen.print(f"{len(records)} kernels in {cache.directory}", style="bold", soft_wrap=True)
    print_rows(screen, "", ("kernel", "arch", "NVRTC", *numeric), rows, numeric=numeric, spare=spare)
    if tiles:
        _show_tiles(screen, tiles)


def _show_tiles(screen: Console, tiles: Sequence[SavedTile]) -> None:
    rows = [
        (
            entry.kernel,
            str(entry.tile),
            f"{entry.speedup:.3f}",
            "yes" if entry.current else "no: other headers",
            f"{entry.device} ({entry.compute_capability})",
            entry.when,
        )
        for entry in tiles
    ]
    columns = ("kernel", "tile", "speed", "used", "device", "tuned")
    print_rows(screen, f"{len(tiles)} tuned tiles", columns, rows, numeric=("speed",), spare=("tuned", "device", "speed", "used"))


@app.command()
def verify(directory: Directory = None, as_json: Json = False) -> None:
    """Read every kernel, compare it with its digest, and remove what is damaged. Name what others can have written, which is not loaded.

    Status 1 when there was any of either.
    """
    cache = _cache_to_clean(directory)
    problems = [*cache.problems(), *filter(None, [saved_tiles_problem(cache.directory)])]
    good, removed = cache.verify()
    if as_json:
        print_json({"directory": cache.directory, "good": good, "removed": removed, "problems": problems})
    else:
        untrusted = f", {len(problems)} not loaded because others can have written them" if problems else ""
        console().print(f"{good} good, {len(removed)} damaged and removed{untrusted}, in {cache.directory}", soft_wrap=True)
        for stem in removed:
            console().print(f"  removed {stem}", soft_wrap=True)
        for problem in problems:
            console().print(f"  {problem}", soft_wrap=True, markup=False)
    if removed or problems:
        raise typer.Exit(1)


@app.command()
def clear(
    directory: Directory = None,
    tiles_too: Annotated[bool, typer.Option("--tiles", help="Also remove the tiles that tune has found.")] = False,
    as_json: Json = False,
) -> None:
    """Remove every kernel; they are compiled again when they are needed. Tuned tiles stay unless --tiles is given."""
    cache = _cache_to_clean(directory)
    freed = cache.size()
    removed = cache.clear()
    tiles = remove_saved_tiles(cache.directory) if tiles_too else 0
    if as_json:
        print_json({"directory": cache.directory, "removed": removed, "freed_bytes": freed, "removed_tiles": tiles})
    else:
        and_tiles = f" and {tiles} tuned tiles" if tiles else ""
        console().print(f"removed {removed} kernels, {size_text(freed)}{and_tiles}, from {cache.directory}", soft_wrap=True)


@app.command()
def size(directory: Directory = None, as_json: Json = False) -> None:
    """Say how much the cache holds."""
    cache = cache_at(directory)
    count, used = len(cache), cache.size()
    if as_json:
        print_json({"directory": cache.directory, "kernels": count, "bytes": used})
    else:
        console().print(f"{count} kernels, {size_text(used)}, in {cache.directory}", soft_wrap=True)
