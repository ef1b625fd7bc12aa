"""Reply: the future of one request. Ticket: the request on its way through the actor."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Generator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from ..execute import Output
from .inner import Job

__all__ = ["Reply", "Ticket", "own_error"]


class Reply(Future[Output]):
    """A ``concurrent.futures.Future`` that can be awaited too. It resolves when the device is done, not when the kernel is queued.

    ``cancel()`` works until the request is launched. Callbacks run in a thread of the actor: they should be quick.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begun = False

    def __await__(self) -> Generator[Any, None, Output]:
        return asyncio.wrap_future(self).__await__()

    def begin(self) -> bool:
        """Called right before the launch; from then on it cannot be cancelled. False when it was cancelled or answered, or has begun."""
        with self._condition:  # reentrant, and shared with cancel() and set_exception(): the answer to "is it still wanted" stays true
            if self._begun:
                return False
            self._begun = True
            return (self.cancelled() or not self.done()) and self.set_running_or_notify_cancel()

    def answer(self, output: Output) -> None:
        """Resolve, unless a timeout or a stop came first."""
        with contextlib.suppress(InvalidStateError):
            self.set_result(output)

    def fail(self, error: BaseException) -> None:
        """Fail, unless it is resolved or cancelled already."""
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Ticket:
    """A request between ask and reply. It holds the job, and so the arrays, until it is settled."""

    job: Job
    reply: Reply = field(default_factory=Reply)


def own_error(error: BaseException) -> BaseException:
    """A copy of ``error`` for one future: exceptions that several threads raise would share, and pile up, one traceback."""
    try:
        own = copy.copy(error)
    except Exception:  # noqa: BLE001 - exceptions of others may take any arguments
        return error
    own.__cause__ = error
    return own
