"""The benchmark of attention over a KV cache: decoding, a few tokens, chunks of prompts, appends, beside the peers that are there.

In every cell the peers take turns (:mod:`.timing`), each checked against float32 before it is timed. What is timed is a CUDA graph of some
calls over input sets in rotation, as servers replay them: small calls are shorter than what it takes to enqueue one. Another library's
kernels may take the device down: peers are probed first (:mod:`.probe`), and cells run in a process that can be started anew.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .apart import Died, said_apart
from .cache_cells import CacheCell, select_cache_cells
from .cache_inputs import REUSE_BYTES
from .cache_peers import CachePeer, cache_peers
from .decode_figure import draw_decode
from .decode_report import decode_header, decode_summary, format_decode_row
from .measure import OURS, Options
from .probe import probe_peers
from .record import make_record, write_record
from .turns import CacheResult, CacheRow, Work, row_of, run_cells

if TYPE_CHECKING:
    import torch

__all__ = ["DecodeReport", "main_decode", "run_decode"]

_TRUSTED: Final = (OURS, "fa3")  # of those that took turns in a cell that was lost, others are left out first
CELL_SECONDS: Final = 120.0  # that a process may be silent: a peer is prepared, or all take their turns


@dataclass(slots=True, kw_only=True)
class DecodeReport:
    """All rows, and what the card does by itself, before and after."""

    rows: list[CacheRow] = field(default_factory=list)
    ceilings: list[dict[str, float]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # cells for which the budget did not last
    lost: list[str] = field(default_factory=list)  # where the process or its device was lost, and who ran
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """Cells that we did not do, or did wrong; empty in a run that counts."""
        return [f"{row.cell}: {row.results[OURS].refused}" for row in self.rows if OURS in row.results and row.results[OURS].refused]

    def as_dict(self) -> dict[str, Any]:
        """For the JSON record, with the geometric mean of the ratios per peer."""
        names = dict.fromkeys(name for row in self.rows for name in row.ratios)
        means = {name: statistics.geometric_mean([row.ratios[name] for row in self.rows if name in row.ratios]) for name in names}
        return asdict(self) | {"geometric_means": means, "failures": self.failures}


class _Run:
    """What was measured so far, and which peers are left out of which cells; ``ran``: those that run now."""

    def __init__(
        self,
        cells: Sequence[CacheCell],
        peers: Sequence[CachePeer],
        barred: dict[CacheCell, dict[str, str]],
        progress: Callable[[CacheRow, DecodeReport], None] | None,
    ) -> None:
        self.cells, self.peers, self.barred, self.progress = cells, peers, barred, progress
        self.report = DecodeReport()
        self.ran: tuple[str, ...] = ()

    @property
    def left(self) -> Sequence[CacheCell]:
        """Cells without a row."""
        return self.cells[len(self.report.rows) :]

    def take(self, what: Any) -> None:
        """One message of :func:`~.turns.run_cells`."""
        self.ran = what if isinstance(what, tuple) else ()
        if isinstance(what, CacheRow):
            self.report.rows.append(what)
            if self.progress is not None:
                self.progress(what, self.report)
        elif isinstance(what, dict):
            self.report.ceilings.append(what)

    def lose(self, death: Died) -> None:
        """The process is gone: leave out who may be why, or give the cell up where that is nobody but us."""
        reason = f"lost while {', '.join(self.ran) or 'no peer'} ran: {death}"
        if not self.left:
            self.report.lost.append(f"after the last cell: {reason}")
            return
        cell = self.left[0]
        self.report.lost.append(f"{cell}: {reason}")
        suspects = [peer for peer in self.ran if peer not in _TRUSTED] or [peer for peer in self.ran if peer != OURS]
        out = dict.fromkeys(suspects, f"left out after {self.report.lost[-1]}")
        self.barred = {each: out | before for each, before in self.barred.items()}
        if not suspects:
            why = {peer.name: self.barred[cell].get(peer.name, reason) for peer in self.peers}
            self.take(row_of(cell, {name: CacheResult(peer=name, refused=text) for name, text in why.items()}))


def run_decode(
    options: Options,
    cells: Sequence[CacheCell],
    peers: Sequence[CachePeer],
    device: torch.device,
    *,
    reuse_bytes: int = REUSE_BYTES,
    progress: Callable[[CacheRow, DecodeReport], None] | None = None,
) -> DecodeReport:
    """Probe the peers, then run the cells in a process of their own until the budget is spent.

    When that process or its device is lost, a new one goes on from the same cell, without those that may be why: the peer that was being
    prepared, or all that took turns except ours and FlashAttention-3. ``progress``: called with each finished row and the report so far.

    Raises:
        RuntimeError: the process was lost before its first cell.
    """
    began = time.perf_counter()
    run = _Run(cells, peers, probe_peers(peers, cells, device, options.seed), progress)
    report = run.report
    while run.left and (spent := time.perf_counter() - began) <= options.budget:
        work = Work(
            options=replace(options, budget=options.budget - spent),
            cells=run.left,
            peers=peers,
            device=device,
            reuse_bytes=reuse_bytes,
            barred=run.barred,
            read_gbs=report.ceilings[0]["read_gbs"] if report.ceilings else None,
        )
        try:
            for what in said_apart(run_cells, work, patience=lambda _came: CELL_SECONDS):
                report.seconds = time.perf_counter() - began
                run.take(what)
            break
        except Died as death:
            if not report.ceilings:
                raise RuntimeError(f"the process that measures was lost before its first cell: {death}") from death
            run.lose(death)
    report.skipped = [str(each) for each in run.left]
    report.seconds = time.perf_counter() - began
    return report


def main_decode(
    options: Options,
    *,
    out: Path,
    commit: str | None = None,
    picture: bool = True,
    say: Callable[[str], None] = print,
    device: torch.device | None = None,
    reuse_bytes: int = REUSE_BYTES,
) -> tuple[DecodeReport, Path]:
    """Run the benchmark, print it, write the record after every cell, and draw the picture.

    Args:
        options: cells, rounds, budget, peers.
        out: folder for the record and the picture.
        commit: what the record calls the code; None asks git.
        picture: also draw ``<record>.png``.
        say: where lines of text go.
        device: where; None is the current CUDA device.
        reuse_bytes: of k and v that are read between two uses of the same ones.

    Returns:
        the report, and the path of the record. ``report.failures`` is empty when every cell of ours was right and timed.

    Raises:
        ValueError: no cell or no peer matches.
        RuntimeError: no CUDA device, and no other was asked for.
    """
    import torch

    cells, peers = select_cache_cells(options.cells), cache_peers(options.peers)
    if device is None:
        if not torch.cuda.is_available():
            raise RuntimeError("the benchmark needs a CUDA device and a torch that sees it; this machine has none")
        device = torch.device("cuda", torch.cuda.current_device())
    head = make_record("decode", {}, commit=commit)

    def record_of(report: DecodeReport) -> dict[str, Any]:
        return head | report.as_dict() | {"options": asdict(options)}

    def show(row: CacheRow, report: DecodeReport) -> None:
        say(format_decode_row(asdict(row)))
        write_record(record_of(report), out)

    say(decode_header([peer.name for peer in peers]))
    report = run_decode(options, cells, peers, device, reuse_bytes=reuse_bytes, progress=show)
    record = record_of(report)
    for line in decode_summary(record):
        say(line)
    path = write_record(record, out)
    say(f"record: {path}")
    if picture and report.rows:
        say(f"picture: {draw_decode(record, path.with_suffix('.png'))}")
    return report, path
