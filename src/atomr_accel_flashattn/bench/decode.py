"""The benchmark of attention over a KV cache: decoding, a few tokens, chunks of prompts, appends, beside the peers that are there.

In every cell the peers take turns (:mod:`.timing`), each checked against float32 before it is timed. What is timed is a CUDA graph of some
calls over input sets in rotation, as servers replay them: small calls are shorter than what it takes to enqueue one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dispatch import lookup
from ..errors import FlashAttnError
from .cache_cells import CacheCell, select_cache_cells
from .cache_inputs import REUSE_BYTES, CacheInputs, check_cache_rows, make_cache_inputs
from .cache_peers import CachePeer, cache_peers
from .cache_requests import cache_request
from .decode_figure import draw_decode
from .decode_report import decode_header, decode_summary, format_decode_row
from .graphs import Clock, clock_of
from .inputs import ERROR_LIMIT
from .measure import OURS, Options
from .peers import Refused, first_line
from .record import make_record, write_record
from .timing import Contestant

if TYPE_CHECKING:
    import torch

__all__ = ["CacheResult", "CacheRow", "DecodeReport", "main_decode", "run_decode"]


@dataclass(slots=True, kw_only=True)
class CacheResult:
    """One peer in one cell. Without a time, ``refused`` says why."""

    peer: str
    ms: float | None = None
    spread: float | None = None  # (max - min) / median over the rounds
    gbs: float | None = None  # of k and v, read once
    read_share: float | None = None  # of the measured reading of memory
    tflops: float | None = None
    error: float | None = None  # relative, of sampled rows against float32
    rounds: list[float] = field(default_factory=list)
    refused: str | None = None


@dataclass(slots=True, kw_only=True)
class CacheRow:
    """One cell. ``ratios``: our speed over each peer's (above 1: ours is faster)."""

    cell: str
    group: str
    batch: int
    length: int
    queries: int
    heads: int
    heads_kv: int
    head_dim: int
    layout: str
    empty: int
    appends: bool
    beside: str
    limit: float
    by_rate: bool
    kernel: str
    kv_bytes: int
    flops: float
    results: dict[str, CacheResult]
    ratios: dict[str, float]


@dataclass(slots=True, kw_only=True)
class DecodeReport:
    """All rows, and what the card does by itself, before and after."""

    rows: list[CacheRow] = field(default_factory=list)
    ceilings: list[dict[str, float]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # cells for which the budget did not last
    lost: str = ""  # how the device was lost, which ended the run
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """Cells that we did not do, or did wrong, and a lost device; empty in a run that counts."""
        ours = [f"{row.cell}: {row.results[OURS].refused}" for row in self.rows if OURS in row.results and row.results[OURS].refused]
        return [*ours, *([self.lost] if self.lost else [])]

    def as_dict(self) -> dict[str, Any]:
        """For the JSON record, with the geometric mean of the ratios per peer."""
        names = dict.fromkeys(name for row in self.rows for name in row.ratios)
        means = {name: statistics.geometric_mean([row.ratios[name] for row in self.rows if name in row.ratios]) for name in names}
        return asdict(self) | {"geometric_means": means, "failures": self.failures}


def run_decode(
    options: Options,
    cells: Sequence[CacheCell],
    peers: Sequence[CachePeer],
    device: torch.device,
    *,
    reuse_bytes: int = REUSE_BYTES,
    progress: Callable[[CacheRow, DecodeReport], None] | None = None,
) -> DecodeReport:
    """Run cells on a device until the budget is spent; ``progress`` is called with each finished row and the report so far.

    On the CPU, for which there are no peers, the times are of little worth.
    """
    import torch

    began, report = time.perf_counter(), DecodeReport()
    clock = clock_of(device)
    with torch.no_grad():
        report.ceilings.append(clock.ceilings())
        for n, cell in enumerate(cells):
            if time.perf_counter() - began > options.budget:
                report.skipped = [str(each) for each in cells[n:]]
                break
            row = _run_cell(
                cell, peers, make_cache_inputs(cell, device, reuse_bytes=reuse_bytes, seed=options.seed), clock, options, report
            )
            if device.type == "cuda" and not report.lost:
                torch.cuda.empty_cache()  # the next cell's caches have other sizes
            report.rows.append(row)
            report.seconds = time.perf_counter() - began
            if progress is not None:
                progress(row, report)
            if report.lost:
                report.skipped = [str(each) for each in cells[n + 1 :]]
                return report
        report.ceilings.append(clock.ceilings())
    report.seconds = time.perf_counter() - began
    return report


def _run_cell(
    cell: CacheCell, peers: Sequence[CachePeer], sets: Sequence[CacheInputs], clock: Clock, options: Options, report: DecodeReport
) -> CacheRow:
    results = {peer.name: CacheResult(peer=peer.name) for peer in peers}
    contestants: dict[str, Contestant] = {}
    counts: dict[str, int] = {}
    for peer in peers:
        try:
            contestants[peer.name], counts[peer.name] = _enter(cell, peer, sets, clock, results[peer.name])
        except Exception as error:  # noqa: BLE001 - another package's errors derive from anything
            results[peer.name].refused = str(error) if isinstance(error, Refused) else first_line(error)
            if _is_lost(sets[0].q.device):
                report.lost = f"{cell}: {peer.name} took the device down: {results[peer.name].refused}; leave it out with --peers"
                contestants.clear()
                break
    for name, timing in clock.measure(contestants, rounds=options.rounds, seed=options.seed).items():
        result = results[name]
        result.rounds = [ms / counts[name] for ms in timing.rounds]
        result.ms, result.spread = timing.ms / counts[name], timing.spread
        result.gbs, result.tflops = cell.kv_bytes / result.ms * 1e-6, cell.flops / result.ms * 1e-9
        result.read_share = result.gbs / report.ceilings[0]["read_gbs"]
    ours = results[OURS].ms if OURS in results else None
    shape = {name: getattr(cell, name) for name in CacheRow.__dataclass_fields__ if hasattr(cell, name)}
    return CacheRow(
        cell=str(cell),
        kernel="" if report.lost else _kernel_name(cell, sets[0]),
        results=results,
        ratios={name: r.ms / ours for name, r in results.items() if ours and r.ms and name != OURS},
        **shape,
    )


def _enter(cell: CacheCell, peer: CachePeer, sets: Sequence[CacheInputs], clock: Clock, result: CacheResult) -> tuple[Contestant, int]:
    """What of a peer is timed, after a look at its first answer; an exception is its refusal."""
    calls = peer.prepare(cell, sets)
    result.error = check_cache_rows(cell, sets[0], calls[0]())
    limit = ERROR_LIMIT[cell.dtype]
    if not result.error <= limit:
        raise Refused(f"wrong: relative error {result.error:.3g}, at most {limit:g} allowed; not timed")
    for call in calls[1:]:
        call()
    return clock.ready(cell, calls)


def _is_lost(device: torch.device) -> bool:
    import torch

    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _kernel_name(cell: CacheCell, inputs: CacheInputs) -> str:
    """That of our kernel; a refusal is told by our column."""
    try:
        return lookup(cache_request(cell, inputs).dispatch_key()).kernel_name
    except FlashAttnError:
        return ""


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
