"""Engine: from a ticket to its answer. Used by the threads of the actor and by callers.

Who launches. A launch that only repeats one of before takes less time than waking another thread:
the caller's thread makes it, provided that nobody waits, nobody launches, and there is a place. The
actor's thread makes all others. A caller holds the lock while he launches; the actor's thread takes
it to say that it works, and from then on callers go through the mailbox. So launches are made in
the order of the messages, and never more than ``max_in_flight`` are unfinished.

What can end a request, and who decides it: an answer (any thread that finds its launch finished),
an error of its launch (completion thread), an error before it or a stop (actor's thread), a timeout
(deadline thread), a cancel (the caller), a lost device (whoever sees it first). A reply lets only
the first of them through; the mailbox forgets the ticket once its outcome is certain.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ..errors import ActorStoppedError, DeviceLostError
from ..runtime.gradients import Gradients
from ..runtime.plan import Output
from .in_flight import InFlight
from .inner import FlashAttnInner
from .mailbox import Mailbox
from .props import FlashAttnProps
from .reply import Ticket, own_error

__all__ = ["Engine", "stopped_error"]

_PLACE_SECONDS: Final = 3e-5  # how long a launch asks for a place: what a hand-over costs
_MANY: Final = 256  # launches in flight: CUDA queues about 1024, and blocks who adds another


class Engine:
    """What an actor does with its messages.

    ``wake`` has :meth:`work` called in the actor's thread, and raises ActorStoppedError when that
    has ended. ``stop_actor`` ends the actor when the device is lost.
    """

    def __init__(self, props: FlashAttnProps, inner: FlashAttnInner, wake: Callable[[], None], stop_actor: Callable[[], object]) -> None:
        self._props = props
        self.inner = inner
        self.mailbox = Mailbox(props.label, props.mailbox_limit, wake)
        self._wake = wake
        self._stop_actor = stop_actor
        self._launching = threading.RLock()
        self._busy = False  # somebody launches; the lock is held to set it
        self._retries: deque[Ticket] = deque()  # failed in callers, older than all that wait
        self._refusing: Callable[[], BaseException] | None = None
        self._thread: threading.Thread | None = None
        self._gave_up = False
        self.in_flight = InFlight(f"{props.label}-completions", inner.attach, self._decide, self._resolve)

    def enter_thread(self) -> None:
        """Called first, in the actor's thread. If the inner cannot work in it, everything fails."""
        self._thread = threading.current_thread()
        try:
            self.inner.attach()
        except Exception as error:  # noqa: BLE001 - the answer to every request
            self._end_with(error, "it could not start")

    def is_own_thread(self) -> bool:
        """Whether the caller is one of the actor's two threads, as callbacks of replies are."""
        return threading.current_thread() is self._thread or self.in_flight.is_current()

    def work(self) -> None:
        """Launch everything that waits, in the actor's thread."""
        with self._launching:
            self._busy = True
        try:
            while (ticket := self._retries.popleft() if self._retries else self.mailbox.take()) is not None:
                self._launch(ticket)
        finally:
            self._busy = False  # who put a ticket into the mailbox meanwhile had this called again

    def launch_at_once(self, ticket: Ticket) -> bool:
        """Launch in the caller's thread, if that is quick and fair. Whether the ticket came in."""
        if not ticket.job.quick or not self.mailbox.is_empty or len(self.in_flight.launches) >= _MANY:
            return False
        with self._launching:
            if self._busy or self._retries:
                return False
            self._busy = True  # for a signal handler that sends, too
            try:
                if not (self._has_place() and self.mailbox.enter_begun(ticket)):
                    return False
                self.in_flight.add(ticket, self.inner.launch(ticket.job))
            except BaseException as error:
                self._retry(ticket)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._busy = False
        return True

    def _retry(self, ticket: Ticket) -> None:
        """Have the actor's thread launch again, and fail what fails.

        After a Ctrl-C it may be in flight already: the second launch writes the same, and keeps the
        arrays until both are done.
        """
        ticket.tried = True
        self._retries.append(ticket)
        with contextlib.suppress(ActorStoppedError):  # the end of the actor finds it, too
            self._wake()

    def _has_place(self) -> bool:
        """Whether one more launch may be made, perhaps in the place of one that just finishes."""
        launches, limit = self.in_flight.launches, self._props.max_in_flight
        if len(launches) < limit:
            return True
        until = time.perf_counter() + _PLACE_SECONDS
        while True:
            self.in_flight.take_finished()
            if len(launches) < limit:
                return True
            if time.perf_counter() >= until:
                return False

    def _launch(self, ticket: Ticket) -> None:
        """Launch as soon as there is a place, in the actor's thread; or settle the ticket."""
        while not (self._has_place() or self._gave_up):
            self.in_flight.wait_for_room(self._props.max_in_flight)
        error = self._refusing() if self._refusing else ticket.job.refusal or _staleness(ticket)
        if error is None and (not ticket.reply.is_over() if ticket.tried else ticket.reply.begin()):
            try:
                self.in_flight.add(ticket, self.inner.launch(ticket.job))
            except DeviceLostError as lost:
                self.lose_device(lost)
            except BaseException as failed:  # noqa: BLE001 - this request's answer
                self._answer(ticket, failed)
        else:
            self._answer(ticket, error)

    def _decide(self, ticket: Ticket) -> None:
        """The launch went well: set the outcome, in any thread. Raises if an array changed."""
        job = ticket.job
        job.fingerprint.check()
        output = job.answer()
        self.mailbox.settle(ticket)
        ticket.reply.decide(output)

    def _resolve(self, ticket: Ticket, error: BaseException | None) -> None:
        """The device is done with a launch. In the completion thread."""
        if isinstance(error, DeviceLostError):
            self.lose_device(error)
        error = error or _staleness(ticket)
        self._answer(ticket, ticket.job.answer() if error is None else error)

    def _answer(self, ticket: Ticket, outcome: Output | Gradients | BaseException | None) -> None:
        self.mailbox.settle(ticket)
        if outcome is not None:  # else it was cancelled, or its time is over
            ticket.reply.resolve(outcome)

    def lose_device(self, cause: DeviceLostError) -> None:
        """Nothing works any more: everything fails with ``cause``, and the actor stops."""
        self._end_with(cause, "its device was lost, and only a new process can use it again")

    def _end_with(self, cause: Exception, why: str) -> None:
        label = self._props.label

        def stopped() -> ActorStoppedError:
            error = ActorStoppedError(f"{label}: the actor has stopped, because {why}: {cause}")
            error.__cause__ = cause
            return error

        self.mailbox.close(stopped)
        self._refusing = lambda: own_error(cause)
        self.fail_unsettled(self._refusing)
        self._stop_actor()

    def refuse(self, why: Callable[[], ActorStoppedError]) -> None:
        """Let nobody in and launch nothing any more; what is in flight still gets its answer."""
        self.mailbox.close(why)
        self._refusing = self._refusing or why

    def fail_unsettled(self, error: Callable[[], BaseException]) -> None:
        """Fail all that has no answer yet. Arrays in flight live until the device is done."""
        for ticket in self.mailbox.all_unsettled():
            self._answer(ticket, error())

    def give_up(self, why: Callable[[], ActorStoppedError]) -> None:
        """Fail everything, and wait for the device no more. The actor's thread notices soon."""
        self.refuse(why)
        self.fail_unsettled(why)
        self._gave_up = True

    def shut_down(self) -> None:
        """End, in the actor's thread: answer what is left, wait for what is in flight."""
        self.mailbox.close(lambda: stopped_error(self._props.label))
        self.work()
        self.in_flight.finish(lambda: self._gave_up)
        self.fail_unsettled(lambda: stopped_error(self._props.label))
        if not self._gave_up:
            self.inner.close()


def _staleness(ticket: Ticket) -> BaseException | None:
    try:
        ticket.job.fingerprint.check()
    except BaseException as error:  # noqa: BLE001 - this request's answer, whatever it is
        return error
    return None


def stopped_error(label: str) -> ActorStoppedError:
    """The error of a request that came too late."""
    return ActorStoppedError(f"{label}: the actor has stopped, and the request was not launched; start a new actor")
