"""How calls over a KV cache are timed: some of them in a CUDA graph, since many are shorter than what it takes to enqueue one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from .measure import ceilings
from .read_ceiling import read_ceiling
from .timing import Contestant, Timing, measure_in_turns

if TYPE_CHECKING:
    import torch

    from .cache_cells import CacheCell

__all__ = ["Clock", "GraphClock", "HostClock", "clock_of"]

_GRAPH_SECONDS: Final = 1e-3  # of calls in a graph, at least one turn over the input sets
_CALL_SECONDS: Final = 4e-6  # that a call takes beside reading
_READ_RATE: Final = 3e12  # bytes a second, and operations of _RATE: to guess how long a call is
_RATE: Final = 5e14


class Clock(Protocol):
    """How calls are timed on a device."""

    def ready(self, cell: CacheCell, calls: Sequence[Callable[[], object]]) -> tuple[Contestant, int]:
        """What is timed, and how many calls it makes at once."""

    def measure(self, contestants: Mapping[str, Contestant], *, rounds: int, seed: int) -> dict[str, Timing]:
        """:func:`~.timing.measure_in_turns`."""

    def ceilings(self) -> dict[str, float]:
        """``read_gbs``, and others that the device has."""


@dataclass(frozen=True, slots=True)
class _Replay:
    """A captured graph with the calls that it was captured from, whose workspaces, plans and outputs its kernels address."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Callable[[], object]]

    def __call__(self) -> None:
        self.graph.replay()


class GraphClock(Clock):
    """CUDA graphs on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def ready(self, cell: CacheCell, calls: Sequence[Callable[[], object]]) -> tuple[Contestant, int]:
        """A graph of about a millisecond, whole turns over the sets."""
        import torch

        guess = _CALL_SECONDS + cell.kv_bytes / _READ_RATE + cell.flops / _RATE
        turns = max(1, round(_GRAPH_SECONDS / guess / len(calls)))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph):
            for _ in range(turns):
                for call in calls:
                    call()
        graph.replay()
        torch.cuda.synchronize()
        return Contestant([_Replay(graph, calls)], nullcontext), turns * len(calls)

    def measure(self, contestants: Mapping[str, Contestant], *, rounds: int, seed: int) -> dict[str, Timing]:
        """In turns."""
        return measure_in_turns(contestants, rounds=rounds, seed=seed)

    def ceilings(self) -> dict[str, float]:
        """Reading, copying, and a bf16 matmul."""
        return {"read_gbs": read_ceiling(self.device)} | ceilings()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector waits: a graph of a cell before that it frees inside a capture makes the capture fail."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class HostClock(Clock):
    """Each call once a round: to see that a run works, on the CPU."""

    def ready(self, cell: CacheCell, calls: Sequence[Callable[[], object]]) -> tuple[Contestant, int]:
        """The calls as they are."""
        del cell
        return Contestant(calls, nullcontext), 1

    def measure(self, contestants: Mapping[str, Contestant], *, rounds: int, seed: int) -> dict[str, Timing]:
        """One after the other."""
        del seed
        timings = {name: Timing() for name in contestants}
        for _ in range(rounds):
            for name, contestant in contestants.items():
                began = time.perf_counter()
                for call in contestant.calls:
                    call()
                timings[name].rounds.append((time.perf_counter() - began) / len(contestant.calls) * 1e3)
        return timings

    def ceilings(self) -> dict[str, float]:
        """Reading 64 MiB."""
        import torch

        source = torch.ones(1 << 24)
        began = time.perf_counter()
        source.sum()
        return {"read_gbs": (1 << 26) / (time.perf_counter() - began) * 1e-9}


def clock_of(device: torch.device) -> Clock:
    """Graphs on a GPU, else the calls one by one."""
    return HostClock() if device.type == "cpu" else GraphClock(device)
