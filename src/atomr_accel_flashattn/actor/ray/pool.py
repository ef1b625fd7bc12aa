"""FlashAttnPool: one actor per GPU, on many GPUs and machines, through Ray.

The pool keeps the mailbox: requests wait here, not with the workers, until the least loaded worker
has room. So a cancel works until a request is sent, a lost worker takes only its own few requests
with it, and those are sent to another one. One thread of the pool owns the workers: it sends
requests and handles what comes back. Everybody else puts work into its queue.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

from ...errors import ActorStoppedError, DeviceLostError, PropsError, RayMissingError, UnknownMessageError, WorkerLostError
from ...limits import is_integer, not_built
from ...runtime.staleness import Fingerprint
from ..client import Client
from ..engine import stopped_error
from ..inner import Job
from ..kinds import kind_of
from ..mailbox import Mailbox
from ..messages import Message
from ..props import FlashAttnProps
from ..reply import Ticket, own_error
from .wire import WireRequest, answer_from_wire
from .worker import Worker

__all__ = ["FlashAttnPool"]

_log = logging.getLogger(__name__)

_INLINE_BYTES: Final = 100 * 1024  # larger arguments are put once, and a retry sends the reference
_START_SECONDS: Final = 120.0
_KILL_SECONDS: Final = 5.0  # how long a stop whose time is over waits for the workers to be ended


@dataclass(slots=True, eq=False, weakref_slot=True, kw_only=True)
class _Task(Ticket):
    """A request for a worker, perhaps for a second one. ``wire``: None for what is refused."""

    wire: WireRequest | None = None
    arrays: tuple[Any, ...] = ()
    cost: float = 0.0
    tries: int = 0


@dataclass(slots=True, eq=False)
class _Member:
    """A worker as the pool sees it. ``load``: the cost of what it has not answered."""

    number: int
    actor: Any
    load: float = 0.0
    tasks: int = 0
    lost: bool = False


class FlashAttnPool(Client):
    """The way to many actors, with the calls of a handle. Start one with :meth:`start`."""

    def __init__(self, props: FlashAttnProps, ray: Any, ray_options: Mapping[str, Any], window: int, retries: int) -> None:
        super().__init__(props, Mailbox(props.label, props.mailbox_limit, lambda: self._work.put(self._send_waiting)))
        self._ray = ray
        self._ray_options = ray_options
        self._window = window
        self._retries = retries
        self._again: deque[_Task] = deque()  # of lost workers, older than all in the mailbox
        self._members: list[_Member] = []
        self._started = 0
        self._spare = 0
        self._settled = threading.Condition()  # for who waits in a stop; callers never take it
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
            workers: how many; each takes one GPU, or one CPU core with ``device="cpu"`` in the
                props.
            props: of each worker's actor. ``mailbox_limit`` and ``overflow`` are the pool's;
                streams belong to the workers.
            window: requests that a worker may have at a time; None is twice ``max_in_flight``.
            retries: how often a request may be sent again after its worker was lost. A request that
                kills its worker would kill them all.
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
        numbers = {"workers": (workers, 1), "window": (window, 1), "retries": (retries, 0), "replacements": (replacements, 0)}
        for name, (value, least) in numbers.items():
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
                pool._start_worker()
            ray.get([member.actor.ready.remote() for member in pool._members], timeout=_START_SECONDS)
        except BaseException as error:  # a Ctrl-C, too: nobody will have the pool to stop it
            pool.stop(drain=False)
            if not isinstance(error, ray.exceptions.RayError):
                raise
            if isinstance(error, ray.exceptions.GetTimeoutError):
                there = ray.cluster_resources()
                raise WorkerLostError(
                    f"{props.label}: got {workers} workers, of which some did not start in {_START_SECONDS:g} s; Ray has "
                    f"{there.get('GPU', 0):g} GPUs and {there.get('CPU', 0):g} CPU cores, and a worker takes "
                    f"{'no GPU and ' if props.place.kind == 'cpu' else 'one and '}one core; start fewer workers, or nodes that have them"
                ) from error
            raise WorkerLostError(f"{props.label}: {workers} workers did not start: {error}") from error
        return pool

    def _close(self, *, drain: bool) -> None:
        self._mailbox.close(lambda: stopped_error(self.props.label))
        if not drain:
            self._work.put(lambda: self._fail_waiting(lambda: stopped_error(self.props.label)))

    def _end(self, timeout: float | None) -> None:
        """Ends the workers; Ray goes on."""
        with self._settled:
            self._settled.wait_for(lambda: not self._mailbox.unsettled, timeout)
        for ticket in self._mailbox.all_unsettled():
            self._settle(ticket, stopped_error(self.props.label))
        self._deadlines.close()
        self._work.put(None)
        self._thread.join(None if timeout is None else _KILL_SECONDS)

    def _is_own_thread(self) -> bool:
        return super()._is_own_thread() or threading.current_thread() is self._thread

    @property
    def loads(self) -> dict[int, int]:
        """Unanswered requests by worker number, of the workers that are there."""
        return {member.number: member.tasks for member in list(self._members)}

    def processes(self) -> dict[int, int]:
        """Process ids by worker number, each on its own machine. Waits for those that start.

        Raises:
            ray.exceptions.RayActorError: one is lost, and the pool has not noticed yet.
        """
        members = list(self._members)
        pids = self._ray.get([member.actor.ready.remote() for member in members])
        return {member.number: int(pid) for member, pid in zip(members, pids, strict=True)}

    def _accept(self, message: Message[Any]) -> Ticket:
        kind, request = kind_of(message), message.request
        kind.check(request)
        if not isinstance(request, kind.own):
            raise UnknownMessageError(
                f"message: got a {kind.name} with {type(request).__qualname__}; a pool takes requests of this package, and of classes "
                f"derived from them: {', '.join(each.__name__ for each in kind.own)}"
            )
        kind.fingerprint(request)
        if kind.forward(request).cache is not None:
            return _Task(Job(message, refusal=not_built("paged_over_ray", f"got a {type(request).__qualname__}")))
        wire, arrays = WireRequest.pack(message)
        # A copy in either case: the caller's memory may change from here on.
        sent = tuple(self._ray.put(array) if array.nbytes > _INLINE_BYTES else array.copy() for array in arrays)
        problem = kind.forward(request)
        cost = 1e6 + kind.work * problem.batch * problem.heads * problem.seqlen_q * problem.seqlen_k * problem.head_dim
        return _Task(Job(message, fingerprint=Fingerprint(kind.targets(request), kind.written)), wire=wire, arrays=sent, cost=cost)

    async def _ticket_async(self, message: Message[Any], timeout: float | None) -> Ticket:  # noqa: ASYNC109 - checked, not waited for
        """Off the event loop, because arrays are copied."""
        return await asyncio.to_thread(self._ticket, message, timeout)

    # From here on in the pool's thread; in Ray's, the start of a worker would wait for itself.

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:  # noqa: BLE001 - this thread has to live
                _log.exception("%s: an error of the pool itself", self.props.label)
            del work  # the arrays of the last request must not live until the next one
        for member in self._members:
            self._kill(member)
        self._members = []

    def _take(self) -> _Task | None:
        """The oldest request that waits."""
        ticket = self._again.popleft() if self._again else self._mailbox.take()
        assert ticket is None or isinstance(ticket, _Task)  # noqa: S101 - _accept makes no others
        return ticket

    def _send_waiting(self) -> None:
        """Send what waits to the least loaded worker, as long as one has room."""
        while free := [member for member in self._members if member.tasks < self._window]:
            task = self._take()
            if task is None:
                return
            error = task.job.refusal
            if error is not None or (task.tries == 0 and not task.reply.begin()):
                self._settle(task, error)
                continue
            member = min(free, key=lambda each: (each.load, each.tasks))
            task.tries += 1
            try:
                reference = member.actor.run.remote(task.wire, *task.arrays)
            except Exception as failed:  # noqa: BLE001 - whatever Ray says, it is this request's answer
                self._settle(task, failed)
                continue
            member.load += task.cost
            member.tasks += 1
            reference.future().add_done_callback(partial(self._put_returned, task, member))

    def _put_returned(self, task: _Task, member: _Member, done: Future[Any]) -> None:
        self._work.put(partial(self._returned, task, member, done))

    def _returned(self, task: _Task, member: _Member, done: Future[Any]) -> None:
        """A call of a worker has ended."""
        member.load -= task.cost
        member.tasks -= 1
        failure = done.exception()
        answer = done.result() if failure is None else None
        if isinstance(answer, (DeviceLostError, ActorStoppedError)):
            failure = answer  # the process has lost its GPU: as good as lost itself
        if isinstance(failure, self._ray.exceptions.RayTaskError):  # the worker lives
            self._settle(task, failure)
        elif failure is not None:
            self._replace(member)
            self._send_again(task, failure)
        elif isinstance(answer, Exception):
            self._settle(task, answer)
        else:
            self._settle(task, None, answer)
        self._send_waiting()

    def _replace(self, member: _Member) -> None:
        """End a worker that is lost and start another, once."""
        if member.lost:
            return
        member.lost = True
        self._members.remove(member)
        if self._spare > 0:
            self._spare -= 1
            try:
                self._start_worker()
            except Exception:  # noqa: BLE001 - Ray's; the pool goes on without it
                _log.exception("%s: worker %d could not be replaced", self.props.label, member.number)
        self._kill(member)

    def _start_worker(self) -> None:
        self._started += 1
        options = self._ray.remote(Worker).options(**self._ray_options)
        actor = options.remote(f"{self.props.label}-{self._started}", self.props.place, self.props.max_in_flight)
        self._members.append(_Member(self._started, actor))

    def _kill(self, member: _Member) -> None:
        try:
            self._ray.kill(member.actor)
        except Exception:  # noqa: BLE001 - Ray's; the others are still to be ended
            _log.exception("%s: worker %d could not be ended", self.props.label, member.number)

    def _send_again(self, task: _Task, cause: BaseException) -> None:
        label = self.props.label
        if self._members and task.tries <= self._retries and not task.reply.is_over():
            self._again.append(task)
        else:
            error = WorkerLostError(f"{label}: the worker was lost with this request, sent {task.tries} times: {cause}")
            error.__cause__ = cause
            self._settle(task, error)
        if not self._members:
            gone = WorkerLostError(f"{label}: all workers are lost and none may be replaced; the last one: {cause}")
            self._mailbox.close(lambda: stopped_error(f"{label} (all workers are lost)"))
            self._fail_waiting(lambda: own_error(gone))

    def _fail_waiting(self, error: Callable[[], BaseException]) -> None:
        while (task := self._take()) is not None:
            self._settle(task, error())

    def _settle(self, task: Ticket, error: BaseException | None, answer: Any = None) -> None:
        """Resolve the reply; a task that was cancelled comes here without error and answer."""
        message = task.job.message
        outcome: Any = error
        try:
            if answer is not None:
                task.job.fingerprint.check()
                outcome = answer_from_wire(message, answer)
        except Exception as failed:  # noqa: BLE001 - the caller's ``out`` may be gone: the request's answer
            outcome = failed
        if outcome is not None:
            task.reply.resolve(outcome)
        self._mailbox.settle(task)
        with self._settled:
            self._settled.notify_all()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RayMissingError("a pool needs Ray, which is not installed: pip install 'atomr-accel-flashattn[ray]'") from error
    return ray
