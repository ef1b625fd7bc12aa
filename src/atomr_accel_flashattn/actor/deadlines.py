"""Timeouts of requests: one thread and its heap, started by the first request that has one."""

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

_SWEEP_AT: Final = 4096  # entries; those of answered requests stay until then

_Entry: TypeAlias = tuple[float, int, float, weakref.ref[Ticket]]


class Deadlines:
    """Fails what is not answered in time. Callers put into a queue, so a Ctrl-C tears nothing."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._added: SimpleQueue[_Entry | None] = SimpleQueue()
        self._numbers = count()  # of entries: tickets have no order
        self._starting = threading.RLock()
        self._threads: set[threading.Thread] = set()  # two after a Ctrl-C in the start of one

    def is_current(self) -> bool:
        """Whether the caller runs in this thread, as callbacks of replies whose time is over do."""
        return threading.current_thread() in self._threads

    def add(self, ticket: Ticket, timeout: float, began: float) -> None:
        """Fail ``ticket`` ``timeout`` seconds after ``began`` (of ``time.monotonic``)."""
        self._added.put((began + timeout, next(self._numbers), timeout, weakref.ref(ticket)))
        with self._starting:
            if not self._threads:
                thread = threading.Thread(target=self._run, name=f"{self._label}-deadlines", daemon=True)
                thread.start()
                self._threads.add(thread)

    def close(self) -> None:
        """End the thread. Every request has its answer by then."""
        self._added.put(None)

    def _run(self) -> None:
        self._threads.add(threading.current_thread())
        heap: list[_Entry] = []
        sweep_at = _SWEEP_AT
        while True:
            try:
                entry = self._added.get(timeout=max(0.0, heap[0][0] - time.monotonic()) if heap else None)
            except Empty:
                _, _, timeout, reference = heapq.heappop(heap)
                ticket = reference()
                if ticket is not None:
                    ticket.reply.resolve(timed_out(self._label, timeout, "not answered"))
                del ticket  # its arrays must not live until the next one
                continue
            if entry is None:
                self._added.put(None)  # for another thread, should there be one
                return
            heapq.heappush(heap, entry)
            if len(heap) >= sweep_at:
                heap = [each for each in heap if _is_open(each[3]())]
                heapq.heapify(heap)
                sweep_at = max(_SWEEP_AT, 2 * len(heap))


def _is_open(ticket: Ticket | None) -> bool:
    return ticket is not None and not ticket.reply.is_over()


def timed_out(label: str, timeout: float, what: str) -> RequestTimeoutError:
    """The error of a request whose time is over."""
    return RequestTimeoutError(f"{label}: {what} within {timeout:g} s; allow more time, or send less at once")
