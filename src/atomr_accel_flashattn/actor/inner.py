"""FlashAttnInner: what does the work behind a mailbox: the GPU, the CPU backend, or a mock.

An inner is asked three things: to look a request over and make its outputs (in the caller's thread,
so new arrays belong to the caller's stream), to launch (in the actor's thread; what is quick, in
the caller's), and, through the :class:`PendingLaunch` that a launch returns, to wait until the
device is done (in the completion thread). Another device, or a test that wants a late or failing
one, derives from FlashAttnInner.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from ..dispatch import FaBwdDispatch, FaFwdDispatch, best_arch, lookup
from ..errors import DeviceMismatchError, DispatchError, MockAnswerError
from ..runtime.gradients import GradientOutputs, Gradients
from ..runtime.plan import Output, Outputs, Plan
from ..runtime.staleness import NO_ARRAYS, Fingerprint
from ..types import Device, SmArch
from .kinds import kind_of
from .messages import Message

__all__ = ["FlashAttnInner", "Job", "PendingLaunch"]


@dataclass(slots=True, eq=False)
class Job:
    """A message that an inner has looked over.

    Attributes:
        message: what was sent; keeps the inputs alive.
        outputs: the arrays to be written, and the workspace of a backward; None for a message
            without.
        refusal: why no kernel does it: its answer, in its turn.
        fingerprint: the arrays as they were at ask.
        ready: what the launch waits for on the device: the work that the caller had enqueued
            before.
        plan: what the launch repeats, if there was one like it before.
        quick: whether the launch takes a few microseconds in the caller's thread, and may be made
            there.
    """

    message: Message[Any]
    outputs: Outputs | GradientOutputs | None = None
    refusal: DispatchError | None = None
    fingerprint: Fingerprint = NO_ARRAYS
    ready: Any = None
    plan: Plan | None = None
    quick: bool = False

    @property
    def request(self) -> FaFwdDispatch | FaBwdDispatch:
        """What is asked."""
        request: FaFwdDispatch | FaBwdDispatch = self.message.request
        return request

    def fill(self, *, stream: int | None = None) -> None:
        """Do the work into the outputs."""
        kind_of(self.message).fill(self.request, self.outputs, self.plan, stream=stream)

    def answer(self) -> Output | Gradients:
        """What the caller gets."""
        assert self.outputs is not None  # noqa: S101 - only such messages are launched
        return self.outputs.for_user(self.message.request)


class PendingLaunch(Protocol):
    """A launch that the device has not finished.

    One that can be asked has a second method, ``poll() -> bool``: whether the device is done with
    this launch and all before, without waiting. It is called in any thread, while another one may
    be in ``wait``, and raises what ``wait`` would.
    """

    def wait(self) -> None:
        """Return when the device is done. In the completion thread, in the order of the launches.

        Raises:
            DeviceLostError: nothing works any more; every request fails and the actor stops.
            Exception: anything else is the answer to this launch alone.
        """
        ...


class FlashAttnInner(ABC):
    """The work behind one mailbox. Made by :meth:`gpu`, :meth:`reference` or :meth:`mock`.

    Attributes:
        device: where the arrays of requests have to live.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    @staticmethod
    def gpu(index: int = 0, *, stream: Any = None) -> FlashAttnInner:
        """Kernels on one GPU and stream; None is a stream of its own.

        Raises:
            PropsError: the per-thread default stream, which is another one in every thread.
            NoDriverError, DriverTooOldError, LaunchError: the GPU cannot be used.
        """
        from .gpu import GpuInner

        return GpuInner(index, stream)

    @staticmethod
    def reference() -> FlashAttnInner:
        """The CPU backend. It computes in the completion thread, so launches return at once."""
        return _ReferenceInner()

    @staticmethod
    def mock(device: Device = Device("cpu", 0), *, arch: SmArch = SmArch.CPU) -> FlashAttnInner:  # noqa: B008 - a named tuple
        """No compute: checks, and answers with a MockAnswerError that names the kernel."""
        return _MockInner(device, arch)

    def attach(self) -> None:  # noqa: B027 - a hook
        """Called once in each thread of the actor, before anything else there."""

    def accept(self, message: Message[Any]) -> Job:
        """Look a message over, in the caller's thread, and make its outputs. Waits for nothing.

        Raises:
            UnknownMessageError: a message whose request is of another kind.
            DeviceMismatchError: arrays on another device.
            StaleArrayError: an array was resized since the request was made.
            OutputError: the library of q cannot be allocated with, and there is no ``out``.
        """
        kind, request = kind_of(message), message.request
        if type(request) not in kind.own:
            kind.check(request)
        device = kind.forward(request).q.device
        if device != self.device:
            raise DeviceMismatchError(
                f"message: got a request on {device} for an actor on {self.device}; "
                "allowed are requests on the actor's device; send it to the actor of that device"
            )
        try:
            job = self.prepare(message)
        except DispatchError as error:  # the workspace of a backward is that of its kernels
            return Job(message, refusal=error)
        job.fingerprint = kind.fingerprint(request)
        return job

    def prepare(self, message: Message[Any]) -> Job:
        """A job with the arrays that the call writes."""
        return Job(message, kind_of(message).make(message, None))

    @abstractmethod
    def launch(self, job: Job) -> PendingLaunch:
        """Enqueue a job, in the actor's thread; one that is quick, perhaps in its caller's.

        Calls do not overlap. What fails in a caller's thread is launched again in the actor's.

        Raises:
            DeviceLostError: nothing works any more.
            Exception: anything else is the answer to this job alone.
        """

    def close(self) -> None:  # noqa: B027 - a hook
        """Called once, when nothing is in flight any more."""


@dataclass(slots=True, eq=False)
class _Calculation:
    """A launch that is computed by whoever waits for it: the CPU as a device with one stream."""

    job: Job

    def wait(self) -> None:
        self.job.fingerprint.check()
        self.job.fill()


class _ReferenceInner(FlashAttnInner):
    def __init__(self) -> None:
        super().__init__(Device("cpu", 0))

    def launch(self, job: Job) -> PendingLaunch:
        lookup(job.request.dispatch_key(best_arch(self.device)))
        return _Calculation(job)


@dataclass(slots=True, eq=False)
class _MockLaunch:
    error: MockAnswerError

    def wait(self) -> None:
        raise self.error


class _MockInner(FlashAttnInner):
    def __init__(self, device: Device, arch: SmArch) -> None:
        super().__init__(device)
        self.arch = arch
        self._names: dict[object, str] = {}

    def prepare(self, message: Message[Any]) -> Job:
        """Nothing will be written."""
        return Job(message)

    def launch(self, job: Job) -> PendingLaunch:
        spec = lookup(job.request.dispatch_key(self.arch))
        name = self._names.get(spec) or self._names.setdefault(spec, spec.kernel_name)
        return _MockLaunch(MockAnswerError(name))
