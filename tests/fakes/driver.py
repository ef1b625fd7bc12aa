"""A driver made of Python: streams, events and contexts that note what was asked of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from .waiting import PATIENCE

__all__ = ["FakeDriver"]

_DEVICE_LOST, _NOT_READY = 700, 600
_ERRORS = {
    _NOT_READY: "CUDA_ERROR_NOT_READY",
    _DEVICE_LOST: "CUDA_ERROR_ILLEGAL_ADDRESS",
    701: "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
}


class _Flags:
    CU_EVENT_DISABLE_TIMING = 2
    CU_STREAM_NON_BLOCKING = 1


@dataclass
class FakeDriver:
    """What ``driver()`` returns; ``log`` is what happened, in order: (what, handle, ...). The fake card notes its launches here."""

    log: list[tuple[Any, ...]] = field(default_factory=list)
    launchers: list[str] = field(default_factory=list)  # names of the threads that launched, or tried to
    alive: set[int] = field(default_factory=set)  # events that are not destroyed
    current: int = 0  # the context of every thread
    sticky: bool = False  # an earlier kernel left the context unusable
    busy: bool = False  # no launch is finished when it is asked for; who waits for one does get it
    completed: threading.Event = field(default_factory=threading.Event)  # waits for an event end when it is set
    _events: Iterator[int] = field(default_factory=lambda: count(1000))

    CUevent_flags = _Flags
    CUstream_flags = _Flags
    CUresult = int

    def __post_init__(self) -> None:
        self.completed.set()

    def hold(self) -> None:
        """From now on no launch is finished, until :meth:`complete`."""
        self.busy = True
        self.completed.clear()

    def complete(self) -> None:
        """All launches are finished, later ones at once."""
        self.busy = False
        self.completed.set()

    @property
    def live_events(self) -> int:
        """How many events are not destroyed."""
        return len(self.alive)

    @contextmanager
    def current_context(self, index: int) -> Iterator[None]:
        """Stands in for ``current_context``."""
        self.log.append(("push", index))
        yield

    @staticmethod
    def primary_context(index: int) -> int:
        """Stands in for ``primary_context``."""
        return 90 + index

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:  # noqa: N802 - CUDA's name
        self.log.append(("stream", flags))
        return 0, 500

    def cuStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.log.append(("destroy", stream))
        return (0,)

    def cuEventCreate(self, flags: int) -> tuple[int, int]:  # noqa: N802, ARG002 - CUDA's name
        event = next(self._events)
        self.alive.add(event)
        return 0, event

    def cuEventDestroy(self, event: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.alive.remove(event)
        return (0,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        assert event in self.alive, "a destroyed event was recorded"
        self.log.append(("record", event, stream))
        return (0,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:  # noqa: N802, ARG002 - CUDA's name
        assert event in self.alive, "a stream waits for a destroyed event"
        self.log.append(("wait", event, stream))
        return (0,)

    def cuEventSynchronize(self, event: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.log.append(("synchronize", event))
        assert self.completed.wait(PATIENCE), "the test forgot to complete a launch"
        return (_DEVICE_LOST if self.sticky else 0,)

    def cuEventQuery(self, event: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.log.append(("query", event))
        return (_DEVICE_LOST if self.sticky else _NOT_READY if self.busy else 0,)

    def cuCtxGetCurrent(self) -> tuple[int, int]:  # noqa: N802 - CUDA's name
        return 0, self.current

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.log.append(("context", context))
        return (0,)

    def cuGetErrorName(self, code: int) -> tuple[int, bytes]:  # noqa: N802 - CUDA's name
        return 0, _ERRORS.get(code, "CUDA_ERROR_UNKNOWN").encode()

    def cuGetErrorString(self, code: int) -> tuple[int, bytes]:  # noqa: N802 - CUDA's name
        return 0, f"error {code}".encode()
