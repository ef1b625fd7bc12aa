"""The error word of a GPU: an int32 that kernels over KV caches raise to one more than the number of a sequence that does not fit.

There is one for a device and process, in memory that is never freed, so that a captured graph may keep its address.
"""

from __future__ import annotations

import ctypes
import threading

from .counters import zeros
from .driver import check, current_context, driver

__all__ = ["devices_with_a_word", "error_word", "take_error"]

_BYTES = 4
_words: dict[int, int] = {}
_lock = threading.Lock()


def error_word(device_index: int) -> int:
    """Address of the word of a GPU, for a launch.

    Raises:
        LaunchError: there is no memory left for it.
    """
    word = _words.get(device_index)
    if word is None:
        with _lock:
            word = _words.get(device_index)
            if word is None:
                word = _words[device_index] = zeros(device_index, _BYTES)
    return word


def devices_with_a_word() -> tuple[int, ...]:
    """The GPUs on which a call over a KV cache was made."""
    return tuple(sorted(_words))


def take_error(device_index: int) -> int:
    """Wait for all work on a GPU; what its word holds, which is 0 from then on. Not while anything is captured on that GPU.

    Raises:
        LaunchError: a capture, or an earlier kernel that failed.
    """
    word = _words.get(device_index)
    if word is None:
        return 0
    cuda, found = driver(), ctypes.c_int32()
    with current_context(device_index):
        check(cuda.cuCtxSynchronize(), "waiting for a GPU")
        check(cuda.cuMemcpyDtoH(ctypes.addressof(found), word, _BYTES), "reading the error word")
        if found.value:
            check(cuda.cuMemsetD32(word, 0, 1), "clearing the error word")
            check(cuda.cuCtxSynchronize(), "clearing the error word")
    return found.value
