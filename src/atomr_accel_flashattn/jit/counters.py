"""The counters of persistent kernels: two int32 on the device that every launch leaves at zero.

Launches in one stream follow each other, so a stream needs one pair. A captured launch gets a pair of its own, because its graph may be
replayed beside anything. Pairs are cut from blocks of memory that are never freed; memory cannot be allocated during a capture, so a block
is made at the first launch, before.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

from ..errors import LaunchError
from .driver import check, current_context, driver, driver_function

__all__ = ["counters_for"]

_PAIR = 8  # bytes
_PAIRS = 1 << 16  # in a block of 512 KB


class _Pool:
    """Pairs of one device."""

    def __init__(self, device_index: int) -> None:
        self._device_index = device_index
        self._lock = threading.Lock()
        self._of_stream: dict[int, int] = {}
        self._next = self._end = 0

    def of_stream(self, stream: int) -> int:
        """The pair of a stream."""
        pair = self._of_stream.get(stream)
        if pair is None:
            with self._lock:
                pair = self._of_stream.get(stream) or self._cut(capturing=False)
                self._of_stream[stream] = pair
        return pair

    def of_capture(self) -> int:
        """A pair that nobody else gets."""
        with self._lock:
            return self._cut(capturing=True)

    def _cut(self, *, capturing: bool) -> int:
        if self._next == self._end:
            if capturing:
                raise LaunchError("no counters are left for a captured launch; make one launch outside the capture first")
            with current_context(self._device_index):
                cuda, size = driver(), _PAIR * _PAIRS
                self._next = int(check(cuda.cuMemAlloc(size), "allocating counters"))
                check(cuda.cuMemsetD8(self._next, 0, size), "clearing counters")
                check(cuda.cuCtxSynchronize(), "clearing counters")
            self._end = self._next + size
        self._next += _PAIR
        return self._next - _PAIR


@cache
def _pool(device_index: int) -> _Pool:
    return _Pool(device_index)


@cache
def _is_capturing() -> Any:
    return driver_function("cuStreamIsCapturing")


def counters_for(device_index: int, stream: int) -> int:
    """Address of two zeros for one launch into ``stream`` (a raw CUstream) of GPU ``device_index``.

    Raises:
        LaunchError: a capture that begins before the first launch.
    """
    status = ctypes.c_int(0)
    _is_capturing()(ctypes.c_void_p(stream), ctypes.byref(status))
    return _pool(device_index).of_capture() if status.value else _pool(device_index).of_stream(stream)
