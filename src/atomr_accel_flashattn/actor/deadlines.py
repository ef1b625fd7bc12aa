"""Timeouts of requests: one thread and a heap, started by the first request that has one."""

from __future__ import annotations

import heapq
import threading
import time
import weakref
from itertools import count

from ..errors import RequestTimeoutError
from .locks import Condition
from .reply import Ticket

__all__ = ["Deadlines"]

_SWEEP_AT = 4096  # entries; requests that were answered in time leave theirs behind until then, or until their time


class Deadlines:
    """Fails what is not answered in time. Thread-safe."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._heap: list[tuple[float, int, float, weakref.ref[Ticket]]] = []
        self._numbers = count()
        self._changed = Condition()
        self._sweep_at = _SWEEP_AT
        self._thread: threading.Thread | None = None
        self._sleeps_until = float("inf")
        self._over = False

    def is_current(self) -> bool:
        """Whether the caller runs in the thread of deadlines, as callbacks of replies whose time is over do."""
        return threading.current_thread() is self._thread

    def add(self, ticket: Ticket, timeout: float, began: float) -> None:
        """Fail ``ticket`` ``timeout`` seconds after ``began`` (of ``time.monotonic``)."""
        entry = (began + timeout, next(self._numbers), timeout, weakref.ref(ticket))
        with self._changed:
            if self._over:
                return
            heapq.heappush(self._heap, entry)
            if len(self._heap) >= self._sweep_at:
                self._heap = [each for each in self._heap if _is_open(each[3]())]
                heapq.heapify(self._heap)
                self._sweep_at = max(_SWEEP_AT, 2 * len(self._heap))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"{self._label}-deadlines", daemon=True)
                thread.start()
                self._thread = thread  # after a Ctrl-C in between there are two, which is one more than needed
            elif self._heap[0][0] < self._sleeps_until:  # this one, or one before whose sender was interrupted
                self._changed.notify_all()

    def close(self) -> None:
        """End the thread; deadlines that are left are forgotten, as every request has its answer by then."""
        with self._changed:
            self._over = True
            self._heap.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._over and (not self._heap or self._heap[0][0] > time.monotonic()):
                    self._sleeps_until = self._heap[0][0] if self._heap else float("inf")
                    self._changed.wait(self._sleeps_until - time.monotonic() if self._heap else None)
                if self._over:
                    return
                _, _, timeout, reference = heapq.heappop(self._heap)
            ticket = reference()
            if ticket is not None:
                ticket.reply.fail(timed_out(self._label, timeout, "not answered"))
            del ticket


def _is_open(ticket: Ticket | None) -> bool:
    return ticket is not None and not ticket.reply.is_over()  # done() would ask the device, thousands of times under the lock


def timed_out(label: str, timeout: float, what: str) -> RequestTimeoutError:
    """The error of a request whose time is over."""
    return RequestTimeoutError(f"{label}: {what} within {timeout:g} s; allow more time, or send less at once")
