"""Mailbox: who may come in, who waits for a place, and who is still without an answer.

The messages themselves lie with whoever launches them. Places are counted here, so that a stop always gets in; and every
request that came in is remembered here until it is settled, so that none is lost, whatever ends the actor.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from ..errors import ActorStoppedError, MailboxFullError
from .reply import Ticket

__all__ = ["Mailbox"]


class Mailbox:
    """Thread-safe. A request that finds no place queues for one, first come, first served.

    Args:
        label: what errors call the actor.
        limit: places.
        post: takes a ticket that is to wait; called under the lock, so that a stop, which closes first, comes last.
    """

    def __init__(self, label: str, limit: int, post: Callable[[Ticket], None]) -> None:
        self._label = label
        self._limit = limit
        self._post = post
        self._lock = threading.Lock()
        self._inside = 0
        self._outside: deque[tuple[Ticket, Future[None]]] = deque()
        self._unsettled: set[Ticket] = set()
        self._closed: Callable[[], ActorStoppedError] | None = None

    def enter(self, ticket: Ticket, *, wait: bool) -> Future[None] | None:
        """Post a ticket.

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
            if self._inside < self._limit and not self._outside:
                self._admit(ticket)
                return None
            if not wait:
                raise MailboxFullError(
                    f"{self._label}: {self._inside} requests wait in a mailbox of {self._limit}; "
                    "send later, raise mailbox_limit, or wait for a place with Overflow.WAIT"
                )
            place: Future[None] = Future()
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
        self._post(ticket)
        self._inside += 1
        self._unsettled.add(ticket)

    def leave(self) -> int:
        """The actor has taken a ticket out: its place goes to who waited longest. Returns how many are still inside."""
        granted = None
        with self._lock:
            self._inside -= 1
            while self._outside and granted is None:
                ticket, place = self._outside.popleft()
                if place.set_running_or_notify_cancel():
                    self._admit(ticket)
                    granted = place
            inside = self._inside
        if granted is not None:
            granted.set_result(None)
        return inside

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

    def take_unsettled(self) -> list[Ticket]:
        """Every ticket without an answer, for the caller to fail."""
        with self._lock:
            tickets = list(self._unsettled)
            self._unsettled.clear()
        return tickets

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
            return self._inside + len(self._outside)

    @property
    def unsettled(self) -> int:
        """Requests that came in and have no answer yet."""
        with self._lock:
            return len(self._unsettled)
