"""Mailbox: who may come in, who waits for a place, and who is still without an answer.

Places are counted here, not in the inbox of the actor's thread, so that a stop always gets in; and every request that came in is
remembered until it is settled, so that none is lost, whatever ends the actor. How many are inside is how many lie here, so a Ctrl-C leaves
no wrong count behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from ..errors import ActorStoppedError, MailboxFullError
from .locks import Condition
from .reply import Ticket

__all__ = ["Mailbox"]


class _Place(Future[None]):
    """A place that somebody queues for. Not even a Ctrl-C in his wait keeps the actor from giving it to him."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = Condition()


class Mailbox:
    """Thread-safe. A request that finds no place queues for one, first come, first served.

    Args:
        label: what errors call the actor.
        limit: places.
        call: tells the actor that a ticket waits; called under the lock, so that a stop, which closes first, comes last. Raises
            ActorStoppedError when nobody will come.
    """

    def __init__(self, label: str, limit: int, call: Callable[[], None]) -> None:
        self._label = label
        self._limit = limit
        self._call = call
        self._lock = threading.RLock()  # a signal handler may send in the middle of a send
        self._inside: deque[Ticket] = deque()
        self._outside: deque[tuple[Ticket, Future[None]]] = deque()
        self._unsettled: set[Ticket] = set()
        self._closed: Callable[[], ActorStoppedError] | None = None

    def enter(self, ticket: Ticket, *, wait: bool) -> Future[None] | None:
        """Put a ticket into the mailbox.

        Args:
            ticket: one that has not been here.
            wait: whether to queue when there is no place.

        Returns:
            None when it is in; else a future that resolves when it is, and that may be cancelled before.

        Raises:
            ActorStoppedError: closed.
            MailboxFullError: no place, and not ``wait``.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed()
            if len(self._inside) < self._limit and not self._outside:
                self._admit(ticket)
                return None
            if not wait:
                raise MailboxFullError(
                    f"{self._label}: {len(self._inside)} requests wait in a mailbox of {self._limit}; "
                    "send later, raise mailbox_limit, or wait for a place with Overflow.WAIT"
                )
            place = _Place()
            self._outside.append((ticket, place))
            return place

    def enter_begun(self, ticket: Ticket) -> bool:
        """Let a ticket in that is launched at once and waits nowhere, unless others wait; whether it is in, and has begun.

        Raises:
            ActorStoppedError: closed.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed()
            if self._inside or self._outside:
                return False
            ticket.reply.begin_unseen()
            self._unsettled.add(ticket)
            return True

    def _admit(self, ticket: Ticket) -> None:
        try:
            self._inside.append(ticket)
            self._unsettled.add(ticket)
            self._call()
        except BaseException:  # stopped, or a Ctrl-C: nobody gets its reply
            if ticket in self._inside:
                self._inside.remove(ticket)
            self._unsettled.discard(ticket)
            raise

    def take(self) -> Ticket | None:
        """Take out the oldest, for the actor, who calls this in one thread at a time; its place goes to who waited longest."""
        granted = None
        with self._lock:
            if not self._inside:
                return None
            ticket = self._inside.popleft()
            while self._outside and granted is None:
                next_one, place = self._outside.popleft()
                if place.set_running_or_notify_cancel():
                    self._admit(next_one)
                    granted = place
        if granted is not None:
            granted.set_result(None)
        return ticket

    def withdraw(self, place: Future[None]) -> bool:
        """Nobody queues for ``place`` any more; whether it was in time. Its ticket, and so its arrays, are not kept."""
        with self._lock:
            if not place.cancel():
                return False
            self._outside = deque(each for each in self._outside if each[1] is not place)
            return True

    def settle(self, ticket: Ticket) -> None:
        """A ticket has been answered."""
        with self._lock:
            self._unsettled.discard(ticket)

    def close(self, why: Callable[[], ActorStoppedError]) -> None:
        """Let nobody in any more; who waits outside gets ``why()``, as does everybody who comes later. The first reason stays."""
        with self._lock:
            self._closed = self._closed or why
            outside = list(self._outside)
            self._outside.clear()
        for _, place in outside:
            if place.set_running_or_notify_cancel():
                place.set_exception(why())

    def check_open(self) -> None:
        """Raise what :meth:`close` was given, if it was called."""
        if self._closed is not None:
            raise self._closed()

    def all_unsettled(self) -> list[Ticket]:
        """Every ticket without an answer, for the caller to fail and to :meth:`settle`."""
        with self._lock:
            return list(self._unsettled)

    @property
    def inside(self) -> int:
        """Requests that have a place and were not taken yet."""
        return len(self._inside)

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits, as far as can be said without the lock."""
        return not (self._inside or self._outside)

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._closed is not None

    @property
    def waiting(self) -> int:
        """Requests that the actor has not taken yet, those that queue for a place among them."""
        with self._lock:
            return len(self._inside) + len(self._outside)

    @property
    def unsettled(self) -> int:
        """Requests that came in and have no answer yet."""
        with self._lock:
            return len(self._unsettled)
