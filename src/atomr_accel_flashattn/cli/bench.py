"""``bench``: measure against the peers found on this machine. The work is in ``atomr_accel_flashattn.bench``."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DeviceMismatchError, RuntimeFlashAttnError
from ..launch.driver import device_count
from .output import Json, console, make_table, print_json

__all__ = ["bench"]

PEERS_HELP = (
    "Only these columns, comma-separated, or all: ours; fa2 and cudnn (torch's own); flex (torch's FlexAttention, which compiles for "
    "seconds a cell); fa3 (FlashAttention-3, the authors' or xformers'); fa4 (FlashAttention-4); cudnn_fe (nvidia-cudnn-frontend). What is "
    "named and not installed is a column that says so. Without this: all that are installed, but flex."
)


def bench(
    cells: Annotated[str | None, typer.Option(help="Only cells that match these comma-separated patterns; --list shows the names.")] = None,
    peers: Annotated[str | None, typer.Option(help=PEERS_HELP)] = None,
    families: Annotated[
        str | None, typer.Option(help="Families of our kernels, fa2 or fa3, comma-separated; the first is the column ours.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that the peers take in each cell.")] = 5,
    budget: Annotated[float, typer.Option(min=1, help="Seconds after which no further cell is begun.")] = 600.0,
    host: Annotated[bool, typer.Option("--host", help="Measure what a call costs on the CPU, start-up and memory instead.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record and the picture.")] = Path("benchmarks/results"),
    list_cells: Annotated[bool, typer.Option("--list", help="Only list the cells.")] = False,
    as_json: Json = False,
) -> None:
    """Measure speed against the peers that are installed, all in one run, or with --host what a call costs. Needs a GPU and torch."""
    if list_cells:
        _list(cells, as_json=as_json)
        return
    chosen = _names(peers) or None
    _refuse_unknown(cells, chosen, _names(families))
    _require()
    from ..bench import HostOptions, Options, main, main_host

    say = (lambda _line: None) if as_json else typer.echo
    with redirect_stdout(io.StringIO() if as_json else sys.stdout):
        try:
            if host:
                record, path = main_host(HostOptions(), out=out, say=say)
                failures: list[str] = []
            else:
                options = Options(cells=cells, rounds=rounds, budget=budget, peers=chosen, families=_names(families))
                report, path = main(options, out=out, say=say)
                record, failures = report.as_dict(), report.failures
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if as_json:
        print_json({"record": path, "result": record})
    if failures:
        raise RuntimeFlashAttnError(f"{len(failures)} cells were refused or wrong: {'; '.join(failures)}")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _refuse_unknown(cells: str | None, peers: tuple[str, ...] | None, families: tuple[str, ...]) -> None:
    """Names that are none are told before a GPU is looked for.

    Raises:
        typer.BadParameter: a cell, peer or family that there is not.
    """
    from ..bench import Options
    from ..bench.cells import select
    from ..bench.forward import chosen_peers

    try:
        select(cells)
        chosen_peers(Options(peers=peers, families=families))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _list(patterns: str | None, *, as_json: bool) -> None:
    from ..bench.cells import select

    try:
        chosen = select(patterns)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        print_json({"cells": [_cell(cell) for cell in chosen]})
        return
    numeric = ("sequences", "tokens", "TFLOP")
    table = make_table(f"{len(chosen)} cells", ("cell", *numeric), numeric=numeric)
    for cell in chosen:
        table.add_row(str(cell), str(cell.batch), str(cell.tokens), f"{cell.flops * 1e-12:.2f}")
    console().print(table)


def _cell(cell: Any) -> dict[str, Any]:
    return {"cell": str(cell), "sequences": cell.batch, "tokens": cell.tokens, "flops": cell.flops, "min_bytes": cell.min_bytes}


def _require() -> None:
    """Say at once what is missing.

    Raises:
        DeviceMismatchError: no GPU, or no torch to compare with.
    """
    if device_count() == 0:
        raise DeviceMismatchError(
            "bench: got a machine without a GPU; allowed are machines with one; atomr-flashattn info tells what is here"
        )
    if find_spec("torch") is None:
        raise DeviceMismatchError("bench: torch, whose kernels are the peers, is not installed; pip install torch")
