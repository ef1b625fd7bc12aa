"""Reply: the future of one request. Ticket: the request on its way through the actor."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from ..runtime.plan import Output
from .inner import Job
from .locks import Condition

__all__ = ["Reply", "Ticket", "Watch", "own_error"]


_log = logging.getLogger(__name__)

# States of a Future; its methods that tell them take its lock, four times in the way of an answer.
_PENDING: Final = "PENDING"
_RUNNING: Final = "RUNNING"
_FINISHED: Final = "FINISHED"
_OPEN: Final = frozenset({_PENDING, _RUNNING})
_making: Final = threading.RLock()  # held, without a call, by who gives a reply its condition, and by who answers one that has none


class Watch(Protocol):
    """Who looks after replies that have begun: :class:`Flights`."""

    def watch(self, reply: Reply, timeout: float | None) -> None:
        """Ask the device for a moment."""

    def take_finished(self) -> None:
        """Answer what has finished."""

    def hurry(self) -> None:
        """Somebody is about to sleep until a reply is there."""


class _Waiters(list[Any]):
    """The list that ``wait`` and ``as_completed`` of concurrent.futures write themselves into before they sleep."""

    __slots__ = ("_watch",)

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def append(self, waiter: Any) -> None:
        """One more. Without this they would be told a millisecond later."""
        super().append(waiter)
        self._watch.hurry()


class Reply(Future[Output]):
    """A ``concurrent.futures.Future`` that can be awaited too. It resolves when the device is done, not when the kernel is queued.

    ``cancel()`` works until the request is launched. Callbacks run in a thread of the actor: they should be quick.

    The base class makes a condition for each future, which costs more than a launch. Few replies need one: what a future has is here, for
    the class, until somebody asks for the condition, and then nobody has been answered without it (``_making``).

    Args:
        watch: who looks after it once it has begun; None where somebody always does.
    """

    # Of the base class:
    _state: str = _PENDING
    _result: Output | None = None
    _exception: BaseException | None = None
    _waiters: Sequence[Any] = ()  # type: ignore[assignment]
    _done_callbacks: Sequence[Any] = ()
    # Ours:
    _made: Condition | None = None
    _begun = False
    _slept_for = False
    on_error: Callable[[BaseException], None] | None = None

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch

    @property
    def _condition(self) -> Condition:  # type: ignore[override]
        """Made by the first who waits, wants to be called, cancels, or is not alone with an outcome."""
        made = self._made
        if made is None:
            waiters: list[Any] = [] if self._watch is None else _Waiters(self._watch)
            callbacks: list[Any] = []
            condition = Condition()
            with _making:  # no call in here: neither a signal handler nor a finalizer of this thread comes between
                if self._made is None:
                    self._waiters = waiters
                    self._done_callbacks = callbacks
                    self._made = condition
                made = self._made
        return made

    def __await__(self) -> Generator[Any, None, Output]:
        return asyncio.wrap_future(self).__await__()

    def result(self, timeout: float | None = None) -> Output:
        """The answer; see concurrent.futures."""
        if self._state in _OPEN:
            self._before_sleep(timeout)
        if self._state == _FINISHED and self._exception is None:
            return self._result  # type: ignore[return-value]  # set before the state
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong; see concurrent.futures."""
        if self._state in _OPEN:
            self._before_sleep(timeout)
        return super().exception(timeout)

    def done(self) -> bool:
        """Whether there is an answer, an error or a cancel."""
        if self._begun and self._watch is not None and self._state in _OPEN:
            self._watch.take_finished()
        return self._state not in _OPEN

    def is_over(self) -> bool:
        """:meth:`done` as far as is known, without a question to the device."""
        return self._state not in _OPEN

    def add_done_callback(self, fn: Callable[[Future[Output]], object]) -> None:
        """See concurrent.futures."""
        super().add_done_callback(fn)
        if self._begun and self._watch is not None and self._state in _OPEN:
            self._watch.hurry()

    def _invoke_callbacks(self) -> None:
        """As the base class does; but not even a SystemExit of one callback ends an actor's thread, or keeps the next from being called."""
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException as error:
                if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                    raise  # the caller's own exit or Ctrl-C, in a cancel
                _log.exception("a callback of a Reply failed")

    def _before_sleep(self, timeout: float | None) -> None:
        """Look for the answer here, and call the completion thread where it is not there soon."""
        if self._watch is None:
            return
        if self._begun:
            self._watch.watch(self, timeout)
        if self._state in _OPEN:
            self._slept_for = True  # before the look at _begun: who launches sets that first and then asks is_wanted()
            if self._begun:
                self._watch.hurry()

    def is_wanted(self) -> bool:
        """Whether somebody sleeps until it is resolved, or is to be called then."""
        return self._slept_for or bool(self._waiters) or bool(self._done_callbacks)

    def begin(self) -> bool:
        """Called right before the launch; from then on it cannot be cancelled. False when it was cancelled or answered, or has begun."""
        with self._condition:  # reentrant, and shared with cancel() and set_exception(): the answer to "is it still wanted" stays true
            if self._begun:
                return False
            self._begun = True
            if self.cancelled():
                self._condition.notify_all()  # a Ctrl-C in the cancel may have come before
            return (self.cancelled() or self._state in _OPEN) and self.set_running_or_notify_cancel()

    def begin_unseen(self) -> None:
        """:meth:`begin` for a reply that no other thread knows of yet."""
        self._begun = True
        self._state = _RUNNING

    def answer(self, output: Output) -> None:
        """Resolve, unless a timeout or a stop came first, or a Ctrl-C after the first answer, and before those who sleep were woken."""
        try:
            self.set_result(output)
        except InvalidStateError:
            with self._condition:
                self._condition.notify_all()

    def answer_quietly(self, output: Output, settle: Callable[[Ticket], None], ticket: Ticket) -> bool:
        """:meth:`answer` after ``settle(ticket)``, for any thread; whether it was done.

        Not where there are callbacks, which are for the actor's threads, or waiters of concurrent.futures: a Ctrl-C between two of them
        would have the first told again.

        Where somebody comes meanwhile, ``settle`` is called again.
        """
        if self._made is None:
            settle(ticket)
            with _making:  # no call in here either
                if self._made is None:
                    if self._state in _OPEN:
                        self._result = output
                        self._state = _FINISHED
                    return True
        with self._condition:
            if self._done_callbacks or self._waiters:
                return False
            settle(ticket)
            self.answer(output)
        return True

    def fail(self, error: BaseException) -> None:
        """Fail, unless it is resolved or cancelled already. ``on_error`` is told of a failure that counts."""
        try:
            self.set_exception(error)
        except InvalidStateError:
            return
        if self.on_error is not None:
            self.on_error(error)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Ticket:
    """A request between ask and reply. It holds the job, and so the arrays, until it is settled.

    ``tried``: its launch in the caller's thread failed, and the actor's thread tries again.
    """

    job: Job
    reply: Reply = field(default_factory=Reply)
    tried: bool = False


def own_error(error: BaseException) -> BaseException:
    """A copy of ``error`` for one future: exceptions that several threads raise would share, and pile up, one traceback."""
    try:
        own = copy.copy(error)
    except Exception:  # noqa: BLE001 - exceptions of others may take any arguments
        return error
    own.__cause__ = error
    return own
