"""Devices for tests: launches that finish when the test says so, late, out of order, with errors, or at random."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atomr_accel_flashattn.actor import FlashAttnActor, FlashAttnHandle, FlashAttnInner, FlashAttnMsg, FlashAttnProps, Flight, Job
from atomr_accel_flashattn.fa2 import Fa2FwdRequest, MaskKind
from atomr_accel_flashattn.runtime.execute import fill
from atomr_accel_flashattn.types import Device

PATIENCE = 20.0  # seconds that a test waits for what has to happen


def until(fact: Callable[[], object]) -> None:
    """Wait until ``fact`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def message(seed: int = 0, *, seqlen_q: int = 2, seqlen_k: int = 5, dtype: str = "float32") -> FlashAttnMsg.Forward:
    """A forward call of a few elements."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, seqlen_q, 2, 8)).astype(dtype)
    k, v = rng.standard_normal((2, 1, seqlen_k, 1, 8)).astype(dtype)
    return FlashAttnMsg.Forward(Fa2FwdRequest(q, k, v, mask=MaskKind.causal()))


@dataclass(eq=False)
class HeldFlight:
    """A launch that flies until :meth:`land`."""

    jobs: Sequence[Job]
    landed: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def land(self, error: BaseException | None = None) -> None:
        """The device is done, or failed."""
        self.error = error
        self.landed.set()

    def wait(self) -> None:
        assert self.landed.wait(PATIENCE), "the test forgot to land a launch"
        if self.error is not None:
            raise self.error
        for job in self.jobs:
            assert job.outputs is not None
            fill(job.request, job.outputs)


class HeldDevice(FlashAttnInner):
    """A CPU that behaves as a GPU whose launches the test lands one by one."""

    def __init__(self) -> None:
        super().__init__(Device("cpu", 0))
        self.flights: list[HeldFlight] = []
        self.refuse: BaseException | None = None
        self.closed = False
        self.attached: list[str] = []
        self._changed = threading.Condition()

    def attach(self) -> None:
        self.attached.append(threading.current_thread().name)

    def launch(self, jobs: Sequence[Job]) -> Flight:
        if self.refuse is not None:
            raise self.refuse
        with self._changed:
            self.flights.append(HeldFlight(jobs))
            self._changed.notify_all()
        return self.flights[-1]

    def wait_for(self, count: int) -> None:
        """Until ``count`` launches were made."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.flights) >= count, PATIENCE), f"{len(self.flights)} of {count} launches"

    def land_all(self) -> None:
        for flight in self.flights:
            flight.land()

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class FaultyFlight:
    """Wraps another launch: some fail when the device is done."""

    flight: Flight
    fails: bool

    def wait(self) -> None:
        self.flight.wait()
        if self.fails:
            raise OSError("a random fault on the device")


class FaultyDevice(FlashAttnInner):
    """Wraps an inner: some launches are refused, some fail later."""

    def __init__(self, inner: FlashAttnInner, seed: int, rate: float = 0.02) -> None:
        super().__init__(inner.device)
        self.inner = inner
        self.rate = rate
        self.random = random.Random(seed)

    def accept(self, message: FlashAttnMsg.Forward) -> Job:
        return self.inner.accept(message)

    def fuse_key(self, job: Job) -> Hashable | None:
        return self.inner.fuse_key(job)

    def launch(self, jobs: Sequence[Job]) -> Flight:
        if self.random.random() < self.rate:
            raise OSError("a random fault of a launch")
        return FaultyFlight(self.inner.launch(jobs), self.random.random() < self.rate)


def start(device: FlashAttnInner, **props: Any) -> FlashAttnHandle:
    """An actor above ``device``."""
    return FlashAttnActor.start(FlashAttnProps(device="cpu", **props), device)
