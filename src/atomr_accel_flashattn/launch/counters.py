"""The counters of persistent kernels: two int32 on the device that every launch leaves at zero.

Launches in one stream follow each other, so a stream needs one pair. It belongs to the stream's id, which CUDA never gives again: a handle
may come back while work of the stream that had it before still runs, and ``CU_STREAM_PER_THREAD`` is another stream in every thread. A
captured launch gets a pair of its own, because its graph may be replayed beside anything, other graphs of the same stream included; the
graph must not run beside a second instance of itself, as its outputs do not allow either.

Pairs are cut from blocks of memory that are never freed: 8 bytes for every stream that was ever launched into, and for every captured
launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

from .driver import check, current_context, driver, driver_function

__all__ = ["LEGACY_STREAMS", "clear", "counters_for", "zeros"]

_PAIR = 8  # bytes
_PAIRS = 1 << 16  # in a block of 512 KB
LEGACY_STREAMS = 1  # handles up to this one, 0 and CU_STREAM_LEGACY, are the legacy default stream, which cannot be captured


class _Pool:
    """Pairs of one device. ``known``: by the id of their stream."""

    def __init__(self, device_index: int) -> None:
        self.known: dict[int, int] = {}
        self._device_index = device_index
        self._lock = threading.Lock()
        self._next = self._end = 0

    def of_stream(self, identity: int) -> int:
        """The pair of the stream with this id."""
        pair = self.known.get(identity)
        if pair is None:
            with self._lock:
                pair = self.known.get(identity)
                if pair is None:
                    pair = self.known[identity] = self._cut()
        return pair

    def of_capture(self) -> int:
        """A pair that nobody else gets."""
        with self._lock:
            return self._cut()

    def _cut(self) -> int:
        if self._next == self._end:
            self._next = zeros(self._device_index, _PAIR * _PAIRS)
            self._end = self._next + _PAIR * _PAIRS
        self._next += _PAIR
        return self._next - _PAIR


class _Question:
    """Is this stream captured, and if it is not, which one is it? With room for the answers.

    ``is_capturing(*capturing_arguments)`` fills ``capturing``, ``get_id(*identity_arguments)`` fills ``identity``. The arguments are
    converted once for as long as questions are about the same handle; the answers may differ each time.
    """

    __slots__ = ("capturing", "capturing_arguments", "get_id", "identity", "identity_arguments", "is_capturing", "stream")

    def __init__(self, stream: int) -> None:
        self.capturing, self.identity = ctypes.c_int(), ctypes.c_uint64()
        self.is_capturing, self.get_id = driver_function("cuStreamIsCapturing"), driver_function("cuStreamGetId")
        self.aim(stream)

    def aim(self, stream: int) -> None:
        """Be about ``stream``."""
        handle = ctypes.byref(ctypes.c_char.from_address(stream))  # never read: a CUstream is a handle
        self.capturing_arguments = (handle, ctypes.byref(self.capturing))
        self.identity_arguments = (handle, ctypes.byref(self.identity))
        self.stream = stream

    def ask(self) -> int:
        """Fill ``capturing``, and ``identity`` when that is 0; the CUresult."""
        code: int = self.is_capturing(*self.capturing_arguments)
        if code == 0 and not self.capturing.value:
            code = self.get_id(*self.identity_arguments)
        return code


class _ThreadQuestion(threading.local):
    """Another thread may ask while the driver answers us."""

    def __init__(self) -> None:
        self.question: _Question | None = None


_thread = _ThreadQuestion()
_pools: dict[int, _Pool] = {}
_pools_lock = threading.Lock()


def counters_for(device_index: int, stream: int) -> int:
    """Address of two zeros for one launch into ``stream`` (a raw CUstream) of GPU ``device_index``, now, by this thread.

    Raises:
        LaunchError: there is no memory left for them, or ``stream`` is none.
    """
    pool = _pools.get(device_index) or _new_pool(device_index)
    if stream <= LEGACY_STREAMS:
        return pool.of_stream(0)
    asked = _thread.question
    if asked is None:
        asked = _thread.question = _Question(stream)
    elif asked.stream != stream:
        asked.aim(stream)
    if asked.ask():  # in a thread without a context, or with a foreign one
        with current_context(device_index):
            check((asked.ask(),), f"asking for the capture and the id of stream {stream:#x}")
    if asked.capturing.value:
        return pool.of_capture()
    identity = asked.identity.value
    return pool.known.get(identity) or pool.of_stream(identity)


def _new_pool(device_index: int) -> _Pool:
    with _pools_lock:
        return _pools.setdefault(device_index, _Pool(device_index))


def zeros(device_index: int, size: int) -> int:
    """Address of new device memory that holds zeros when this returns, whatever is captured meanwhile, by this thread or another."""
    with current_context(device_index), _beside_captures():
        cuda = driver()
        address = int(check(cuda.cuMemAlloc(size), "allocating zeros"))
        stream = check(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING), "a stream to clear memory in")
        check(cuda.cuMemsetD8Async(address, 0, size, stream), "clearing memory")
        check(cuda.cuStreamSynchronize(stream), "clearing memory")
        check(cuda.cuStreamDestroy(stream), "a stream to clear memory in")
    return address


def clear(device_index: int, address: int, size: int, stream: int) -> None:
    """Set device memory to zero on ``stream``; when this returns, it is done or, where the stream is captured, part of the graph."""
    with current_context(device_index), _beside_captures():
        cuda = driver()
        check(cuda.cuMemsetD8Async(address, 0, size, stream), "clearing memory")
        if stream > LEGACY_STREAMS and int(check(cuda.cuStreamIsCapturing(stream), "asking for the capture of a stream")):
            return
        check(cuda.cuStreamSynchronize(stream), "clearing memory")


@contextlib.contextmanager
def _beside_captures() -> Iterator[None]:
    """Allow this thread what captures forbid by default, because it might be meant to be replayed; what is done inside is not."""
    cuda = driver()
    relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(cuda.cuThreadExchangeStreamCaptureMode(relaxed), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        check(cuda.cuThreadExchangeStreamCaptureMode(before), "cuThreadExchangeStreamCaptureMode")
