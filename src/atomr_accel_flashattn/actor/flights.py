"""Flights: launches that the device has not finished, oldest first, and who waits for them.

Any thread may find a launch finished, by asking its event, and then answers its request: the caller in ``reply.result()``, for whom
being woken by another thread would cost more than a small kernel takes, or whoever needs the place of a finished launch for the next one.
The completion thread does the rest. It is called where somebody wants to be told (a callback, an event loop, ``concurrent.futures.wait``,
a waiter whose launch takes long) and where a launch can only be waited for; otherwise it looks every 10 ms, and takes what nobody took
by then. It alone blocks in the driver, runs callbacks, and settles what failed.

Why a thread that waits on events, and not a callback of the driver: a function given to cuLaunchHostFunc is a piece of the stream, so the
next kernel would stand still until Python gets its interpreter lock (up to 5 ms on a busy process); it may make no CUDA call; and it
is never called once the context is lost, which is when every future needs its answer most. Waiting is one foreign call without the lock.
A stream finishes its launches in order, so waiting for the oldest delays nobody; a device that does not would only answer later.

Whoever takes a launch out holds a lock, so each is settled once. Only a Ctrl-C between settling and taking out has one settled again, which
changes nothing: a reply keeps its first answer, and how many launches may still be made follows from how many are here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Final

from .inner import Flight
from .locks import run_if_free
from .reply import Reply, Ticket

__all__ = ["Flights", "Launched"]

_NAP_SECONDS: Final = 0.01  # how long a launch that nobody asks for may lie finished, at most twice; waking up costs callers 20 us or more
_IDLE_NAPS: Final = 5  # after so many without a launch, the next launch has to wake the completion thread
_SPIN_SECONDS: Final = 0.0005  # how long a waiter asks for its launch before it sleeps: several times what waking it costs


class _Found(Enum):
    """What became of the oldest launch: answered; still flying, or none there; to be left to the completion thread."""

    ANSWERED = 0
    FLYING = 1
    LEFT = 2


@dataclass(slots=True, eq=False)
class Launched:
    """One launch and the requests that it answers. It keeps their arrays alive until the device is done.

    ``poll``: that of the flight, None where it has none. ``number`` counts launches.
    """

    tickets: Sequence[Ticket]
    flight: Flight
    poll: Callable[[], bool] | None
    number: int


class Flights:
    """Launches in flight. The completion thread starts when this is made.

    Args:
        name: of the completion thread.
        attach: called in it first.
        settle: answers the requests of a launch, given what waiting for it raised, or None. It must not raise. In the completion thread.
        settle_quietly: the same for a launch of one request that went well, in any thread, unless that would run callbacks; whether it did.

    Attributes:
        flying: the launches in flight, the oldest first; for others to count.
    """

    def __init__(
        self,
        name: str,
        attach: Callable[[], None],
        settle: Callable[[Launched, BaseException | None], None],
        settle_quietly: Callable[[Launched], bool],
    ) -> None:
        self._attach = attach
        self._settle = settle
        self._settle_quietly = settle_quietly
        self.flying: deque[Launched] = deque()
        self._taking = threading.RLock()  # held by whoever takes launches out
        self._room_bell: SimpleQueue[None] | None = None  # of who sleeps until one is taken out
        self._last = 0  # number of the newest launch
        self._wanted = 0  # the completion thread is to wait for launches up to this number, says who hurries it
        self._left = 0  # and up to this one, because nobody took them while it napped
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._naps = self._sleeps = False  # the completion thread's: for a moment, or until it is called
        self._over = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, tickets: Sequence[Ticket], flight: Flight) -> None:
        """One more launch. Calls do not overlap: launches have an order."""
        poll = getattr(flight, "poll", None)
        self._last += 1
        self.flying.append(Launched(tickets, flight, poll, self._last))
        if poll is None or len(tickets) > 1 or tickets[0].reply.is_wanted():
            self.hurry()
        elif self._sleeps:
            self._ring()

    def hurry(self) -> None:
        """Somebody sleeps until one of the launches is done: let the completion thread wait for all that are in flight now."""
        self._wanted = self._last
        if self._naps or self._sleeps:
            self._ring()

    def take_finished(self) -> None:
        """Answer what has finished, in any thread, without waiting for anything."""
        if self.flying:
            run_if_free(self._taking, self._take_while_answered)

    def _take_while_answered(self) -> None:
        """One question for all, if the newest is finished; else one for each."""
        newest = self.flying[-1] if len(self.flying) > 1 else None
        done = newest.number if newest is not None and newest.poll is not None and _is_true(newest.poll) else 0
        while self._take_first(done) is _Found.ANSWERED:
            pass

    def watch(self, reply: Reply, timeout: float | None) -> None:
        """Ask the device for a moment whether a launch is done, one waiter at a time. Returns when it is, or is better slept for."""
        run_if_free(self._taking, self._spin, reply, _SPIN_SECONDS if timeout is None else min(timeout, _SPIN_SECONDS))

    def _spin(self, reply: Reply, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while self.flying and self._take_first() is not _Found.LEFT and not reply.is_over() and time.perf_counter() < until:
            pass

    def wait_for_room(self, limit: int) -> None:
        """Sleep while ``limit`` launches are in flight, but for a moment only: a Ctrl-C may keep who takes one out from ringing."""
        bell: SimpleQueue[None] = SimpleQueue()
        self._room_bell = bell
        self.hurry()
        if len(self.flying) >= limit:  # after saying so: who takes one out from now on rings
            with contextlib.suppress(Empty):
                bell.get(timeout=_NAP_SECONDS)
        self._room_bell = None

    def finish(self, gave_up: Callable[[], bool]) -> None:
        """End after everything that was added. Waits for that until ``gave_up()``."""
        self._over = True
        self._ring()
        while self._thread.is_alive() and not gave_up():
            self._thread.join(_NAP_SECONDS)

    def is_current(self) -> bool:
        """Whether the caller runs in the completion thread, as callbacks of futures do."""
        return threading.current_thread() is self._thread

    def _first(self) -> Launched | None:
        try:
            return self.flying[0]
        except IndexError:
            return None

    def _take_first(self, done: int = 0) -> _Found:
        """Answer the oldest launch if it is done and that is for any thread to do. The caller holds the lock.

        Those up to number ``done`` are known to be.
        """
        if not self.flying:
            return _Found.FLYING
        first = self.flying[0]
        poll = first.poll
        try:
            if poll is not None and first.number > done and not poll():
                return _Found.FLYING
            left = poll is None or len(first.tickets) > 1 or not self._settle_quietly(first)
        except Exception:  # noqa: BLE001 - the completion thread meets it again, as this launch's answer
            left = True
        if left:
            self.hurry()
            return _Found.LEFT
        self._remove_first()
        return _Found.ANSWERED

    def _remove_first(self) -> None:
        self.flying.popleft()
        bell = self._room_bell
        if bell is not None:
            bell.put(None)

    def _run(self) -> None:
        failed_to_attach = _outcome(self._attach)
        idle = seen = 0
        while self.flying or not self._over:
            if self._take_wanted(failed_to_attach):
                continue
            idle = 0 if self.flying or self._last != seen else idle + 1
            seen = self._last
            if not self._rest(_NAP_SECONDS if idle < _IDLE_NAPS else None):
                self._left = seen  # what was there before the nap

    def _is_wanted(self) -> bool:
        first = self._first()
        return first is not None and (self._over or first.number <= max(self._wanted, self._left))

    def _take_wanted(self, failed_to_attach: BaseException | None) -> bool:
        """Wait for the oldest launch, if it is wanted, and settle it. Its arrays do not live until the next one: no name outlives this."""
        if not self._is_wanted():
            return False
        with self._taking:
            first = self._first()
            if first is None or not self._is_wanted():
                return False
            error = failed_to_attach or _outcome(first.flight.wait)
            self._remove_first()
        self._settle(first, error)
        return True

    def _rest(self, seconds: float | None) -> bool:
        """Sleep until called, or until ``seconds`` are over. Whether it was called."""
        self._naps, self._sleeps = seconds is not None, seconds is None
        called = self._over or self._is_wanted() or (self._sleeps and bool(self.flying))  # after saying so: who comes now calls
        if not called:
            try:
                self._bell.get(timeout=seconds)
                called = True
            except Empty:
                pass
        self._naps = self._sleeps = False
        return called

    def _ring(self) -> None:
        self._naps = self._sleeps = False
        self._bell.put(None)


def _is_true(poll: Callable[[], bool]) -> bool:
    try:
        return poll()
    except Exception:  # noqa: BLE001 - the oldest launch is asked next, and whoever has to answer for it finds this again
        return False


def _outcome(call: Callable[[], None]) -> BaseException | None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - it is the answer to somebody's request, and this thread has to live
        return error
    return None
