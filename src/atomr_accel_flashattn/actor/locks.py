"""A lock that whoever finds it free takes, for work that nobody has to wait to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["run_if_free"]

_T = TypeVar("_T")


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
