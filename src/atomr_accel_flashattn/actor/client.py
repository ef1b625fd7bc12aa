"""Client: how requests come in, to one actor or a pool, from any thread and any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from ..errors import ActorStoppedError, PropsError, UnknownMessageError
from .deadlines import Deadlines, timed_out
from .mailbox import Mailbox
from .messages import Answer, FlashAttnMsg, Message
from .props import FlashAttnProps, Overflow
from .reply import Reply, Ticket

__all__ = ["Client"]

_log = logging.getLogger(__name__)
_MESSAGES = (FlashAttnMsg.Forward, FlashAttnMsg.Backward, FlashAttnMsg.PagedForward)


class Client(ABC):
    """What callers hold. Thread-safe; stops what is behind it at the end of a ``with`` block.

    What is not accepted raises, here and now; what is accepted is answered once, through its Reply.

    Attributes:
        props: what was started.
    """

    def __init__(self, props: FlashAttnProps, mailbox: Mailbox, at_once: Callable[[Ticket], bool] | None = None) -> None:
        """``at_once`` lets a ticket in that takes no place, and says so. None: all take one."""
        self.props = props
        self._mailbox = mailbox
        self._at_once = at_once
        self._waits = props.overflow is Overflow.WAIT
        self._deadlines = Deadlines(props.label)
        self._process = os.getpid()
        self._stops: set[threading.Thread] = set()

    @abstractmethod
    def _accept(self, message: Message[Any]) -> Ticket:
        """Look a message over and make its ticket; raises what makes it unacceptable."""

    @abstractmethod
    def _close(self, *, drain: bool) -> None:
        """Let nothing in any more, and fail what waits unless ``drain``. Does not wait."""

    @abstractmethod
    def _end(self, timeout: float | None) -> None:
        """Wait for the answers, ``timeout`` seconds at most, fail what has none, and end."""

    async def _ticket_async(self, message: Message[Any], timeout: float | None) -> Ticket:  # noqa: ASYNC109 - checked, not waited for
        return self._ticket(message, timeout)

    def _is_own_thread(self) -> bool:
        """Whether callbacks of replies run in the caller's thread: it must not wait for others."""
        return self._deadlines.is_current() or threading.current_thread() in self._stops

    def ask(self, message: Message[Answer], *, timeout: float | None = None, overflow: Overflow | None = None) -> Reply[Answer]:
        """Send a request.

        Args:
            message: a FlashAttnMsg.
            timeout: seconds from now in which it has to be answered, the wait for a place included;
                None is no limit.
            overflow: what happens when the mailbox is full; None is as the props say. A thread that
                must not wait (one that runs an event loop, or one of the actor's own, as callbacks
                do) is refused instead.

        Returns:
            the Reply: a concurrent.futures.Future that can be awaited, of an Output for a Forward,
                of Gradients for a Backward. It fails with what went wrong with this request.

        Raises:
            UnknownMessageError: no FlashAttnMsg, or one with a request of another kind.
            DeviceMismatchError: a request for another device.
            StaleArrayError: an array was resized since the request was made.
            OutputError: outputs in q's library cannot be made; give ``out``.
            PropsError: a timeout or an overflow that is none.
            ActorStoppedError: the actor has stopped, or is about to.
            MailboxFullError: no place, and not to wait for one.
            RequestTimeoutError: no place in time.
        """
        began = 0.0 if timeout is None else time.monotonic()
        ticket = self._ticket(message, timeout)
        waits = self._waits if overflow is None else _is_wait(overflow)
        in_event_loop = asyncio._get_running_loop() is not None  # noqa: SLF001 - the public call raises where there is none
        if in_event_loop or self._at_once is None or not self._at_once(ticket):
            told: SimpleQueue[ActorStoppedError | None] = SimpleQueue()
            if not self._mailbox.enter(ticket, told.put if waits and not in_event_loop and not self._is_own_thread() else None):
                self._wait_for_place(ticket, told, timeout, began)
        if timeout is not None:
            self._deadlines.add(ticket, timeout, began)
        return ticket.reply

    def _wait_for_place(self, ticket: Ticket, told: SimpleQueue[ActorStoppedError | None], timeout: float | None, began: float) -> None:
        try:
            error = told.get(timeout=None if timeout is None else max(0.0, began + timeout - time.monotonic()))
        except Empty:
            if self._mailbox.withdraw(ticket):
                raise timed_out(self.props.label, timeout or 0.0, "no place in the mailbox") from None
            error = told.get()  # it came at the last moment, or the actor stopped
        except KeyboardInterrupt:
            self._mailbox.withdraw(ticket)
            raise
        if error is not None:
            raise error

    def tell(self, message: Message[Any], *, timeout: float | None = None, overflow: Overflow | None = None) -> None:
        """Send a request whose answer lies in its ``out``, or in its ``dq``, ``dk`` and ``dv``.

        What goes wrong later is logged.

        Arguments and errors: :meth:`ask`.
        """
        self.ask(message, timeout=timeout, overflow=overflow).listen(self._log_failure)

    async def ask_async(
        self,
        message: Message[Answer],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - of the request
        overflow: Overflow | None = None,
    ) -> Answer:
        """Send a request and await its answer; a full mailbox is awaited too.

        Cancelling the task cancels the request until its launch. Arguments and errors: :meth:`ask`,
        and those of the request itself.
        """
        began = time.monotonic()
        ticket = await self._ticket_async(message, timeout)
        waits = self._waits if overflow is None else _is_wait(overflow)
        loop = asyncio.get_running_loop()
        place: asyncio.Future[ActorStoppedError | None] = loop.create_future()

        def resolve(error: ActorStoppedError | None) -> None:
            if not place.done():
                place.set_result(error)

        def told(error: ActorStoppedError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(resolve, error)

        if not self._mailbox.enter(ticket, told if waits else None):
            left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
            try:
                error = await asyncio.wait_for(place, left)
            except (TimeoutError, asyncio.CancelledError) as given_up:
                self._mailbox.withdraw(ticket)
                ticket.reply.cancel()  # it may have been let in meanwhile
                if isinstance(given_up, TimeoutError):
                    raise timed_out(self.props.label, timeout or 0.0, "no place in the mailbox") from None
                raise
            if error is not None:
                raise error
        if timeout is not None:
            self._deadlines.add(ticket, timeout, began)
        answer: Answer = await ticket.reply
        return answer

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Let nothing in any more, answer what is there, and end. Another call may make haste.

        Returns when everything is answered; at once when called by a callback of a Reply, whose
        thread has others to answer. A Ctrl-C ends the caller's wait, and the stop goes on in a
        thread of its own.

        Args:
            drain: whether requests that wait are still launched; else they fail with
                ActorStoppedError. Launches in flight are answered either way.
            timeout: seconds after which everything without an answer fails with ActorStoppedError,
                in flight or not; None is no limit.
        """
        if self._is_in_fork():
            return  # the parent's to stop
        over: SimpleQueue[BaseException | None] = SimpleQueue()
        is_own = self._is_own_thread()
        if is_own:
            self._close(drain=drain)

        def stop() -> None:
            error = None
            try:
                if not is_own:
                    self._close(drain=drain)
                self._end(timeout)
            except BaseException as failed:  # noqa: BLE001 - the caller's, where he waits
                error = failed
                if is_own:
                    _log.exception("%s: the stop failed", self.props.label)
            self._stops.discard(threading.current_thread())
            over.put(error)

        thread = threading.Thread(target=stop, name=f"{self.props.label}-stop", daemon=True)
        self._stops.add(thread)
        thread.start()
        if not is_own and (error := over.get()) is not None:
            raise error

    async def stop_async(self, *, drain: bool = True, timeout: float | None = None) -> None:  # noqa: ASYNC109 - of the stop
        """:meth:`stop` for event loops."""
        await asyncio.to_thread(self.stop, drain=drain, timeout=timeout)

    @property
    def is_alive(self) -> bool:
        """Whether requests are let in."""
        return not (self._is_in_fork() or self._mailbox.closed)

    @property
    def waiting(self) -> int:
        """Requests that have not been taken for launch yet."""
        return self._mailbox.waiting

    @property
    def unanswered(self) -> int:
        """Requests that were accepted and have no answer yet, waiting or in flight."""
        return self._mailbox.unsettled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop(drain=kind is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop_async(drain=kind is None)

    def _ticket(self, message: Message[Any], timeout: float | None) -> Ticket:
        if not isinstance(message, _MESSAGES):
            raise UnknownMessageError(
                f"message: got {type(message).__qualname__}; allowed are FlashAttnMsg.Forward, .Backward and .PagedForward; "
                "wrap a request as FlashAttnMsg.Forward(request), a backward one as FlashAttnMsg.Backward(request)"
            )
        given: Any = timeout
        if given is not None and not (isinstance(given, int | float) and given > 0):
            raise PropsError(f"timeout: got {timeout!r}; allowed is an int or float of seconds > 0, or None for no limit")
        if self._is_in_fork():
            raise ActorStoppedError(
                f"{self.props.label}: this process was forked, and the actor's threads are in its parent; start an actor here"
            )
        self._mailbox.check_open()
        return self._accept(message)

    def _is_in_fork(self) -> bool:
        """Whether this is a forked child of the process that started the actor: its threads are not here, its locks may be taken."""
        return os.getpid() != self._process

    def _log_failure(self, reply: Future[Any]) -> None:
        error = reply.exception()
        if error is not None:
            _log.error("%s: a request that was told failed: %s", self.props.label, error, exc_info=error)


def _is_wait(overflow: Overflow) -> bool:
    given: Any = overflow
    if not isinstance(given, Overflow):
        raise PropsError(f"overflow: got {overflow!r}; allowed are Overflow.WAIT, Overflow.REFUSE, and None for that of the props")
    return overflow is Overflow.WAIT
