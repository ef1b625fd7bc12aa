"""Mailbox: who may come in, who waits for a place, and who is still without an answer.

Places are counted here, not in the inbox of the actor's thread, so that a stop always gets in.
Every request that came in is remembered until it is settled, so that none is lost, whatever ends
the actor. A count is the length of what lies here, so a Ctrl-C leaves no wrong count behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from ..errors import ActorStoppedError, MailboxFullError
from .reply import Ticket

__all__ = ["Mailbox", "Told"]

Told: TypeAlias = Callable[[ActorStoppedError | None], None]
"""Called once, in a thread of the actor: None, there is a place; else why there will be none."""


class Mailbox:
    """Thread-safe. A request that finds no place queues for one, first come, first served.

    ``wake`` tells the actor that a ticket waits. It is called under the lock, so that a stop, which
    closes first, comes last; it raises ActorStoppedError when nobody will come.
    """

    def __init__(self, label: str, limit: int, wake: Callable[[], None]) -> None:
        self._label = label
        self._limit = limit
        self._wake = wake
        self._lock = threading.RLock()  # a signal handler may send in the middle of a send
        self._inside: deque[Ticket] = deque()
        self._outside: deque[tuple[Ticket, Told]] = deque()
        self._unsettled: set[Ticket] = set()
        self._closed: Callable[[], ActorStoppedError] | None = None

    def enter(self, ticket: Ticket, told: Told | None) -> bool:
        """Let a ticket in. False: it queues, and ``told`` is called; None for that: do not queue.

        Raises:
            ActorStoppedError: closed.
            MailboxFullError: no place, and not to queue.
        """
        with self._lock:
            self.check_open()
            if len(self._inside) < self._limit and not self._outside:
                self._admit(ticket)
                return True
            if told is None:
                raise MailboxFullError(
                    f"{self._label}: {len(self._inside)} requests wait in a mailbox of {self._limit}; "
                    "send later, raise mailbox_limit, or wait for a place with Overflow.WAIT"
                )
            self._outside.append((ticket, told))
            return False

    def enter_begun(self, ticket: Ticket) -> bool:
        """Let a ticket in that takes no place, and begin it. False: others wait, or closed."""
        with self._lock:
            if self._inside or self._outside or self._closed is not None:
                return False
            self._unsettled.add(ticket)
            ticket.reply.begun = True  # nobody else has the reply yet
            return True

    def _admit(self, ticket: Ticket) -> None:
        try:
            self._inside.append(ticket)
            self._unsettled.add(ticket)
            self._wake()
        except BaseException:  # stopped, or a Ctrl-C: nobody gets its reply
            if ticket in self._inside:
                self._inside.remove(ticket)
            self._unsettled.discard(ticket)
            raise

    def take(self) -> Ticket | None:
        """Take out the oldest; its place goes to who waited longest. In the actor's thread."""
        with self._lock:
            if not self._inside:
                return None
            ticket = self._inside.popleft()
            granted = self._outside.popleft() if self._outside else None
            if granted is not None:
                self._admit(granted[0])
        if granted is not None:
            granted[1](None)
        return ticket

    def withdraw(self, ticket: Ticket) -> bool:
        """A ticket does not queue any more; whether it was in time. Its arrays are not kept."""
        with self._lock:
            left = deque(each for each in self._outside if each[0] is not ticket)
            was_outside = len(left) < len(self._outside)
            self._outside = left
            return was_outside

    def settle(self, ticket: Ticket) -> None:
        """A ticket has been answered."""
        self._unsettled.discard(ticket)  # one call of C, as the copy in all_unsettled() is

    def close(self, why: Callable[[], ActorStoppedError]) -> None:
        """Let nobody in any more: they get ``why()``, now and later. The first reason stays."""
        with self._lock:
            self._closed = self._closed or why
            outside = list(self._outside)
            self._outside.clear()
        for _, told in outside:
            told(why())

    def check_open(self) -> None:
        """Raise what :meth:`close` was given, if it was called."""
        if self._closed is not None:
            raise self._closed()

    def all_unsettled(self) -> list[Ticket]:
        """Every ticket without an answer, for the caller to fail and to :meth:`settle`."""
        return list(self._unsettled)

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
        """Requests that were not taken yet, those that queue for a place among them."""
        with self._lock:
            return len(self._inside) + len(self._outside)

    @property
    def unsettled(self) -> int:
        """Requests that came in and have no answer yet."""
        return len(self._unsettled)
