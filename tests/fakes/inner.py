"""Inners of an actor: launches that complete when the test says so, late, out of order, with errors, or at random."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

from atomr_accel_flashattn.actor import FlashAttnInner, FlashAttnMsg, Job, PendingLaunch
from atomr_accel_flashattn.types import Device

from .waiting import PATIENCE

__all__ = ["FaultyDevice", "FaultyLaunch", "HeldDevice", "HeldLaunch"]


@dataclass(eq=False)
class HeldLaunch:
    """A launch that is unfinished until :meth:`complete`."""

    job: Job
    completed: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    computes: bool = True

    def complete(self, error: BaseException | None = None) -> None:
        """The device is done, or failed."""
        self.error = error
        self.completed.set()

    def wait(self) -> None:
        assert self.completed.wait(PATIENCE), "the test forgot to complete a launch"
        if self.error is not None:
            raise self.error
        if self.computes:
            self.job.fill()


class HeldDevice(FlashAttnInner):
    """A CPU that behaves as a GPU whose launches the test completes one by one."""

    def __init__(self) -> None:
        super().__init__(Device("cpu", 0))
        self.launches: list[HeldLaunch] = []
        self.refuse: BaseException | None = None
        self.closed = False
        self.attached: list[str] = []
        self._changed = threading.Condition()

    def attach(self) -> None:
        self.attached.append(threading.current_thread().name)

    def launch(self, job: Job) -> PendingLaunch:
        if self.refuse is not None:
            raise self.refuse
        with self._changed:
            self.launches.append(HeldLaunch(job))
            self._changed.notify_all()
        return self.launches[-1]

    def wait_for(self, count: int) -> None:
        """Until ``count`` launches were made."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.launches) >= count, PATIENCE), f"{len(self.launches)} of {count} launches"

    def complete_all(self) -> None:
        for launch in self.launches:
            launch.complete()

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class FaultyLaunch:
    """Wraps another launch: some fail when the device is done."""

    launch: PendingLaunch
    fails: bool

    def wait(self) -> None:
        self.launch.wait()
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

    def launch(self, job: Job) -> PendingLaunch:
        if self.random.random() < self.rate:
            raise OSError("a random fault of a launch")
        return FaultyLaunch(self.inner.launch(job), self.random.random() < self.rate)
