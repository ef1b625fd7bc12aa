"""FlashAttnPool: one actor per GPU, on many GPUs and machines, through Ray (``pip install 'atomr-accel-flashattn[ray]'``).

The pool keeps the mailbox: requests wait here, not with the workers, until the least loaded worker has room. So a cancel works until a
request is sent, a lost worker takes only its own few requests with it, and those are sent to another one. One thread sends requests and
handles what comes back: callers only put into the mailbox, so a Ctrl-C of one of them loses no request of another.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from ..errors import ActorStoppedError, DeviceLostError, PropsError, RayMissingError, UnknownMessageError, WorkerLostError
from ..limits import is_integer
from ..requests.dense import DenseFwdRequest
from ..varlen import VarlenFwdRequest
from .door import Door
from .engine import stopped_error
from .freshness import NO_ARRAYS, Fingerprint
from .inner import Job
from .locks import Condition
from .mailbox import Mailbox
from .messages import FlashAttnMsg, Message, refusal
from .parcel import Parcel, bring_home
from .props import FlashAttnProps
from .ray_worker import Worker, start_of
from .reply import Ticket, own_error

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FlashAttnPool"]

_log = logging.getLogger(__name__)

_INLINE_BYTES: Final = 100 * 1024  # smaller arguments travel inside the call; larger ones are put once, and a retry sends the reference
_START_SECONDS: Final = 120.0


@dataclass(slots=True, eq=False, weakref_slot=True, kw_only=True)
class _Errand(Ticket):
    """A request on its way to a worker, perhaps to a second one."""

    parcel: Parcel
    arrays: list[Any]
    cost: float
    tries: int = 0


@dataclass(slots=True, eq=False)
class _Member:
    """A worker as the pool sees it. ``load``: the cost of what it has not answered."""

    number: int
    actor: Any
    load: float = 0.0
    errands: int = 0
    lost: bool = False


class FlashAttnPool(Door):
    """The way to many actors, with the calls of a handle. Start one with :meth:`start`."""

    def __init__(self, props: FlashAttnProps, ray: Any, ray_options: Mapping[str, Any], window: int, retries: int) -> None:
        super().__init__(props, Mailbox(props.label, props.mailbox_limit, lambda: self._work.put(self._pump)))
        self._ray = ray
        self._ray_options = ray_options
        self._window = window
        self._retries = retries
        self._lock = Condition()
        self._again: deque[_Errand] = deque()  # of lost workers, older than all in the mailbox
        self._members: list[_Member] = []
        self._started = 0
        self._spare = 0
        self._stopping = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"{props.label}-pool", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        workers: int,
        props: FlashAttnProps | None = None,
        *,
        window: int | None = None,
        retries: int = 1,
        replacements: int | None = None,
        ray_options: Mapping[str, Any] | None = None,
    ) -> FlashAttnPool:
        """Start a pool, and Ray too where it does not run. Returns when all workers are up.

        Args:
            workers: how many; each takes one GPU, or one CPU core with ``device="cpu"`` in the props.
            props: of each worker's actor. ``mailbox_limit`` and ``overflow`` are the pool's; streams belong to the workers.
            window: requests that a worker may have at a time; None is twice ``max_in_flight``.
            retries: how often a request may be sent again after its worker was lost. A request that kills its worker would kill them all.
            replacements: how many lost workers are replaced in all; None is as many as there are.
            ray_options: options of the Ray actors that differ, as ``{"resources": {"h100": 1}}``.

        Raises:
            RayMissingError: Ray is not installed.
            PropsError: a number that is not allowed.
            WorkerLostError: the workers did not start, for want of GPUs, say.
        """
        ray = _import_ray()
        props = FlashAttnProps() if props is None else props
        window = 2 * props.max_in_flight if window is None else window
        replacements = workers if replacements is None else replacements
        for name, value, least in (
            ("workers", workers, 1),
            ("window", window, 1),
            ("retries", retries, 0),
            ("replacements", replacements, 0),
        ):
            if not is_integer(value) or value < least:
                raise PropsError(f"{name}: got {value!r}; allowed is an integer >= {least}")
        if props.stream is not None:
            raise PropsError(f"stream: got {props.stream!r}; allowed is None, because every worker has its own")
        if not ray.is_initialized():
            ray.init()
        needs = {"num_cpus": 1} if props.place.kind == "cpu" else {"num_cpus": 1, "num_gpus": 1}
        pool = cls(props, ray, {**needs, "max_concurrency": window + 1, "max_restarts": 0} | dict(ray_options or {}), window, retries)
        pool._spare = replacements
        try:
            for _ in range(workers):
                pool._members.append(pool._hire())
            ray.get([member.actor.ready.remote() for member in pool._members], timeout=_START_SECONDS)
        except BaseException as error:  # a Ctrl-C, too: nobody will have the pool to stop it
            pool.stop(drain=False)
            if isinstance(error, ray.exceptions.RayError):
                raise WorkerLostError(f"{props.label}: {workers} workers did not start: {error}") from error
            raise
        return pool

    def _close(self, *, drain: bool) -> None:
        label = self.props.label
        self._mailbox.close(lambda: stopped_error(label))
        if not drain:
            while (errand := self._take()) is not None:
                self._settle(errand, stopped_error(label))

    def _end(self, timeout: float | None) -> None:
        """Ends the workers; Ray goes on."""
        label = self.props.label
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while self._mailbox.unsettled and (deadline is None or time.monotonic() < deadline):
                self._lock.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            self._stopping = True
            members, self._members = self._members, []
        for ticket in self._mailbox.all_unsettled():
            self._settle(ticket, stopped_error(label))
        for member in members:
            self._kill(member)
        self._deadlines.close()
        self._work.put(None)

    def _kill(self, member: _Member) -> None:
        try:
            self._ray.kill(member.actor)
        except Exception:  # noqa: BLE001 - Ray's; the others are still to be ended
            _log.exception("%s: worker %d could not be ended", self.props.label, member.number)

    def _is_own_thread(self) -> bool:
        return super()._is_own_thread() or threading.current_thread() is self._thread

    @property
    def loads(self) -> dict[int, int]:
        """Unanswered requests by worker number, of the workers that are there."""
        with self._lock:
            return {member.number: member.errands for member in self._members}

    def processes(self) -> dict[int, int]:
        """Process ids by worker number, each on the worker's own machine. Asks the workers, and so waits for those that still start.

        Raises:
            ray.exceptions.RayActorError: one is lost, and the pool has not noticed yet.
        """
        with self._lock:
            members = list(self._members)
        pids = self._ray.get([member.actor.ready.remote() for member in members])
        return {member.number: int(pid) for member, pid in zip(members, pids, strict=True)}

    def _accept(self, message: Message) -> Ticket:
        if not isinstance(message, FlashAttnMsg.Forward):
            empty = Parcel((), (), None, {}, (0.0, 0.0, 0.0), lse=False, dropout_mask=False)
            return _Errand(Job(message), parcel=empty, arrays=[], cost=0.0)
        if not isinstance(message.request, (DenseFwdRequest, VarlenFwdRequest)):
            raise UnknownMessageError(
                f"message: got a Forward with {type(message.request).__qualname__}; "
                "a pool takes a DenseFwdRequest, Fa2FwdRequest, Fa3FwdRequest or VarlenFwdRequest"
            )
        fingerprint = Fingerprint.of(message.request)
        parcel, arrays = Parcel.pack(message)
        problem = message.request.problem
        cost = 1e6 + float(problem.batch) * problem.heads * problem.seqlen_q * problem.seqlen_k * problem.head_dim
        job = Job(message, fingerprint=NO_ARRAYS if message.request.out_array is None else fingerprint)
        return _Errand(job, parcel=parcel, arrays=[self._sent(array) for array in arrays], cost=cost)

    async def _ticket_async(self, message: Message, timeout: float | None) -> Ticket:  # noqa: ASYNC109 - checked, not waited for
        """Off the event loop, because arrays are copied."""
        return await asyncio.to_thread(self._ticket, message, timeout)

    def _sent(self, array: np.ndarray[Any, Any]) -> Any:
        """What stands for an array in calls. A copy in either case: the caller's memory may change from here on."""
        return self._ray.put(array) if array.nbytes > _INLINE_BYTES else array.copy()

    def _take(self) -> _Errand | None:
        """The oldest request that waits."""
        with self._lock:
            ticket = self._again.popleft() if self._again else self._mailbox.take()
        assert ticket is None or isinstance(ticket, _Errand)  # noqa: S101 - _accept makes no others
        return ticket

    def _run(self) -> None:
        """Send, and handle what the workers return, in a thread of ours: in Ray's, the start of another worker would wait for itself."""
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:  # noqa: BLE001 - this thread has to live
                _log.exception("%s: an error of the pool itself", self.props.label)
            del work  # the arrays of the last request must not live until the next one

    def _pump(self) -> None:
        """Send what waits, as long as a worker has room."""
        while (chosen := self._next()) is not None:
            errand, member = chosen
            error = refusal(errand.job.message)
            if error is not None or (errand.tries == 0 and not errand.reply.begin()):
                self._relieve(member, errand)
                self._settle(errand, error)
                continue
            errand.tries += 1
            try:
                self._send_to(member, errand)
            except Exception as failed:  # noqa: BLE001 - whatever Ray says, it is this request's answer, and this thread has to live
                self._relieve(member, errand)
                self._settle(errand, failed)

    def _send_to(self, member: _Member, errand: _Errand) -> None:
        reference = member.actor.forward.remote(errand.parcel, *errand.arrays)
        reference.future().add_done_callback(
            lambda done: None if self._stopping else self._work.put(partial(self._returned, done, errand, member))
        )

    def _next(self) -> tuple[_Errand, _Member] | None:
        """The oldest request and the least loaded worker; None when there is none of either."""
        with self._lock:
            free = [member for member in self._members if member.errands < self._window]
            errand = self._take() if free else None
            if errand is None:
                return None
            member = min(free, key=lambda each: (each.load, each.errands))
            member.load += errand.cost
            member.errands += 1
        return errand, member

    def _relieve(self, member: _Member, errand: _Errand) -> None:
        with self._lock:
            member.load -= errand.cost
            member.errands -= 1

    def _returned(self, done: Future[Any], errand: _Errand, member: _Member) -> None:
        """A call of a worker has ended."""
        self._relieve(member, errand)
        failure = done.exception()
        answer = done.result() if failure is None else None
        if isinstance(answer, (DeviceLostError, ActorStoppedError)):
            failure = answer  # the process has lost its GPU: as good as lost itself
        if isinstance(failure, self._ray.exceptions.RayTaskError):  # the worker lives: it could not say its answer
            self._settle(errand, failure)
        elif failure is not None:
            self._lose(member)
            self._send_again(errand, failure)
        elif isinstance(answer, Exception):
            self._settle(errand, answer)
        else:
            self._settle(errand, None, answer)
        self._pump()

    def _lose(self, member: _Member) -> None:
        """Replace a worker, once."""
        with self._lock:
            if member.lost or self._stopping:
                return
            member.lost = True
            self._members.remove(member)
            if self._spare > 0:
                self._spare -= 1
                try:
                    self._members.append(self._hire())
                except Exception:  # noqa: BLE001 - Ray's; the pool goes on without it
                    _log.exception("%s: worker %d could not be replaced", self.props.label, member.number)
        self._kill(member)

    def _send_again(self, errand: _Errand, cause: BaseException) -> None:
        label = self.props.label
        with self._lock:
            alone = not self._members and not self._stopping
            again = errand.tries <= self._retries and bool(self._members) and not errand.reply.is_over()
            if again:
                self._again.append(errand)
        if not again:
            error = WorkerLostError(f"{label}: the worker was lost with this request, sent {errand.tries} times: {cause}")
            error.__cause__ = cause
            self._settle(errand, error)
        if alone:
            gone = WorkerLostError(f"{label}: all workers are lost and none may be replaced; the last one: {cause}")
            self._mailbox.close(lambda: stopped_error(f"{label} (all workers are lost)"))
            while (stranded := self._take()) is not None:
                self._settle(stranded, own_error(gone))

    def _settle(self, errand: Ticket, error: BaseException | None, answer: Any = None) -> None:
        """Resolve the reply, and tell who waits in a stop; an errand that was cancelled comes here without error and answer."""
        message = errand.job.message
        try:
            if error is None and answer is not None and isinstance(message, FlashAttnMsg.Forward):
                errand.job.fingerprint.check()
                errand.reply.answer(bring_home(message, answer))
        except Exception as failed:  # noqa: BLE001 - the caller's ``out`` may be gone: the request's answer
            error = failed
        if error is not None:
            errand.reply.begin()
            errand.reply.fail(error)
        self._mailbox.settle(errand)
        with self._lock:
            self._lock.notify_all()

    def _hire(self) -> _Member:
        self._started += 1
        options = self._ray.remote(Worker).options(**self._ray_options)
        return _Member(self._started, options.remote(start_of(self.props, self._started)))


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RayMissingError("a pool needs Ray, which is not installed: pip install 'atomr-accel-flashattn[ray]'") from error
    return ray
