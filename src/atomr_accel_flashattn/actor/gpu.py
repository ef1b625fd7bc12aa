"""The GPU inner: kernels on one GPU and one stream.

Streams. Outputs are made in the caller's thread, so a caching allocator counts them as the
caller's, and frees and reuses them in the order of the caller's stream. The launch goes to the
actor's stream and waits there, on the device, for an event that was recorded in the caller's stream
at ask: inputs are ready, and nothing of the caller still uses the memory of the outputs. The reply
comes when the device is done, so the answer may be used on any stream. When both are the same
stream there is no event to wait for.
"""

from __future__ import annotations

import contextlib
from queue import Empty, SimpleQueue
from typing import Any, Final

from ..arrays.streams import LEGACY_DEFAULT_STREAM, current_stream, raw_stream
from ..errors import LaunchError, PropsError
from ..launch.driver import check, current_context, driver, primary_context
from ..types import Device
from .inner import FlashAttnInner, Job, PendingLaunch
from .kinds import kind_of
from .messages import Message

__all__ = ["CudaEvents", "GpuInner", "StreamEvent"]

_DEFAULT_STREAMS: Final = frozenset({0, LEGACY_DEFAULT_STREAM})
_PER_THREAD: Final = 2  # CU_STREAM_PER_THREAD
_NOT_READY: Final = 600  # CUDA_ERROR_NOT_READY
_WAITING: Final = "waiting for a launch of the actor"


class CudaEvents:
    """Events of one device without timing, made once and used again. Thread-safe.

    Waiting spins inside the driver, as torch.cuda.synchronize() does: an event that sleeps wakes 20
    us or more after its kernel.

    Attributes:
        cuda: the driver; events may come back when the interpreter is going down.
        context: the device's primary one.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self.cuda = driver()
        self.context = int(primary_context(index))
        self._free: SimpleQueue[Any] = SimpleQueue()
        self._closed = False

    def take(self, stream: int, *, in_context: bool) -> Any:
        """A free event, or a new one, at the end of ``stream``; see :meth:`record`."""
        try:
            event = self._free.get_nowait()
        except Empty:
            with current_context(self._index):
                event = check(self.cuda.cuEventCreate(self.cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING), "cuEventCreate")
        try:
            self.record(event, stream, in_context=in_context)
        except BaseException:
            self.give_back(event)
            raise
        return event

    def give_back(self, event: Any) -> None:
        """It may be used again: nobody asks about it any more."""
        self._free.put(event)
        if self._closed:  # after the put: either this or close() finds the event
            self._destroy_free()

    def record(self, event: Any, stream: int, *, in_context: bool) -> None:
        """Let ``event`` be at the end of ``stream`` from now on. Earlier waits stay as they are.

        ``in_context``: the device's context is known to be current, which says whose the default
        stream is.
        """
        if in_context or stream not in _DEFAULT_STREAMS or self.current_context() == self.context:
            result = self.cuda.cuEventRecord(event, stream)
        else:
            with current_context(self._index):
                result = self.cuda.cuEventRecord(event, stream)
        if result[0]:
            check(result, "cuEventRecord")

    def current_context(self) -> int:
        """The context that is current in this thread, 0 for none: cheaper than a push and a pop."""
        status, context = self.cuda.cuCtxGetCurrent()
        if status:
            check((status,), "cuCtxGetCurrent")
        return int(context)

    def close(self) -> None:
        """Destroy those that are free now, and the others when they come back."""
        self._closed = True
        self._destroy_free()

    def _destroy_free(self) -> None:
        while True:
            try:
                event = self._free.get_nowait()
            except Empty:
                return
            self.cuda.cuEventDestroy(event)


class StreamEvent:
    """A place in a stream: what a launch waits for; recorded anew, where that launch ends.

    Its event goes back when nobody asks about it any more.
    """

    __slots__ = ("_events", "event")

    def __init__(self, events: CudaEvents, stream: int, *, in_context: bool = False) -> None:
        self._events = events
        self.event = events.take(stream, in_context=in_context)

    def make_wait(self, stream: int) -> None:
        """Whatever is enqueued on ``stream`` from now on waits for this place."""
        result = self._events.cuda.cuStreamWaitEvent(stream, self.event, 0)
        if result[0]:
            check(result, "cuStreamWaitEvent")

    def record_again(self, stream: int) -> None:
        """This place is the end of ``stream`` from now on."""
        self._events.record(self.event, stream, in_context=False)

    def poll(self) -> bool:
        """Whether the device has reached it. Raises DeviceLostError where it never will."""
        (status,) = self._events.cuda.cuEventQuery(self.event)
        if status and status != _NOT_READY:
            check((status,), _WAITING)
        return not status

    def wait(self) -> None:
        """Block until the device has reached it, without the GIL. Raises as :meth:`poll`."""
        check(self._events.cuda.cuEventSynchronize(self.event), _WAITING)

    def __del__(self) -> None:
        try:
            event = self.event
        except AttributeError:  # it was never recorded
            return
        self._events.give_back(event)


class GpuInner(FlashAttnInner):
    """Kernels on GPU ``index`` and ``stream``; None is a stream of its own."""

    def __init__(self, index: int, stream: Any = None) -> None:
        super().__init__(Device("cuda", index))
        self._events = CudaEvents(index)
        self._own_stream: Any = None
        if stream is None:
            cuda = driver()
            with current_context(index):
                self._own_stream = check(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate")
            self._stream = int(self._own_stream)
        else:
            self._stream = raw_stream(stream)
            if self._stream == _PER_THREAD:
                raise PropsError("stream: got the per-thread default stream, another one in every thread; allowed is one stream, or None")
        self._on_default = self._stream in _DEFAULT_STREAMS

    def attach(self) -> None:
        """Make the device's primary context, which torch uses too, current in this thread."""
        check(driver().cuCtxSetCurrent(primary_context(self.device.index)), "cuCtxSetCurrent")

    def accept(self, message: Message[Any]) -> Job:
        """As every inner; and record where the caller's stream is now, if it is another one."""
        job = super().accept(message)
        if job.outputs is not None:
            theirs = current_stream(kind_of(message).forward(message.request).q)
            if theirs != self._stream and not (self._on_default and theirs in _DEFAULT_STREAMS):
                job.ready = StreamEvent(self._events, theirs, in_context=job.quick)
        return job

    def prepare(self, message: Message[Any]) -> Job:
        """A job with its outputs, and the plan of a launch like this one."""
        kind = kind_of(message)
        plan = kind.find(message)
        if plan is None:
            return super().prepare(message)
        outputs = kind.make(message, plan)
        if outputs.strides != plan.out_strides:
            return Job(message, outputs)
        return Job(message, outputs, plan=plan, quick=self._context_is_current())

    def _context_is_current(self) -> bool:
        """Whether the device's context is current in this thread, as repeated launches want it."""
        current = self._events.current_context()
        if current == 0 and self.device.index == 0:  # the CUDA runtime would do the same
            self.attach()
            return True
        return current == self._events.context

    def launch(self, job: Job) -> PendingLaunch:
        """Enqueue on the actor's stream. The event that it waits for becomes that of its end."""
        place: StreamEvent | None = job.ready
        if place is not None:
            place.make_wait(self._stream)
        try:
            job.fill(stream=self._stream)
        except LaunchError:  # the first of several kernels may run: its arrays must not go
            with contextlib.suppress(LaunchError):
                StreamEvent(self._events, self._stream).wait()
            raise
        if place is None:
            place = StreamEvent(self._events, self._stream)
        else:
            place.record_again(self._stream)
        job.ready = None
        return place

    def close(self) -> None:
        """Give back events and the stream."""
        self._events.close()
        if self._own_stream is not None:
            driver().cuStreamDestroy(self._own_stream)
