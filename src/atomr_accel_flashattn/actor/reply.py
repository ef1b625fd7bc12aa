"""Reply: the future of one request. Ticket: the request on its way through the actor.

A reply is resolved in two steps. Any thread may set its outcome, which is one store: from then on
``result()``, ``exception()`` and ``done()`` have it. :meth:`Reply.finish` tells callbacks,
sleepers, and those in ``concurrent.futures.wait``, if there are any. That is done by a thread of
the actor, which receives no signals, so a Ctrl-C tears nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from .inner import Job, PendingLaunch
from .messages import Answer

__all__ = ["Reply", "Ticket", "Watch", "own_error"]

_Outcome: TypeAlias = Answer | BaseException
_Callback: TypeAlias = Callable[[Future[Answer]], object]

_log = logging.getLogger(__name__)
_CANCELLED: Final = CancelledError()  # an outcome; a new one is raised
_deciding: Final = threading.RLock()  # held for a few stores: launched or cancelled, first outcome


class Watch(Protocol):
    """Who looks after replies whose launch was made: :class:`InFlight`."""

    def poll_until_over(self, reply: Reply[Any], timeout: float | None) -> None:
        """Ask the device for a moment."""

    def take_finished(self) -> None:
        """Decide what has finished."""

    def hurry(self) -> None:
        """Let the completion thread wait for the launches in flight: somebody sleeps."""

    def finish_soon(self, reply: Reply[Any]) -> None:
        """Let the completion thread call :meth:`Reply.finish`."""


class Reply(Future[Answer]):
    """A ``concurrent.futures.Future`` that can be awaited. It resolves when the device is done.

    ``cancel()`` works until the request is launched. Callbacks run in a thread of the actor: they
    should be quick.

    Args:
        watch: who looks after it once it has begun; None where somebody always does.
    """

    begun = False  # launched, or about to be: too late to cancel
    is_wanted = False  # somebody sleeps until it is resolved, or is to be called then
    _outcome: _Outcome[Answer] | None = None
    _callbacks: tuple[_Callback[Answer], ...] = ()
    _is_finished = False
    _has_base = False
    _base_is_told = False

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Set up the base class when it is asked for, as concurrent.futures.wait() does.

            Its condition costs more than everything else that a reply does, and few replies need
            it.
            """
            with _deciding:
                is_first = not self._has_base and not name.startswith("__")
                if is_first:
                    super().__init__()
                    self._has_base = True
            if is_first:
                self._want()
            return super().__getattribute__(name)

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else "finished" if self.is_over() else "running" if self.begun else "pending"
        return f"<{type(self).__name__} at {id(self):#x} {state}>"

    def __await__(self) -> Generator[Any, None, Answer]:
        return asyncio.wrap_future(self).__await__()

    def result(self, timeout: float | None = None) -> Answer:
        """The answer; see concurrent.futures."""
        outcome = self._outcome
        if outcome is None:
            outcome = self._wait(timeout)
        if not isinstance(outcome, BaseException):
            return outcome
        try:
            raise CancelledError if outcome is _CANCELLED else outcome
        finally:
            del outcome, self  # the traceback must not keep the error alive

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong; see concurrent.futures."""
        outcome = self._wait(timeout) if self._outcome is None else self._outcome
        if outcome is _CANCELLED:
            raise CancelledError
        return outcome if isinstance(outcome, BaseException) else None

    def done(self) -> bool:
        """Whether there is an answer, an error or a cancel."""
        if self._outcome is None and self.begun and self._watch is not None:
            self._watch.take_finished()
        return self._outcome is not None

    def is_over(self) -> bool:
        """:meth:`done` as far as is known, without a question to the device."""
        return self._outcome is not None

    def running(self) -> bool:
        """Whether it was launched, and is not done."""
        return self.begun and self._outcome is None

    def cancelled(self) -> bool:
        """Whether it was cancelled in time."""
        return self._outcome is _CANCELLED

    def cancel(self) -> bool:
        """See concurrent.futures. False once the request is launched."""
        with _deciding:
            if not self.begun:
                self.decide(_CANCELLED)
        if self._outcome is not _CANCELLED:
            return False
        self._finish_soon()
        return True

    def add_done_callback(self, fn: _Callback[Answer]) -> None:
        """See concurrent.futures; what a callback raises is logged, a SystemExit too."""
        self.listen(fn, hurry=True)

    def listen(self, fn: _Callback[Answer], *, hurry: bool = False) -> None:
        """Add a callback that is in no hurry, as that of a log."""
        with _deciding:
            is_late = self._is_finished
            if not is_late:
                self._callbacks = (*self._callbacks, fn)
        if is_late:
            self._call(fn)
        else:
            self._want(hurry=hurry)

    def _want(self, *, hurry: bool = True) -> None:
        """Somebody has to be told. Who launches or decides looks at ``is_wanted`` after that."""
        self.is_wanted = True
        if self._outcome is not None:
            self._finish_soon()
        elif hurry and self.begun and self._watch is not None:
            self._watch.hurry()

    def _finish_soon(self) -> None:
        if self._watch is None:
            self.finish()
        else:
            self._watch.finish_soon(self)

    def _wait(self, timeout: float | None) -> _Outcome[Answer]:
        """Look for the outcome here, then sleep in a queue, which a Ctrl-C leaves as it was."""
        if self.begun and self._watch is not None:
            self._watch.poll_until_over(self, timeout)
        if self._outcome is None:
            woken: SimpleQueue[Any] = SimpleQueue()
            wake_up = woken.put
            with _deciding:
                self._callbacks = (wake_up, *self._callbacks)  # before callbacks, which may be slow
            self._want()
            if self._outcome is None:  # after saying so
                with contextlib.suppress(Empty):
                    woken.get(timeout=None if timeout is None else max(0.0, timeout))
        if self._outcome is not None:
            return self._outcome
        with _deciding:
            self._callbacks = tuple(each for each in self._callbacks if each is not wake_up)
        raise TimeoutError

    def begin(self) -> bool:
        """Called right before the launch: it cannot be cancelled any more. False: it is over."""
        with _deciding:
            if self._outcome is None:
                self.begun = True
                return True
        self.finish()  # who cancelled may have been interrupted
        return False

    def decide(self, outcome: _Outcome[Answer]) -> bool:
        """Set the outcome, in any thread, unless there is one. Whether it was set."""
        return vars(self).setdefault("_outcome", outcome) is outcome  # one call of C

    def finish(self) -> None:
        """Tell everybody of the outcome who was not told yet, in a thread of the actor."""
        with _deciding:
            outcome = self._outcome
            if outcome is None:
                return
            self._is_finished = True
            callbacks, self._callbacks = self._callbacks, ()
            tells_base = self._has_base and not self._base_is_told
            self._base_is_told = self._has_base
        if tells_base:
            if outcome is _CANCELLED:
                super().cancel()
                self.set_running_or_notify_cancel()
            elif isinstance(outcome, BaseException):
                self.set_exception(outcome)
            else:
                self.set_result(outcome)
        for fn in callbacks:
            self._call(fn)

    def resolve(self, outcome: _Outcome[Answer]) -> None:
        """Decide and finish."""
        self.decide(outcome)
        self.finish()

    def _call(self, fn: _Callback[Answer]) -> None:
        try:
            fn(self)
        except BaseException as error:
            if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                raise  # the caller's own exit or Ctrl-C
            _log.exception("a callback of a Reply failed")


@dataclass(slots=True, eq=False, weakref_slot=True)
class Ticket:
    """A request between ask and reply. It holds the job, and so the arrays, until it is settled.

    Attributes:
        tried: its launch in the caller's thread failed, and the actor's thread tries again.
        launch: once it was made.
        poll: of the launch; None where it can only be waited for.
        number: of the launch, counted by the actor.
    """

    job: Job
    reply: Reply[Any] = field(default_factory=Reply)
    tried: bool = False
    launch: PendingLaunch | None = None
    poll: Callable[[], bool] | None = None
    number: int = 0


def own_error(error: BaseException) -> BaseException:
    """A copy of ``error`` for one future: threads that raise the same one share its traceback."""
    try:
        own = copy.copy(error)
    except Exception:  # noqa: BLE001 - exceptions of others may take any arguments
        return error
    own.__cause__ = error
    return own
