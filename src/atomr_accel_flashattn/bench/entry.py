"""Entry points of the command line: run, print, write the record, draw the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .backward import Backward, step_memory
from .figure import draw
from .forward import Forward
from .host import HostOptions, run_host
from .layer import LayerOptions, run_layer
from .measure import Direction, Options, Report, Row, run_cells
from .record import make_record, write_record
from .report import format_row, header, memory_lines, summary

__all__ = ["RESULTS", "main", "main_backward", "main_host", "main_layer"]

RESULTS = Path("benchmarks/results")

Say = Callable[[str], None]


def main(
    options: Options, *, out: Path = RESULTS, commit: str | None = None, picture: bool = True, say: Say = print
) -> tuple[Report, Path]:
    """Run the forward benchmark.

    Args:
        options: cells, rounds, budget, peers.
        out: folder for the record and the picture.
        commit: what the record calls the code; None asks git.
        picture: also draw ``<record>.png``.
        say: where lines of text go; pass a no-op to be silent.

    Returns:
        the report, and the path of the JSON record. ``report.failures`` is empty when every cell of ours was right and timed.

    Raises:
        ValueError, RuntimeError: as :func:`~.measure.run_cells`.
    """
    return _main(Forward(), options, out=out, commit=commit, picture=picture, say=say)


def main_backward(
    options: Options, *, out: Path = RESULTS, commit: str | None = None, picture: bool = True, say: Say = print
) -> tuple[Report, Path]:
    """Run the backward benchmark, and the memory of some training steps. The rest: :func:`main`."""
    return _main(Backward(), options, out=out, commit=commit, picture=picture, say=say)


def _main(direction: Direction, options: Options, *, out: Path, commit: str | None, picture: bool, say: Say) -> tuple[Report, Path]:
    say(header([peer.name for peer in direction.peers(options)]))

    def show(row: Row) -> None:
        say(format_row(asdict(row)))

    report = run_cells(direction, options, show)
    body = {"direction": direction.NAME} | report.as_dict() | {"options": asdict(options)}
    if isinstance(direction, Backward):
        body["memory"] = [asdict(row) for row in step_memory(report)]
    record = make_record(direction.NAME, body, commit=commit)
    for line in (*summary(record), *memory_lines(record)):
        say(line)
    path = write_record(record, out)
    say(f"record: {path}")
    if picture and report.rows:
        say(f"picture: {draw(record, path.with_suffix('.png'))}")
    return report, path


def main_host(options: HostOptions, *, out: Path = RESULTS, commit: str | None = None, say: Say = print) -> tuple[dict[str, Any], Path]:
    """Run the host-cost benchmark: microseconds per call and where they go, start-up times, memory growth; the record and its path."""
    return _write("host", run_host(options, say), out=out, commit=commit, say=say)


def main_layer(options: LayerOptions, *, out: Path = RESULTS, commit: str | None = None, say: Say = print) -> tuple[dict[str, Any], Path]:
    """Run the benchmark of a compiled Llama-shaped layer; the record and its path. Its ``failures`` are empty when all peers were timed."""
    return _write("layer", run_layer(options, say), out=out, commit=commit, say=say)


def _write(kind: str, body: dict[str, Any], *, out: Path, commit: str | None, say: Say) -> tuple[dict[str, Any], Path]:
    record = make_record(kind, body, commit=commit)
    path = write_record(record, out)
    say(f"record: {path}")
    return record, path
