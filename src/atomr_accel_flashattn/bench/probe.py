"""Each peer on small cells, in a process of its own, before it takes turns: one that dies or hangs there is left out of cells alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from .apart import Died, said_apart
from .cache_inputs import make_cache_inputs
from .cache_peers import OurCalls
from .measure import OURS
from .peers import Refused
from .turns import CacheResult, check_answer, enter, is_lost, ready_clock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from .cache_cells import CacheCell
    from .cache_peers import CachePeer
    from .graphs import Clock
    from .turns import Entered

__all__ = ["probe_cell", "probe_peers"]

LENGTH: Final = 1024  # keys of a sequence in a probe
QUERIES: Final = 16  # of a sequence, where the cell has more than one
SETS: Final = 3  # of inputs
REPLAYS: Final = 3
START_SECONDS: Final = 90.0  # for a process to start
PROBE_SECONDS: Final = 20.0  # for a peer on one small cell


def probe_cell(cell: CacheCell) -> CacheCell:
    """The small cell that stands for a cell: the same layout, heads and kind of call. Cells alike have the same one."""
    queries, empty = QUERIES if cell.queries > 1 else 1, min(cell.empty, 1)
    return replace(cell, group="probe", batch=2, length=LENGTH, queries=queries, empty=empty, beside="", limit=0.0, by_rate=False)


def probe_peers(peers: Sequence[CachePeer], cells: Sequence[CacheCell], device: torch.device, seed: int) -> dict[CacheCell, dict[str, str]]:
    """By cell, the peers that are not to take part in it, with the reason; peers are probed side by side. Ours is not probed."""
    others = [peer for peer in peers if peer.name != OURS]
    kinds = list(dict.fromkeys(map(probe_cell, cells)))
    with ThreadPoolExecutor(max(1, len(others))) as pool:
        reasons = list(pool.map(lambda peer: _reasons(peer, kinds, device, seed), others))
    return {
        cell: {peer.name: found[probe_cell(cell)] for peer, found in zip(others, reasons, strict=True) if found[probe_cell(cell)]}
        for cell in cells
    }


def _reasons(peer: CachePeer, kinds: Sequence[CacheCell], device: torch.device, seed: int) -> dict[CacheCell, str]:
    """Why a peer is left out of cells of a kind; empty where it is not. After a death the rest is probed in a new process."""
    found: dict[CacheCell, str] = {}
    while len(found) < len(kinds):
        left = kinds[len(found) :]
        started = False
        try:
            for what in said_apart(_probe, peer, left, device, seed, patience=lambda came: PROBE_SECONDS if came else START_SECONDS):
                if started:
                    found[kinds[len(found)]] = what
                started = True
        except Died as death:
            reason = f"left out, as its probe failed: {death}"
            found |= dict.fromkeys(left if not started else kinds[len(found) : len(found) + 1], reason)
    return found


def _probe(say: Callable[[Any], None], peer: CachePeer, kinds: Sequence[CacheCell], device: torch.device, seed: int) -> None:
    """Say None when the device is ready, then per kind why the peer is to be left out, empty where it is not."""
    import torch

    clock = ready_clock(device)
    say(None)
    with torch.no_grad():
        for kind in kinds:
            say(_trial(peer, kind, device, clock, seed))


def _trial(peer: CachePeer, kind: CacheCell, device: torch.device, clock: Clock, seed: int) -> str:
    """Capture ours and the peer as they are measured, replay them in turns, look at the peer's answer."""
    sets = make_cache_inputs(kind, device, reuse_bytes=SETS * kind.kv_bytes, seed=seed)
    entered: list[Entered] = []
    for each in (OurCalls(), peer):
        try:
            entered.append(enter(kind, each, sets, clock, CacheResult(peer=each.name)))
        except Exception:
            if is_lost(device):
                raise
            if each is peer:
                return ""  # a refusal, which the cell itself will tell
    for _ in range(REPLAYS):
        for turn in entered:
            for call in turn.contestant.calls:
                call()
    try:
        check_answer(kind, sets[-1], entered[-1].last.answer)  # waits for the device
    except Refused as error:
        return f"left out, as its probe failed: {error}"
    return ""
