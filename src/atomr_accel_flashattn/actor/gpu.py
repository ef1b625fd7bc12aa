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

from ..arrays.streams import LEGACY_DEFAULT_STREAM, current_stream, raw_stream
from ..errors import PropsError
from ..launch.driver import check, current_context, driver, primary_context
from ..runtime.execute import fill, make_outputs
from ..runtime.plan import find
from ..types import Device
from .fusion import launch_fused
from .inner import FlashAttnInner, Flight, Job
from .messages import FlashAttnMsg, Message

__all__ = ["CudaEvents", "GpuInner"]

_DEFAULT_STREAMS: Final = frozenset({0, LEGACY_DEFAULT_STREAM})
_PER_THREAD: Final = 2  # CU_STREAM_PER_THREAD
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

    def record(self, stream: int, *, at_home: bool = False) -> Any:
        """An event at the end of ``stream``. After :meth:`close` it is a new one. ``at_home``: see :meth:`record_again`."""
        try:
            event = self._free.get_nowait()
        except Empty:
            event = self._new()
        try:
            self.record_again(event, stream, at_home=at_home)
        except BaseException:
            self.give_back(event)
            raise
        return event

    def record_again(self, event: Any, stream: int, *, at_home: bool) -> None:
        """Let ``event`` be at the end of ``stream`` from now on; the default stream is that of this device. Who waits already is not moved.

        ``at_home``: the thread is known to work in the device's context, which says whose the default stream is.
        """
        if at_home or stream not in _DEFAULT_STREAMS or self.current_context() == self.context:
            result = self._cuda.cuEventRecord(event, stream)
        else:
            with current_context(self._index):
                result = self._cuda.cuEventRecord(event, stream)
        if result[0]:
            check(result, "cuEventRecord")

    def _new(self) -> Any:
        cuda = self._cuda
        with current_context(self._index):
            return check(cuda.cuEventCreate(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING), "cuEventCreate")

    def current_context(self) -> int:
        """The context that the thread works in, 0 for none: one question instead of a push and a pop."""
        status, context = self._cuda.cuCtxGetCurrent()
        if status:
            check((status,), "cuCtxGetCurrent")
        return int(context)

    def make_wait(self, stream: int, event: Any) -> None:
        """Whatever is enqueued on ``stream`` from now on waits for ``event`` as it was recorded last."""
        result = self._cuda.cuStreamWaitEvent(stream, event, 0)
        if result[0]:
            check(result, "cuStreamWaitEvent")

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
        if status == _NOT_READY:
            return False
        if status:
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
    """A place in a stream: where a launch begins that waits for it, and then, moved to the actor's stream, where that launch ends.

    Its event goes back when nobody asks about it any more. ``alive``: what the launch needs besides the jobs.
    """

    __slots__ = ("_events", "alive", "event")

    def __init__(self, events: CudaEvents, stream: int, *, at_home: bool = False) -> None:
        self._events = events
        self.alive: object = None
        self.event = events.record(stream, at_home=at_home)

    def poll(self) -> bool:
        return self._events.is_reached(self.event)

    def wait(self) -> None:
        self._events.wait(self.event)

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

    def accept(self, message: Message) -> Job:
        """As every inner; besides, mark where the caller's stream is now, if it is another than the actor's."""
        job = super().accept(message)
        if job.outputs is not None:
            theirs = current_stream(message.request.problem.q)
            if theirs != self._stream and not (self._on_default and theirs in _DEFAULT_STREAMS):
                job.ready = _Mark(self._events, theirs, at_home=job.quick)
        return job

    def prepare(self, message: FlashAttnMsg.Forward) -> Job:
        """A job with its outputs, and the plan of a launch like this one."""
        request = message.request
        plan = None if message.dropout_mask else find(request)
        if plan is None:
            return super().prepare(message)
        outputs = make_outputs(request, plan, lse=message.lse)
        if outputs.out.strides != plan.out_strides:
            return Job(message, outputs)
        return Job(message, outputs, plan=plan, quick=self._is_at_home())

    def _is_at_home(self) -> bool:
        """Whether this thread works in the device's context, as launches that are repeated want it."""
        current = self._events.current_context()
        if current == 0 and self.device.index == 0:  # what the CUDA runtime would make current here; let it stay
            self.attach()
            return True
        return current == self._events.context

    def launch(self, jobs: Sequence[Job]) -> Flight:
        """Enqueue on the actor's stream. The mark that one of the jobs waited for becomes that of the end."""
        mark: _Mark | None = None
        for job in jobs:
            if job.ready is not None:
                mark = job.ready
                self._events.make_wait(self._stream, mark.event)
        alive: object = None
        if len(jobs) > 1:
            alive = launch_fused([(job.message, job.outputs) for job in jobs if job.outputs is not None], stream=self._stream)
        else:
            self._launch_one(jobs[0])
        if mark is None:
            mark = _Mark(self._events, self._stream)
        else:
            self._events.record_again(mark.event, self._stream, at_home=False)
        mark.alive = alive
        for job in jobs:
            job.ready = None
        return mark

    def _launch_one(self, job: Job) -> None:
        request, outputs, plan = job.message.request, job.outputs, job.plan
        assert outputs is not None  # noqa: S101 - only forward messages are launched
        fill(request, outputs, plan, stream=self._stream)

    def close(self) -> None:
        """Give back events and the stream."""
        self._events.close()
        if self._own_stream is not None:
            driver().cuStreamDestroy(self._own_stream)
