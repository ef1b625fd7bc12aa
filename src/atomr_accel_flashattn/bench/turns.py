"""Cells of the cache benchmark in one process: every peer is checked, then they take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..dispatch import lookup
from ..errors import FlashAttnError
from .cache_inputs import check_cache_rows, make_cache_inputs
from .cache_requests import cache_request
from .graphs import clock_of
from .inputs import ERROR_LIMIT
from .measure import OURS, Options
from .peers import Call, Refused, first_line

if TYPE_CHECKING:
    import torch

    from .cache_cells import CacheCell
    from .cache_inputs import CacheInputs
    from .cache_peers import CachePeer
    from .graphs import Clock
    from .timing import Contestant

__all__ = ["CacheResult", "CacheRow", "Entered", "Work", "check_answer", "enter", "is_lost", "ready_clock", "row_of", "run_cells"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a process is to measure. ``barred``: by cell, the peers that are left out of it and why.

    ``read_gbs``: what the card reads, where it was measured before.
    """

    options: Options
    cells: Sequence[CacheCell]
    peers: Sequence[CachePeer]
    device: torch.device
    reuse_bytes: int
    barred: Mapping[CacheCell, Mapping[str, str]]
    read_gbs: float | None = None


@dataclass(frozen=True, slots=True)
class Entered:
    """A peer that takes turns. ``count``: of calls that the contestant makes at once; ``last``: the last of them."""

    contestant: Contestant
    count: int
    last: _Kept


class _Kept:
    """A call that keeps what it returned. Of one that a graph captured, that is where every replay writes."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.answer: Any = None

    def __call__(self) -> torch.Tensor:
        self.answer = answer = self._call()
        return answer

    def spoil(self) -> None:
        """So that only a later call or replay makes the answer right."""
        self.answer.fill_(float("nan"))


def run_cells(say: Callable[[Any], None], work: Work) -> None:
    """Measure the cells until the budget is spent. On the CPU, for which there are no peers, the times are of little worth.

    Says the ceilings (a dict) where they are not known; of each cell a tuple of names before those peers run, and its row; the ceilings.

    Raises:
        RuntimeError: the device was lost.
    """
    import torch

    began, clock = time.perf_counter(), ready_clock(work.device)
    with torch.no_grad():
        read_gbs = work.read_gbs
        if read_gbs is None:
            ceilings = clock.ceilings()
            read_gbs = ceilings["read_gbs"]
            say(ceilings)
        for cell in work.cells:
            if time.perf_counter() - began > work.options.budget:
                break
            sets = make_cache_inputs(cell, work.device, reuse_bytes=work.reuse_bytes, seed=work.options.seed)
            say(_run_cell(cell, work, sets, clock, read_gbs, lambda names: say(tuple(names))))
            del sets
            if work.device.type == "cuda":
                torch.cuda.empty_cache()  # the next cell's caches have other sizes
        say(clock.ceilings())


def _run_cell(
    cell: CacheCell, work: Work, sets: Sequence[CacheInputs], clock: Clock, read_gbs: float, tell: Callable[[Collection[str]], None]
) -> CacheRow:
    barred = work.barred.get(cell, {})
    results = {peer.name: CacheResult(peer=peer.name, refused=barred.get(peer.name)) for peer in work.peers}
    entered: dict[str, Entered] = {}
    for peer in work.peers:
        if peer.name in barred:
            continue
        tell((peer.name,))
        try:
            entered[peer.name] = enter(cell, peer, sets, clock, results[peer.name])
        except Exception as error:
            results[peer.name].refused = str(error) if isinstance(error, Refused) else first_line(error)
            if is_lost(work.device):
                raise
    tell(entered)
    contestants = {name: each.contestant for name, each in entered.items()}
    for name, timing in clock.measure(contestants, rounds=work.options.rounds, seed=work.options.seed).items():
        result = results[name]
        try:
            result.error = max(result.error or 0.0, check_answer(cell, sets[-1], entered[name].last.answer))
        except Refused as error:
            result.refused = f"after its turns: {error}"
            continue
        result.rounds = [ms / entered[name].count for ms in timing.rounds]
        result.ms, result.spread = timing.ms / entered[name].count, timing.spread
        result.gbs, result.tflops = cell.kv_bytes / result.ms * 1e-6, cell.flops / result.ms * 1e-9
        result.read_share = result.gbs / read_gbs
    return row_of(cell, results, _kernel_name(cell, sets[0]))


def row_of(cell: CacheCell, results: dict[str, CacheResult], kernel: str = "") -> CacheRow:
    """The row of a cell with these results."""
    ours = results[OURS].ms if OURS in results else None
    shape = {name: getattr(cell, name) for name in CacheRow.__dataclass_fields__ if hasattr(cell, name)}
    ratios = {name: r.ms / ours for name, r in results.items() if ours and r.ms and name != OURS}
    return CacheRow(cell=str(cell), kernel=kernel, results=results, ratios=ratios, **shape)


def enter(cell: CacheCell, peer: CachePeer, sets: Sequence[CacheInputs], clock: Clock, result: CacheResult) -> Entered:
    """What of a peer takes turns, after a look at its first answer; an exception is its refusal."""
    calls = peer.prepare(cell, sets)
    result.error = check_answer(cell, sets[0], calls[0]())
    last = _Kept(calls[-1])
    calls = [*calls[:-1], last]
    for call in calls:
        call()
    contestant, count = clock.ready(cell, calls)
    last.spoil()
    return Entered(contestant, count, last)


def check_answer(cell: CacheCell, inputs: CacheInputs, answer: torch.Tensor) -> float:
    """The relative error of an answer that is right, else Refused."""
    error, limit = check_cache_rows(cell, inputs, answer), ERROR_LIMIT[cell.dtype]
    if not error <= limit:
        raise Refused(f"wrong: relative error {error:.3g}, at most {limit:g} allowed; not timed")
    return error


def ready_clock(device: torch.device) -> Clock:
    """The clock of a device that is now the current one, in a process that begins."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize()
    return clock_of(device)


def is_lost(device: torch.device) -> bool:
    """Whether the device is in an error state, which only a new process leaves."""
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
