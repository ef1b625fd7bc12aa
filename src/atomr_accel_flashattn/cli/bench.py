"""``bench``: measure against the peers found on this machine. The work is in ``atomr_accel_flashattn.bench``."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DeviceMismatchError, RuntimeFlashAttnError
from ..launch.driver import device_count
from .output import Json, console, make_table, print_json, size_text

if TYPE_CHECKING:
    from ..bench.cells import Cell
    from ..bench.measure import Direction

__all__ = ["bench"]

PEERS_HELP = (
    "Only these columns, comma-separated, or all: ours; fa2 and cudnn (torch's own); flex (torch's FlexAttention, which compiles for "
    "seconds a cell); fa3 (FlashAttention-3, the authors' or xformers'); fa4 (FlashAttention-4); cudnn_fe (nvidia-cudnn-frontend); beside "
    "cells of fp8 ours_bf16 and ours_single_level. What is named and not installed is a column that says so. Without this: all that are "
    "installed, but flex and the last two. Of decode: ours, fa3, fa4, fi, fi_cc and xqa (FlashInfer), cudnn_fe; without this all."
)


class What(StrEnum):
    """What is measured."""

    FORWARD = "forward"
    DECODE = "decode"


def bench(
    what: Annotated[What, typer.Argument(help="forward: plain arrays; decode: calls over a KV cache.")] = What.FORWARD,
    cells: Annotated[str | None, typer.Option(help="Only cells that match these comma-separated patterns; --list shows the names.")] = None,
    peers: Annotated[str | None, typer.Option(help=PEERS_HELP)] = None,
    families: Annotated[
        str | None, typer.Option(help="Families of our kernels, fa2 or fa3, comma-separated; the first is the column ours.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that the peers take in each cell.")] = 5,
    budget: Annotated[float, typer.Option(min=1, help="Seconds after which no further cell is begun.")] = 600.0,
    backward: Annotated[
        bool, typer.Option("--backward", help="Measure gradients instead; a peer's are those of torch's autograd.")
    ] = False,
    host: Annotated[
        bool, typer.Option("--host", help="Measure what a call, and a training step, costs on the CPU, start-up and memory instead.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record and the picture.")] = Path("benchmarks/results"),
    list_cells: Annotated[bool, typer.Option("--list", help="Only list the cells.")] = False,
    as_json: Json = False,
) -> None:
    """Measure speed beside the peers that are installed.

    All take turns in one run. With --host: what a call costs on the CPU. Needs a GPU and torch.
    """
    if backward and host:
        raise typer.BadParameter("got it beside --host, which measures a training step too; leave one out", param_hint="--backward")
    decode = what is What.DECODE
    if decode and (backward or host or families):
        raise typer.BadParameter("got it beside --backward, --host or --families; leave those out", param_hint="decode")
    if list_cells:
        _list(cells, backward=backward, decode=decode, as_json=as_json)
        return
    chosen = _names(peers) or None
    _refuse_unknown(cells, chosen, _names(families), backward=backward, decode=decode)
    _require()
    from ..bench import HostOptions, Options, main, main_backward, main_decode, main_host

    say = (lambda _line: None) if as_json else typer.echo
    with redirect_stdout(io.StringIO() if as_json else sys.stdout):
        try:
            if host:
                record, path = main_host(HostOptions(), out=out, say=say)
                failures: list[str] = []
            elif decode:
                found, path = main_decode(Options(cells=cells, rounds=rounds, budget=budget, peers=chosen), out=out, say=say)
                record, failures = found.as_dict(), found.failures
            else:
                options = Options(cells=cells, rounds=rounds, budget=budget, peers=chosen, families=_names(families))
                report, path = (main_backward if backward else main)(options, out=out, say=say)
                record, failures = report.as_dict(), report.failures
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if as_json:
        print_json({"record": path, "result": record})
    if failures:
        raise RuntimeFlashAttnError(f"{len(failures)} cells were refused or wrong: {'; '.join(failures)}")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _direction(*, backward: bool) -> Direction:
    from ..bench.backward import Backward
    from ..bench.forward import Forward

    return Backward() if backward else Forward()


def _refuse_unknown(cells: str | None, peers: tuple[str, ...] | None, families: tuple[str, ...], *, backward: bool, decode: bool) -> None:
    """Names that are none are told before a GPU is looked for.

    Raises:
        typer.BadParameter: a cell, peer or family that there is not.
    """
    from ..bench import Options
    from ..bench.cache_cells import select_cache_cells
    from ..bench.cache_peers import cache_peers

    direction = _direction(backward=backward)
    try:
        if decode:
            select_cache_cells(cells)
            cache_peers(peers)
            return
        direction.cells(cells)
        direction.peers(Options(peers=peers, families=families))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _list(patterns: str | None, *, backward: bool, decode: bool, as_json: bool) -> None:
    if decode:
        _list_decode(patterns, as_json=as_json)
        return
    direction = _direction(backward=backward)
    try:
        chosen = direction.cells(patterns)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        print_json({"cells": [_cell(cell, direction) for cell in chosen]})
        return
    numeric = ("sequences", "tokens", "TFLOP")
    table = make_table(f"{len(chosen)} cells", ("cell", *numeric), numeric=numeric)
    for cell in chosen:
        table.add_row(str(cell), str(cell.batch), str(cell.tokens), f"{direction.flops(cell) * 1e-12:.2f}")
    console().print(table)


def _list_decode(patterns: str | None, *, as_json: bool) -> None:
    from ..bench.cache_cells import select_cache_cells

    try:
        chosen = select_cache_cells(patterns)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        facts = [{"cell": str(cell), "sequences": cell.sequences, "kv_bytes": cell.kv_bytes, "flops": cell.flops} for cell in chosen]
        print_json({"cells": facts})
        return
    numeric = ("sequences", "K and V", "GFLOP")
    table = make_table(f"{len(chosen)} cells", ("cell", *numeric), numeric=numeric)
    for cell in chosen:
        table.add_row(str(cell), str(cell.sequences), size_text(cell.kv_bytes), f"{cell.flops * 1e-9:.2f}")
    console().print(table)


def _cell(cell: Cell, direction: Direction) -> dict[str, Any]:
    return {
        "cell": str(cell),
        "sequences": cell.batch,
        "tokens": cell.tokens,
        "flops": direction.flops(cell),
        "min_bytes": cell.min_bytes,
    }


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
