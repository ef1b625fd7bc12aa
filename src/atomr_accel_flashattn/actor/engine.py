"""Engine: from a ticket to its answer. Used by the actor's thread, the completion thread, and by callers for what takes no time.

Who launches. What needs a compiler or a place that is not free waits, and the actor's thread launches it. A launch that only repeats one
of before takes less time than waking that thread: the caller's thread makes it, provided that nobody waits and nobody launches. One lock
is held by whoever launches, so the order and the number of launches in flight are the same either way.

What can end a request, and who settles it: an answer (any thread that finds its launch finished), an error of its launch (completion
thread), an error before it or a stop (actor thread), a timeout (deadline thread), a cancel (the caller), a lost device (whoever sees it
first). The future itself lets only the first of them through; the mailbox forgets the ticket once its outcome is certain.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ..errors import ActorStoppedError, DeviceLostError
from ..runtime.plan import Output
from .flights import Flights, Launched
from .fusion import MAX_FUSED
from .inner import FlashAttnInner
from .locks import run_if_free
from .mailbox import Mailbox
from .messages import refusal
from .props import FlashAttnProps
from .reply import Ticket, own_error

__all__ = ["Engine"]

_PATIENCE: Final = 3e-5  # seconds that a launch waits for a place where it is: about what it costs to hand it to another thread

_MANY: Final = 256  # launches in flight: CUDA queues about 1024 kernels, events and waits, and blocks who adds another


class Engine:
    """What an actor does with its messages.

    Args:
        props: of the actor.
        inner: who does the work.
        mailbox: whose tickets these are; it calls :meth:`call`.
        wake: has :meth:`work` called in the actor's thread; raises ActorStoppedError when that has ended.
        stop_actor: ends the actor when the device is lost.

    Attributes:
        flights: the launches that are not finished.
    """

    def __init__(
        self,
        props: FlashAttnProps,
        inner: FlashAttnInner,
        mailbox: Mailbox,
        wake: Callable[[], None],
        stop_actor: Callable[[], None],
    ) -> None:
        self._props = props
        self._inner = inner
        self._mailbox = mailbox
        self._wake = wake
        self._stop_actor = stop_actor
        self._launching = threading.RLock()
        self._again: deque[Ticket] = deque()  # launches of callers that failed, older than all that wait
        self._called = False  # work() will be called, and will find what comes in before
        self._group: list[Ticket] = []
        self._refusing: Callable[[], BaseException] | None = None
        self._thread: threading.Thread | None = None
        self._gave_up = False
        self.flights = Flights(f"{props.label}-completions", inner.attach, self._landed, self._landed_well)

    def enter_thread(self) -> None:
        """Called first, in the actor's thread. Where the inner cannot work in it, everything fails with the reason and the actor stops."""
        self._thread = threading.current_thread()
        try:
            self._inner.attach()
        except Exception as error:  # noqa: BLE001 - the answer to every request
            self._end_with(error, "it could not start")

    def is_own_thread(self) -> bool:
        """Whether the caller is one of the actor's two threads, as callbacks of replies are."""
        return threading.current_thread() is self._thread or self.flights.is_current()

    def call(self) -> None:
        """One more waits in the mailbox. Calls do not overlap.

        Raises:
            ActorStoppedError: it is not launched any more.
        """
        if not self._called:
            self._called = True
            try:
                self._wake()
            except BaseException:  # a Ctrl-C, too: who comes next calls again
                self._called = False
                raise

    def work(self) -> None:
        """Launch everything that waits, in the actor's thread."""
        self._called = False
        with self._launching:
            while self._again or self._mailbox.inside:
                if self._again:
                    self._depart([self._again.popleft()])
                    continue
                self._take_out()
                if not (self._props.fuse_decodes and self._mailbox.inside and len(self._group) < MAX_FUSED):
                    self._flush()
            self._flush()

    def _take_out(self) -> None:
        """Take the oldest that waits to where it waits for a launch to finish."""
        ticket = self._mailbox.take()
        if ticket is None:  # its sender took it back
            return
        if self._props.fuse_decodes:
            ticket.job.fuse_key = self._inner.fuse_key(ticket.job)
        self._group.append(ticket)

    def launch_at_once(self, ticket: Ticket) -> bool:
        """Launch in the caller's thread, if that takes no time and is fair to all who wait. Whether the ticket came in.

        Raises:
            ActorStoppedError: too late.
        """
        if len(self.flights.flying) >= _MANY or not ticket.job.quick:
            return False
        return run_if_free(self._launching, self._enter_and_launch, ticket) or False

    def _enter_and_launch(self, ticket: Ticket) -> bool:
        if self._again or not self._mailbox.is_empty or not self._has_place():
            return False
        try:
            entered = self._mailbox.enter_begun(ticket)
            if entered:
                self._launch_quickly(ticket)
        except BaseException:
            self._mailbox.settle(ticket)  # nobody gets its reply
            raise
        return entered

    def _launch_quickly(self, ticket: Ticket) -> None:
        """Launch a ticket that has begun. What fails is left to the actor's thread, where everything else fails too.

        After a Ctrl-C it may be in flight already: the second launch writes the same, and keeps the arrays until both are done.
        """
        try:
            self.flights.add((ticket,), self._inner.launch([ticket.job]))
        except BaseException as error:
            ticket.tried = True
            self._again.append(ticket)
            with contextlib.suppress(ActorStoppedError):  # the end of the actor finds it, too
                self._wake()
            if not isinstance(error, Exception):
                raise

    def _has_place(self) -> bool:
        """Whether one more launch may be made, perhaps in the place of one that finishes right now. True until who launches does."""
        flying, limit = self.flights.flying, self._props.max_in_flight
        if len(flying) < limit:
            return True
        until = time.perf_counter() + _PATIENCE
        while True:
            self.flights.take_finished()
            if len(flying) < limit:
                return True
            if time.perf_counter() >= until:
                return False

    def _wait_for_place(self) -> None:
        while not (self._has_place() or self._gave_up):
            self.flights.wait_for_room(self._props.max_in_flight)

    def _flush(self) -> None:
        """Launch what was gathered, in order; neighbours with equal fuse keys together."""
        group, self._group = self._group, []
        batch: list[Ticket] = []
        batch_key = None
        for ticket in group:
            key = ticket.job.fuse_key
            if batch and (key is None or key != batch_key):
                self._depart(batch)
                batch = []
            batch.append(ticket)
            batch_key = key
        if batch:
            self._depart(batch)

    def _depart(self, tickets: list[Ticket]) -> None:
        """Launch tickets as one, as soon as a launch may be made; each alone where that fails, because one of them may be at fault."""
        self._wait_for_place()
        live = [ticket for ticket in tickets if self._is_cleared(ticket)]
        if live and not self._launch(live) and len(live) > 1:
            for ticket in live:
                self._wait_for_place()
                self._launch([ticket])

    def _is_cleared(self, ticket: Ticket) -> bool:
        """Whether a ticket is to be launched; it has begun then. Else it is settled."""
        error = self._refusing() if self._refusing else refusal(ticket.job.message) or _staleness(ticket)
        if error is not None:
            self._fail(ticket, error)
            return False
        begun = not ticket.reply.is_over() if ticket.tried else ticket.reply.begin()
        if not begun:
            self._mailbox.settle(ticket)
        return begun

    def _launch(self, tickets: list[Ticket]) -> bool:
        """Launch tickets that have begun. False: nothing was launched; a single ticket has failed then."""
        if self._gave_up:
            for ticket in tickets:
                self._fail(ticket, stopped_error(self._props.label))
            return False
        try:
            flight = self._inner.launch([ticket.job for ticket in tickets])
        except DeviceLostError as error:
            self.lose_device(error)
            return False
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is this request's answer and must not end the actor
            if len(tickets) == 1:
                self._fail(tickets[0], error)
            return False
        self.flights.add(tickets, flight)
        return True

    def _landed(self, launched: Launched, error: BaseException | None) -> None:
        """The device is done with a launch. In the completion thread."""
        if isinstance(error, DeviceLostError):
            self.lose_device(error)
        for ticket in launched.tickets:
            own = error if error is None or len(launched.tickets) == 1 else own_error(error)
            verdict = own or _verdict(ticket)
            self._mailbox.settle(ticket)
            if isinstance(verdict, BaseException):
                ticket.reply.fail(verdict)
            else:
                ticket.reply.answer(verdict)

    def _landed_well(self, launched: Launched) -> bool:
        """The device is done with a launch of one request. In any thread; False: nothing was settled, for want of an answer or quiet."""
        (ticket,) = launched.tickets
        verdict = _verdict(ticket)
        if isinstance(verdict, KeyboardInterrupt):  # the user's, who waits here
            raise verdict
        return not isinstance(verdict, BaseException) and ticket.reply.answer_quietly(verdict, self._mailbox.settle, ticket)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        ticket.reply.begin()  # no cancel from here on; who waits for one that was cancelled is told
        ticket.reply.fail(error)
        self._mailbox.settle(ticket)

    def lose_device(self, cause: DeviceLostError) -> None:
        """Nothing works any more: everything that waits or flies fails with ``cause``, and the actor stops."""
        self._end_with(cause, "its device was lost, and only a new process can use it again")

    def _end_with(self, cause: Exception, why: str) -> None:
        label = self._props.label

        def stopped() -> ActorStoppedError:
            error = ActorStoppedError(f"{label}: the actor has stopped, because {why}: {cause}")
            error.__cause__ = cause
            return error

        self._mailbox.close(stopped)
        self._refusing = lambda: own_error(cause)
        self.fail_unsettled(self._refusing)
        self._stop_actor()

    def refuse(self, why: Callable[[], ActorStoppedError]) -> None:
        """Let nobody in and launch nothing any more; what is flying still gets its answer."""
        self._mailbox.close(why)
        self._refusing = self._refusing or why

    def fail_unsettled(self, error: Callable[[], BaseException]) -> None:
        """Answer everything that has no answer yet, flying or not. Arrays in flight live on until the device is done with them."""
        for ticket in self._mailbox.all_unsettled():
            self._fail(ticket, error())

    def give_up(self) -> None:
        """Nobody waits for the device any more; the actor's thread, should it wait for a launch to finish, notices soon."""
        self._gave_up = True

    def shut_down(self) -> None:
        """End everything, in the actor's thread: answer what is left, wait for what is flying."""
        self._mailbox.close(lambda: stopped_error(self._props.label))
        self.work()
        self.flights.finish(lambda: self._gave_up)
        self.fail_unsettled(lambda: stopped_error(self._props.label))
        if not self._gave_up:
            self._inner.close()


def _staleness(ticket: Ticket) -> BaseException | None:
    try:
        ticket.job.fingerprint.check()
    except BaseException as error:  # noqa: BLE001 - arrays of others may raise anything; it is this request's answer
        return error
    return None


def _verdict(ticket: Ticket) -> Output | BaseException:
    """The answer of a launch that went well, if its arrays are still the same."""
    try:
        job = ticket.job
        job.fingerprint.check()
        return job.answer()
    except BaseException as error:  # noqa: BLE001 - the same
        return error


def stopped_error(label: str) -> ActorStoppedError:
    """The error of a request that came too late."""
    return ActorStoppedError(f"{label}: the actor has stopped, and the request was not launched; start a new actor")
