"""What all commands share: where tables, JSON and errors go, and how sizes and times are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["Json", "console", "errors", "make_table", "print_json", "progress_bar", "size_text", "time_text"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def console() -> Console:
    """Standard output. Made anew, so that whoever redirects ``sys.stdout`` is heard; wide enough for tables when it is no terminal."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 140)


def errors() -> Console:
    """Standard error."""
    return Console(file=sys.stderr, highlight=False)


def print_json(document: Any) -> None:
    """One JSON document on standard output. Dataclasses become objects, enums their values, paths strings."""
    sys.stdout.write(json.dumps(document, indent=2, default=_plain, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"got {type(value).__qualname__}; JSON takes dataclasses, enums, paths and plain values")


def make_table(title: str, columns: Sequence[str], *, numeric: Sequence[str] = (), **options: Any) -> Table:
    """A table in the one style of all commands; ``numeric`` columns are right-aligned."""
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", border_style="dim", box=SIMPLE_HEAD, **options
    )
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left", no_wrap=column in numeric, overflow="fold")
    return table


def progress_bar(*, hidden: bool = False) -> Progress:
    """A progress bar on standard error, so that standard output stays clean; nothing is drawn when ``hidden``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors(),
        disable=hidden,
        transient=True,
    )


def _scaled(value: float, step: float, units: Sequence[str], form: Callable[[float], str]) -> str:
    for unit in units[:-1]:
        if abs(value) < step:
            return f"{form(value)} {unit}"
        value /= step
    return f"{form(value)} {units[-1]}"


def size_text(size: float) -> str:
    """Bytes for people: ``17 B``, ``1.2 kB``, ``34 MB``."""
    return _scaled(size, 1000, ("B", "kB", "MB", "GB"), lambda x: f"{x:.3g}" if x < 100 else f"{x:.0f}")


def time_text(seconds: float) -> str:
    """Seconds for people: ``12.3 us``, ``4.56 ms``, ``1.2 s``."""
    return _scaled(seconds * 1e6, 1000, ("us", "ms", "s"), lambda x: f"{x:.3g}" if x < 100 else f"{x:.0f}")
