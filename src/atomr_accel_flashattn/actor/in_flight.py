"""InFlight: the queue of launches that the device has not finished, oldest first.

Any thread may find a launch finished, by asking its event, and then decides its reply: a caller in
``reply.result()``, for whom being woken would cost more than a small kernel takes, or whoever needs
the place of a finished launch. The completion thread does the rest: it waits in the driver for
those who sleep or want to be called, computes what can only be waited for, tells callbacks and
waiters, and answers with errors. When nobody needs it, it looks every 10 ms.

Why a thread that waits on events, and not a callback of the driver: a function given to
cuLaunchHostFunc is a piece of the stream, so the next kernel would stand still until Python gets
its interpreter lock; it may make no CUDA call; and it is never called once the context is lost,
which is when every future needs its answer most. Waiting is one foreign call without the
interpreter lock. A stream finishes its launches in order, so waiting for the oldest delays nobody.

Ctrl-C: a caller sets the outcome of a reply, then moves the launch. Where he is interrupted between
the two, the next one finds the launch again, and the reply keeps its first outcome.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final

from .inner import PendingLaunch
from .reply import Reply, Ticket

__all__ = ["InFlight"]

_LOOK_SECONDS: Final = 0.01  # how often the completion thread looks by itself
_IDLE_LOOKS: Final = 5  # after so many without a launch, the next has to wake it: 20 us or more
_SPIN_SECONDS: Final = 0.0005  # how long a waiter asks before it sleeps


class InFlight:
    """Launches in flight. The completion thread starts with this, and calls ``attach`` first.

    ``decide`` sets the outcome of a request whose launch went well, in any thread; what it raises
    is left to ``resolve``, which answers a request in the completion thread, given what waiting for
    its launch raised. ``launches`` are the tickets, for others to count. They keep the arrays
    alive.
    """

    def __init__(
        self,
        name: str,
        attach: Callable[[], None],
        decide: Callable[[Ticket], None],
        resolve: Callable[[Ticket, BaseException | None], None],
    ) -> None:
        self._attach = attach
        self._decide = decide
        self._resolve = resolve
        self.launches: deque[Ticket] = deque()
        self._lock = threading.RLock()  # held by whoever takes launches out
        self._decided: deque[Reply[Any]] = deque()  # for the completion thread to finish
        self._polling = False  # a hint: one waiter that polls is enough
        self._last = 0  # number of the newest launch
        self._wanted = 0  # the completion thread waits for launches up to this number
        self._wake_up: SimpleQueue[None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        self._needs_room = False
        self._resting = self._asleep = False  # the completion thread: for a moment, or until woken
        self._over = self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, ticket: Ticket, launch: PendingLaunch) -> None:
        """One more launch. Calls do not overlap: launches have an order."""
        self._last += 1
        ticket.launch, ticket.poll, ticket.number = launch, getattr(launch, "poll", None), self._last
        self.launches.append(ticket)
        if ticket.poll is None or ticket.reply.is_wanted:
            self.hurry()
        elif self._asleep:
            self._wake_up.put(None)

    def hurry(self) -> None:
        """Let the completion thread wait for all that are in flight now: somebody sleeps."""
        self._wanted = self._last
        if self._resting:
            self._wake_up.put(None)

    def finish_soon(self, reply: Reply[Any]) -> None:
        """Let the completion thread tell everybody of a reply's outcome."""
        self._decided.append(reply)
        if self._ended:  # after appending: either this or the thread's last look finds it
            self._finish_decided()
        elif self._resting:
            self._wake_up.put(None)

    def take_finished(self) -> None:
        """Decide what has finished, in any thread: one question for all, if the newest has."""
        with self._lock:
            if not self.launches:
                return
            newest = self.launches[-1]
            try:
                done = newest.number if newest.poll is not None and newest.poll() else 0
            except Exception:  # noqa: BLE001 - whoever asks for the oldest meets it again
                done = 0
            while self._take_first(done):
                pass

    def poll_until_over(self, reply: Reply[Any], timeout: float | None) -> None:
        """Ask the device for a moment, one waiter at a time; then it is better to sleep."""
        if self._polling:
            return
        self._polling = True
        try:
            until = time.perf_counter() + (_SPIN_SECONDS if timeout is None else min(timeout, _SPIN_SECONDS))
            while not reply.is_over() and time.perf_counter() < until and self.launches[0].poll is not None:
                with self._lock:
                    self._take_first()
        except IndexError:  # nothing is in flight
            pass
        finally:
            self._polling = False

    def wait_for_room(self, limit: int) -> None:
        """Sleep a moment while ``limit`` launches are in flight. In the actor's thread."""
        self._needs_room = True
        self.hurry()
        if len(self.launches) >= limit:  # after saying so
            _get(self._room, _LOOK_SECONDS)
        self._needs_room = False

    def finish(self, gave_up: Callable[[], bool]) -> None:
        """End after everything that was added. Waits for that until ``gave_up()``."""
        self._over = True
        self._wake_up.put(None)
        while self._thread.is_alive() and not gave_up():
            self._thread.join(_LOOK_SECONDS)

    def is_current(self) -> bool:
        """Whether the caller runs in the completion thread, as callbacks of replies do."""
        return threading.current_thread() is self._thread

    def _take_first(self, done: int = 0) -> bool:
        """Decide the oldest launch, if it has finished well. The caller holds the lock.

        Launches up to number ``done`` are known to have finished.
        """
        if not self.launches:
            return False
        first = self.launches[0]
        try:
            if first.poll is not None:
                if first.number > done and not first.poll():
                    return False
                self._decide(first)
                if first.reply.is_wanted:
                    self.finish_soon(first.reply)
                self._remove_first()
                return True
        except Exception:  # noqa: BLE001, S110 - the completion thread meets it again
            pass
        self.hurry()
        return False

    def _remove_first(self) -> None:
        self.launches.popleft()
        if self._needs_room:
            self._room.put(None)

    def _run(self) -> None:
        failed_to_attach = _raised_by(self._attach)
        idle = seen = 0
        while True:
            self._finish_decided()
            if self._wait_for_first(failed_to_attach):
                continue
            if self._over and not self.launches:
                self._ended = True
                self._finish_decided()
                return
            idle = 0 if self.launches or self._last != seen else idle + 1
            seen = self._last
            if not self._rest(asleep=idle > _IDLE_LOOKS):
                self.take_finished()

    def _finish_decided(self) -> None:
        while True:
            try:
                reply = self._decided.popleft()
            except IndexError:
                return
            reply.finish()

    def _first_wanted(self) -> Ticket | None:
        try:
            first = self.launches[0]
        except IndexError:
            return None
        return first if self._over or first.number <= self._wanted else None

    def _wait_for_first(self, failed_to_attach: BaseException | None) -> bool:
        """Wait for the oldest launch, if it is wanted, and answer it. No name outlives this."""
        first = self._first_wanted()
        if first is None or first.launch is None:
            return False
        error = failed_to_attach or _raised_by(first.launch.wait)
        with self._lock:
            if not self.launches or self.launches[0] is not first:
                return True  # a caller took it meanwhile
            self._remove_first()
        self._resolve(first, error)
        return True

    def _rest(self, *, asleep: bool) -> bool:
        """Sleep until woken, or for a moment. Whether it was woken."""
        self._asleep, self._resting = asleep, True
        # After saying so: who comes now wakes this thread.
        woken = self._over or bool(self._decided) or self._first_wanted() is not None or (asleep and bool(self.launches))
        woken = woken or _get(self._wake_up, None if asleep else _LOOK_SECONDS)
        self._asleep = self._resting = False
        while not self._wake_up.empty():  # all that they were put for is looked at next
            self._wake_up.get_nowait()
        return woken


def _get(queue: SimpleQueue[None], seconds: float | None) -> bool:
    try:
        queue.get(timeout=seconds)
    except Empty:
        return False
    return True


def _raised_by(call: Callable[[], None]) -> BaseException | None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - the answer to a request; this thread has to live
        return error
    return None
