"""``tune``: search the tiles of a shape on this card, check each, and keep the winner for later calls. The work is in ``tuning``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bench.cache_cells import CacheCell
from ..env import PREFIX, settings
from ..errors import CacheError, DeviceMismatchError, RuntimeFlashAttnError
from ..kernels.spec import Family
from ..launch.driver import device_count
from ..types import DType
from .output import Json, console, make_table, print_json, print_rows, progress_bar, time_text
from .tune_shapes import Shape, shapes_of

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..bench.cells import Cell
    from ..tuning import ShapeResult, Trial, Winner

__all__ = ["tune"]

_SHOWN = 8
_DTYPES = {dtype.value: dtype for dtype in (DType.BF16, DType.F16, DType.F8E4M3, DType.F8E5M2)}


def tune(
    cells: Annotated[
        str | None,
        typer.Option(help="Shapes of the benchmark, by comma-separated patterns: those of bench --list and bench decode --list."),
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Of q and k, when the shape is given by hand.")] = 128,
    v_head_dim: Annotated[int | None, typer.Option(help="Of v; default: that of q and k.")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    heads_kv: Annotated[int | None, typer.Option(min=1, help="Default: as many as heads.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Default: as many sequences as make 16,384 tokens.")] = None,
    seqlen: Annotated[list[int] | None, typer.Option(min=1, help="Queries per sequence; several give several shapes.")] = None,
    seqlen_k: Annotated[int | None, typer.Option(min=1, help="Keys per sequence; default: as many as queries.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(_DTYPES)}; default: those of the cells, and bf16.")] = None,
    causal: Annotated[bool, typer.Option("--causal")] = False,
    window: Annotated[str | None, typer.Option(help="L,R keys around a query, -1 unbounded, as window_size.")] = None,
    varlen: Annotated[str | None, typer.Option(help="Lengths of packed sequences, comma-separated, instead of --seqlen.")] = None,
    alibi: Annotated[bool, typer.Option("--alibi")] = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="Search the tiles of the backward kernel; all launches of a backward are timed.")
    ] = False,
    family: Annotated[str | None, typer.Option(help="fa2 or fa3; default: the one that calls take.")] = None,
    tiles: Annotated[str | None, typer.Option(help="Only tiles that match these comma-separated patterns, as 'm128n64*'.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that the finalists take.")] = 5,
    budget: Annotated[float, typer.Option(min=1, help="Seconds after which nothing more is begun.")] = 600.0,
    max_spill: Annotated[int, typer.Option(min=0, help="Bytes per thread above which a tile is not timed.")] = 64,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Keep the winners in the cache folder.")] = True,
    table: Annotated[bool, typer.Option("--table", help="Also print the winners as rows of tiles/tables.py.")] = False,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="A folder that gets a record of the run.")] = None,
    as_json: Json = False,
) -> None:
    """Search the fastest tiles for a shape on this card.

    Later calls use the winners. Needs a GPU and torch. Every candidate is checked against float32 before it is timed.
    Status 1 when the tile in use was wrong or could not be timed.
    """
    if dtype not in {None, *_DTYPES} or family not in {None, *(each.value for each in Family)}:
        raise typer.BadParameter(f"got --dtype {dtype} and --family {family}; allowed are {', '.join(_DTYPES)}, and fa2 or fa3")
    shape = Shape(head_dim, v_head_dim, heads, heads_kv, batch, tuple(seqlen or ()), seqlen_k, causal, window, varlen, alibi)
    chosen = [cell if dtype is None else replace(cell, dtype=_DTYPES[dtype]) for cell in shapes_of(cells, shape)]
    cached = [str(cell) for cell in chosen if isinstance(cell, CacheCell)]
    if backward and cached:
        raise typer.BadParameter(f"--backward: got it with {', '.join(cached)}, over a KV cache, which has no gradients; leave them out")
    folder = _folder() if save else None
    _require()
    from ..tuning import Options, by_kernel, by_table_row, keep, table_row, tune_shapes, winners

    options = Options(
        family=Family(family) if family else None,
        backward=backward,
        tiles=tuple(pattern.strip() for pattern in tiles.split(",")) if tiles else (),
        rounds=rounds,
        budget=budget,
        max_spill=max_spill,
        group=by_table_row if table else by_kernel,
    )
    with progress_bar(hidden=as_json) as bar:
        results, left = tune_shapes(chosen, options, _watching(bar), (lambda _result: None) if as_json else _show)
    found = winners(results, by_kernel)
    rows = [table_row(winner) for winner in winners(results, by_table_row)]
    path = keep(found, folder, _current_device()) if folder is not None and found else None
    document = {"direction": "backward" if backward else "forward"} | _document(results, found, rows, left, path)
    record = _record(document, out)
    if as_json:
        print_json(document | {"record": record})
    else:
        _conclude(found, rows if table else [], left, path, record)
    wrong = [f"{result.cell}: {result.in_use.refused}" for result in results if result.in_use.ms is None]
    if wrong:
        raise RuntimeFlashAttnError(f"the tile in use could not be timed on {len(wrong)} shapes: {'; '.join(wrong)}")


def _require() -> None:
    """Say at once what is missing.

    Raises:
        DeviceMismatchError: no GPU, or no torch to make inputs and to check with.
    """
    if device_count() == 0:
        raise DeviceMismatchError(
            "tune: got a machine without a GPU; allowed are machines with one; atomr-flashattn info tells what is here"
        )
    if find_spec("torch") is None:
        raise DeviceMismatchError("tune: torch, which makes the inputs and checks the answers, is not installed; pip install torch")


def _folder() -> Path:
    """Where winners are kept.

    Raises:
        CacheError: nowhere, or later calls would not look there.
    """
    here = settings()
    switched = {"CACHE_READONLY": here.cache_readonly, "DISABLE_CACHE": here.cache_disabled, "DISABLE_TUNED": here.tuned_tiles_disabled}
    for name, on in switched.items():
        if on:
            raise CacheError(f"tune: {PREFIX}{name} is set, so winners are of no use to later calls; unset it, or tune with --no-save")
    if here.cache_dir is None:
        raise CacheError(f"tune: no cache folder, because this user has no home; name one with {PREFIX}CACHE_DIR, or tune with --no-save")
    return here.cache_dir


def _current_device() -> int:
    import torch

    return int(torch.cuda.current_device())


def _watching(bar: Progress) -> Callable[[Cell | CacheCell], Callable[[str, int, int], None]]:
    """One line of the progress bar, which follows the search from shape to shape and from step to step."""
    task = bar.add_task("", total=None)

    def watch(cell: Cell | CacheCell) -> Callable[[str, int, int], None]:
        def step(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{cell}: {what}", completed=done, total=total)

        return step

    return watch


def _show(result: ShapeResult) -> None:
    """The fastest tiles of a shape, the one in use, and what was wrong."""
    timed = [trial for trial in result.trials if trial.ms is not None]
    wrong = [trial for trial in result.trials if trial.refused and trial.refused.startswith("wrong")]
    refused = len(result.trials) - len(timed) - len(wrong)
    title = f"{result.cell}: {len(timed)} tiles timed, {refused} not, {len(wrong)} wrong, {result.seconds:.0f} s"
    numeric = ("time", "TFLOP/s", "speed", "registers", "spills")
    screen_table = make_table(title if result.complete else f"{title}, cut short", ("tile", *numeric, ""), numeric=numeric)
    for n, trial in enumerate(timed):
        if n < _SHOWN or trial.in_use:
            screen_table.add_row(*_cells(result, trial))
    console().print(screen_table)
    for trial in wrong:
        console().print(f"  {trial.tile}: {trial.refused}", soft_wrap=True)


def _cells(result: ShapeResult, trial: Trial) -> tuple[str, ...]:
    assert trial.ms is not None  # noqa: S101 - only timed ones are shown
    base = result.in_use.ms
    return (
        str(trial.tile),
        time_text(trial.ms * 1e-3),
        f"{result.flops / trial.ms * 1e-9:.1f}",
        f"{base / trial.ms:.3f}" if base else "-",
        str(trial.registers),
        f"{trial.spill_bytes} B" if trial.spill_bytes else "-",
        "in use" if trial.in_use else "",
    )


def _document(
    results: Sequence[ShapeResult], found: Sequence[Winner], rows: Sequence[str], left: Sequence[str], path: Path | None
) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "shapes": [
            {
                "shape": str(result.cell),
                "kernel": result.spec.kernel_name,
                "short_q": result.short_q,
                "cache_rows": result.cache_rows,
                "seconds": result.seconds,
                "complete": result.complete,
                "tiles": [
                    {
                        "tile": str(trial.tile),
                        "in_use": trial.in_use,
                        "finalist": trial.finalist,
                        "ms": trial.ms,
                        "tflops": result.flops / trial.ms * 1e-9 if trial.ms else None,
                        "rounds": trial.rounds,
                        "registers": trial.registers,
                        "spill_bytes": trial.spill_bytes,
                        "error": trial.error,
                        "refused": trial.refused,
                    }
                    for trial in result.trials
                ],
            }
            for result in results
        ],
        "winners": [_winner(winner) for winner in found],
        "table": list(rows),
        "skipped": list(left),
        "saved": path,
    }


def _winner(winner: Winner) -> dict[str, Any]:
    return {
        "kernel": winner.spec.kernel_name,
        "short_q": winner.short_q,
        "cache_rows": winner.cache_rows,
        "tile": str(winner.tile),
        "speedup": winner.speedup,
        "shapes": winner.shapes,
    }


def _record(document: dict[str, Any], folder: Path | None) -> Path | None:
    """The file that keeps a run, with the machine it was made on."""
    if folder is None:
        return None
    from ..bench.record import make_record, write_record

    return write_record(make_record("tune", document | {"saved": document["saved"] and document["saved"].name}), folder)


def _conclude(found: Sequence[Winner], rows: Sequence[str], left: Sequence[str], path: Path | None, record: Path | None) -> None:
    numeric = ("speed",)
    cells = [(winner.kernel, str(winner.tile), f"{winner.speedup:.3f}", str(len(winner.shapes))) for winner in found]
    print_rows(console(), "winners", ("kernel", "tile", *numeric, "shapes"), cells, numeric=numeric, spare=("shapes", "speed"))
    lines = [
        *rows,
        *([f"the budget did not last for {', '.join(left)}"] if left else []),
        f"kept in {path}; later calls use them" if path is not None else "not kept",
        *([f"record: {record}"] if record is not None else []),
    ]
    for line in lines:
        console().print(line, soft_wrap=True)
