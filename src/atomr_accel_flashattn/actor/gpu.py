"""The real inner: kernels on one GPU and one stream.

Streams. Outputs are made in the caller's thread, so a caching allocator counts them as the caller's, and frees and reuses them in the
order of the caller's stream. The launch goes to the actor's stream and waits there, on the device, for an event that was recorded in the
caller's stream at ask: inputs are ready, and nothing of the caller still uses the memory of the outputs. The reply comes when the device
is done, so the caller may use the answer on any stream. When both are the same stream there is no event to wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final

from ..arrays import LEGACY_DEFAULT_STREAM, current_stream, raw_stream
from ..execute import fill
from ..jit.driver import check, current_context, driver, primary_context
from ..jit.params import forward_pointers
from ..request_plans import find, key_of
from ..types import Device
from .fusion import launch_fused
from .inner import FlashAttnInner, Flight, Job
from .messages import FlashAttnMsg, Message
from .outputs import outputs_again

__all__ = ["CudaEvents", "GpuInner"]

_DEFAULT_STREAMS: Final = frozenset({0, LEGACY_DEFAULT_STREAM})
_NOT_READY: Final = 600  # CUDA_ERROR_NOT_READY


class CudaEvents:
    """Events of one device without timing, made once and used again. Thread-safe. ``context`` is the device's primary one.

    Waiting spins inside the driver, as torch.cuda.synchronize() does: an event that sleeps wakes 20 us or more after its kernel.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._cuda = driver()  # events may come back when the interpreter is going down
        self.context = int(primary_context(index))
        self._free: SimpleQueue[Any] = SimpleQueue()
        self._closed = False

    def record(self, stream: int) -> Any:
        """An event at the end of ``stream``; the default stream is that of this device. After :meth:`close` it is a new one."""
        event = self._take()
        try:
            self._record(event, stream)
        except BaseException:
            self.give_back(event)
            raise
        return event

    def _take(self) -> Any:
        try:
            return self._free.get_nowait()
        except Empty:
            cuda = self._cuda
            with current_context(self._index):
                return check(cuda.cuEventCreate(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING), "cuEventCreate")

    def _record(self, event: Any, stream: int) -> None:
        cuda = self._cuda
        if stream in _DEFAULT_STREAMS and self.current_context() != self.context:  # whose default stream it is: the thread's context says
            with current_context(self._index):
                check(cuda.cuEventRecord(event, stream), "cuEventRecord")
        else:
            check(cuda.cuEventRecord(event, stream), "cuEventRecord")

    def current_context(self) -> int:
        """The context that the thread works in, 0 for none: one question instead of a push and a pop."""
        return int(check(self._cuda.cuCtxGetCurrent(), "cuCtxGetCurrent"))

    def make_wait(self, stream: int, event: Any) -> None:
        """Whatever is enqueued on ``stream`` from now on waits for ``event`` as it was recorded last."""
        check(self._cuda.cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent")

    def give_back(self, event: Any) -> None:
        """It may be used again: nobody asks about it any more."""
        self._free.put(event)
        if self._closed:  # after the put: either this or close() finds the event
            self._destroy_free()

    def is_reached(self, event: Any) -> bool:
        """Whether the device has reached ``event``.

        Raises:
            DeviceLostError: it never will.
        """
        (status,) = self._cuda.cuEventQuery(event)
        if int(status) == _NOT_READY:
            return False
        check((status,), "waiting for a launch of the actor")
        return True

    def wait(self, event: Any) -> None:
        """Block until the device has reached ``event``; the interpreter lock is free meanwhile.

        Raises:
            DeviceLostError: the device does not reach it any more.
        """
        check(self._cuda.cuEventSynchronize(event), "waiting for a launch of the actor")

    def close(self) -> None:
        """Destroy those that are free now, and the others when they come back: a caller whom a stop overtook may still be using some."""
        self._closed = True
        self._destroy_free()

    def _destroy_free(self) -> None:
        while True:
            try:
                event = self._free.get_nowait()
            except Empty:
                return
            self._cuda.cuEventDestroy(event)


class _Mark:
    """A place in a stream. Its event goes back when nobody asks about it any more."""

    __slots__ = ("_events", "event")

    def __init__(self, events: CudaEvents, stream: int) -> None:
        self._events = events
        self.event = events.record(stream)

    def __del__(self) -> None:
        if hasattr(self, "event"):
            self._events.give_back(self.event)


class _EventFlight(_Mark):
    """A launch on the GPU, which ends where this marks the actor's stream. ``alive``: what it needs besides the jobs."""

    __slots__ = ("_alive",)

    def __init__(self, events: CudaEvents, stream: int, alive: object) -> None:
        super().__init__(events, stream)
        self._alive = alive

    def poll(self) -> bool:
        return self._events.is_reached(self.event)

    def wait(self) -> None:
        self._events.wait(self.event)


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

    def attach(self) -> None:
        """Make the device's primary context, which torch uses too, current in this thread."""
        check(driver().cuCtxSetCurrent(primary_context(self.device.index)), "cuCtxSetCurrent")

    def accept(self, message: Message) -> Job:
        """As every inner; besides, mark where the caller's stream is now, if it is another than the actor's."""
        job = super().accept(message)
        if job.outputs is not None:
            theirs = current_stream(job.request.problem.q)
            if theirs != self._stream and not {theirs, self._stream} <= _DEFAULT_STREAMS:
                job.ready = _Mark(self._events, theirs)
        return job

    def prepare(self, message: FlashAttnMsg.Forward) -> Job:
        """A job with its outputs, and the plan of a launch like this one."""
        request = message.request
        plan = None if message.dropout_mask else find(key_of(request))
        if plan is None:
            return super().prepare(message)
        outputs = outputs_again(request, plan, lse=message.lse)
        return Job(message, outputs, plan=plan if outputs.out.strides == plan.out_strides else None)

    def is_quick(self, job: Job) -> bool:
        """One that repeats a launch, in a thread that works in the device's context."""
        if job.plan is None:
            return False
        current = self._events.current_context()
        if current == 0 and self.device.index == 0:  # what the CUDA runtime would make current here; let it stay
            self.attach()
            return True
        return current == self._events.context

    def launch(self, jobs: Sequence[Job]) -> Flight:
        """Enqueue on the actor's stream."""
        for job in jobs:
            if job.ready is not None:
                self._events.make_wait(self._stream, job.ready.event)
                job.ready = None
        alive: object = None
        if len(jobs) > 1:
            alive = launch_fused([(job.message, job.outputs) for job in jobs if job.outputs is not None], stream=self._stream)
        else:
            (job,) = jobs
            outputs = job.outputs
            assert outputs is not None  # noqa: S101 - only forward messages are launched
            if job.plan is None:
                fill(job.request, outputs, stream=self._stream)
            else:
                lse = None if outputs.lse is None else outputs.lse.ptr
                job.plan.launch.launch(self._stream, forward_pointers(job.request.problem, outputs.out, lse))
        return _EventFlight(self._events, self._stream, alive)

    def close(self) -> None:
        """Give back events and the stream."""
        self._events.close()
        if self._own_stream is not None:
            driver().cuStreamDestroy(self._own_stream)
