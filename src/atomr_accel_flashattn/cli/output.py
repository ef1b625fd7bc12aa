"""What all commands share: where tables, JSON and errors go, and how sizes and times are written.

No console here parses markup: what is printed holds paths and names of users. Colours are given as :class:`rich.text.Text`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = [
    "Json",
    "console",
    "errors",
    "is_narrow",
    "make_table",
    "print_json",
    "print_rows",
    "progress_bar",
    "size_text",
    "step",
    "time_text",
]

_NARROW = 110  # columns below which wide tables take a shorter form
_WIDTH = 140  # of what is no terminal
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def console() -> Console:
    """Standard output, made anew so that whoever redirects ``sys.stdout`` is heard.

    As wide as the terminal or as COLUMNS says; where there is neither, wide enough for every table.
    """
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else _WIDTH
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)


def errors() -> Console:
    """Standard error."""
    return Console(file=sys.stderr, highlight=False, markup=False, emoji=False)


def is_narrow(screen: Console) -> bool:
    """Whether wide tables have to take their shorter form."""
    return screen.width < _NARROW


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
        title=title or None, title_justify="left", title_style="bold", header_style="bold", border_style="dim", box=SIMPLE_HEAD, **options
    )
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left", no_wrap=column in numeric, overflow="fold")
    return table


def print_rows(
    screen: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    numeric: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Print a table of one line a row, the first column whole.

    Args:
        screen: where to.
        title: above it.
        columns: their names.
        rows: a cell for each column.
        numeric: columns that are right-aligned.
        spare: columns to leave out where the screen is too narrow, the first of them first. Where that is not enough, only the first
            column is printed, and the terminal wraps it.
    """
    left_out = list(spare)
    kept = list(range(len(columns)))
    while _table_width(columns, rows, kept) > screen.width and left_out:
        kept.remove(columns.index(left_out.pop(0)))
    if _table_width(columns, rows, kept) > screen.width:
        for line in (title, *(row[0] for row in rows)):
            screen.print(line, soft_wrap=True)
        return
    table = make_table(title, [columns[index] for index in kept], numeric=numeric)
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    screen.print(table)


def _table_width(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], kept: Sequence[int]) -> int:
    """Two blanks around each cell, one between two of them, and the edges."""
    return sum(max(cell_len(str(row[index])) for row in (columns, *rows)) for index in kept) + 3 * len(kept) + 1


def progress_bar(what: str = "", *, hidden: bool = False) -> Progress:
    """A progress bar on standard error, so that standard output stays clean; nothing is drawn when ``hidden``.

    Where standard error is no terminal there is no bar, so one line says ``what`` is begun.
    """
    screen = errors()
    if what and not hidden and not screen.is_terminal:
        screen.print(f"{what} ...", soft_wrap=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=screen,
        disable=hidden or not screen.is_terminal,
        transient=True,
    )


def step(text: str, *, hidden: bool = False) -> contextlib.AbstractContextManager[object]:
    """Say on standard error, at once, what is done while this context lasts; where that is a terminal, the line goes when it is done."""
    if hidden:
        return contextlib.nullcontext()
    screen = errors()
    if screen.is_terminal:
        return screen.status(Text(text))
    screen.print(f"{text} ...", soft_wrap=True)
    return contextlib.nullcontext()


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
