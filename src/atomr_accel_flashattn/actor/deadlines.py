"""Timeouts of requests: one thread and a heap of its own, started by the first request that has one."""

from __future__ import annotations

import heapq
import threading
import time
import weakref
from itertools import count
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias

from ..errors import RequestTimeoutError
from .reply import Ticket

__all__ = ["Deadlines", "timed_out"]

_SWEEP_AT: Final = 4096  # entries; requests that were answered leave theirs behind until then, or until their time

_Entry: TypeAlias = tuple[float, int, float, weakref.ref[Ticket]]


class Deadlines:
    """Fails what is not answered in time. Callers only put into a queue, so a Ctrl-C tears nothing."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._added: SimpleQueue[_Entry | None] = SimpleQueue()
        self._numbers = count()  # of entries: tickets have no order
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None

    def is_current(self) -> bool:
        """Whether the caller runs in this thread, as callbacks of replies whose time is over do."""
        return threading.current_thread() is self._thread

    def add(self, ticket: Ticket, timeout: float, began: float) -> None:
        """Fail ``ticket`` ``timeout`` seconds after ``began`` (of ``time.monotonic``)."""
        self._added.put((began + timeout, next(self._numbers), timeout, weakref.ref(ticket)))
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"{self._label}-deadlines", daemon=True)
                thread.start()
                self._thread = thread  # last: a Ctrl-C before leaves two threads, which share the queue

    def close(self) -> None:
        """End the thread. Every request has its answer by then."""
        self._added.put(None)

    def _run(self) -> None:
        heap: list[_Entry] = []
        sweep_at = _SWEEP_AT
        while True:
            try:
                entry = self._added.get(timeout=max(0.0, heap[0][0] - time.monotonic()) if heap else None)
            except Empty:
                _, _, timeout, reference = heapq.heappop(heap)
                self._fail(reference(), timeout)
                continue
            if entry is None:
                self._added.put(None)  # for another thread, should there be one
                return
            heapq.heappush(heap, entry)
            if len(heap) >= sweep_at:
                heap = [each for each in heap if _is_open(each[3]())]
                heapq.heapify(heap)
                sweep_at = max(_SWEEP_AT, 2 * len(heap))

    def _fail(self, ticket: Ticket | None, timeout: float) -> None:
        if ticket is not None:
            ticket.reply.resolve(timed_out(self._label, timeout, "not answered"))


def _is_open(ticket: Ticket | None) -> bool:
    return ticket is not None and not ticket.reply.is_over()


def timed_out(label: str, timeout: float, what: str) -> RequestTimeoutError:
    """The error of a request whose time is over."""
    return RequestTimeoutError(f"{label}: {what} within {timeout:g} s; allow more time, or send less at once")
