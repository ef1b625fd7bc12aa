"""Locks that no Ctrl-C leaves taken. In a program's main thread it comes between any two calls, those inside the standard library too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Condition", "Event", "run_if_free"]

_T = TypeVar("_T")


class Condition(threading.Condition):
    """A condition around an RLock whose ``with`` is that of the lock itself.

    The base class enters and leaves in a function of its own, where a Ctrl-C can come after the lock was taken, or before it is released;
    a ``with`` of the lock has no such place. A Ctrl-C as a :meth:`wait` begins may leave as a RuntimeError, with the lock released.
    """

    __enter__ = property(lambda self: self._lock.__enter__)
    __exit__ = property(lambda self: self._lock.__exit__)


class Event:
    """A ``threading.Event`` on such a condition."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._is_set = False

    def set(self) -> None:
        """Wake everybody who waits, now and later."""
        with self._condition:
            self._is_set = True
            self._condition.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until it is set, for ``timeout`` seconds at most. Whether it is."""
        with self._condition:
            return self._condition.wait_for(lambda: self._is_set, timeout)


def run_if_free(lock: threading.RLock, work: Callable[..., _T], *args: object) -> _T | None:
    """``work(*args)`` under ``lock``; None where somebody holds it, this thread among them (a signal handler, a finalizer).

    No Ctrl-C leaves the lock taken. It comes right after a call, so after ``acquire`` and before a name could note that this succeeded:
    the lock itself has to know whose it is. Releasing it is the first call of ``finally``, so none comes before that.
    """
    if lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - as threading.Condition asks it
        return None
    try:
        return work(*args) if lock.acquire(blocking=False) else None
    finally:
        try:  # noqa: SIM105 - contextlib.suppress would be a call before this one
            lock.release()
        except RuntimeError:  # it is another thread's
            pass
