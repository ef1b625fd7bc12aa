"""The completion thread: waits for launches, oldest first, and hands each to whoever settles its requests.

Why a thread that waits on events, and not a callback of the driver: a function given to cuLaunchHostFunc is a piece of the stream, so the
next kernel would stand still until Python gets its interpreter lock (up to 5 ms on a busy process); it may make no CUDA call; and it
is never called once the context is lost, which is when every future needs its answer most. Waiting is one foreign call without the lock.
A stream finishes its launches in order, so waiting for the oldest delays nobody; a device that does not would only answer later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from .inner import Flight
from .reply import Ticket

__all__ = ["CompletionThread", "Launched"]


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """One launch and the requests that it answers. It keeps their arrays alive until the device is done."""

    tickets: Sequence[Ticket]
    flight: Flight


class CompletionThread:
    """Started when made.

    Args:
        name: of the thread.
        attach: called in it first.
        settle: called in it for each launch, with what :meth:`Flight.wait` raised, or None. It must not raise.
    """

    def __init__(self, name: str, attach: Callable[[], None], settle: Callable[[Launched, BaseException | None], None]) -> None:
        self._attach = attach
        self._settle = settle
        self._launches: SimpleQueue[Launched | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, launched: Launched) -> None:
        """Wait for one more."""
        self._launches.put(launched)

    def finish(self, *, wait: bool) -> None:
        """End after everything that was added; ``wait`` for that."""
        self._launches.put(None)
        if wait:
            self._thread.join()

    def is_current(self) -> bool:
        """Whether the caller runs in this thread, as callbacks of futures do."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        failed_to_attach = _outcome(self._attach)
        while (launched := self._launches.get()) is not None:
            self._settle(launched, failed_to_attach or _outcome(launched.flight.wait))
            del launched  # the arrays of the last request must not live until the next one


def _outcome(call: Callable[[], None]) -> BaseException | None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - it is the answer to somebody's request, and this thread has to live
        return error
    return None
