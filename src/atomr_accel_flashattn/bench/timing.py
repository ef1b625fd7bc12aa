"""Timing on a GPU that throttles at its power cap.

A fixed order favours whoever follows a slow kernel by up to 5 %, so the peers take turns in shuffled rounds; before each measurement the
same kernel runs for a while (the settle), and what counts is the median over the rounds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Contestant", "Timing", "measure_in_turns"]

SETTLE_SECONDS = 0.040
TIMED_SECONDS = 0.030
MIN_CALLS, MAX_CALLS = 6, 400


@dataclass(slots=True)
class Timing:
    """Milliseconds per call, one entry per round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """(max - min) / median over the rounds."""
        return (max(self.rounds) - min(self.rounds)) / self.ms


@dataclass(frozen=True, slots=True)
class Contestant:
    """``calls``: one per input set, rotated so that none finds its inputs in the L2 cache; ``context``: what is entered around them."""

    calls: Sequence[Callable[[], object]]
    context: Callable[[], AbstractContextManager[Any]]


def measure_in_turns(contestants: Mapping[str, Contestant], *, rounds: int, seed: int) -> dict[str, Timing]:
    """Time every contestant ``rounds`` times in shuffled order.

    Args:
        contestants: by name.
        rounds: how often each is timed.
        seed: of the shuffles.

    Returns:
        by name, the timings.
    """
    order = random.Random(seed)  # noqa: S311 - an order, not a secret
    timings = {name: Timing() for name in contestants}
    names = list(contestants)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            with contestants[name].context():
                timings[name].rounds.append(_settle_and_time(contestants[name].calls))
    return timings


def _settle_and_time(calls: Sequence[Callable[[], object]]) -> float:
    """Milliseconds per call of a run of about 30 ms, right after about 40 ms of the same kernel; CUDA events, no gap between the two."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    each = max((time.perf_counter() - began) / len(calls), 1e-6)
    _rotate(calls, _bounded(SETTLE_SECONDS / each))
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    count = _bounded(TIMED_SECONDS / each)
    first.record()
    _rotate(calls, count)
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / count


def _bounded(count: float) -> int:
    return max(MIN_CALLS, min(MAX_CALLS, round(count)))


def _rotate(calls: Sequence[Callable[[], object]], count: int) -> None:
    for i in range(count):
        calls[i % len(calls)]()
