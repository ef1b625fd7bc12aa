"""check: whether the calls over KV caches on a GPU had room for all their tokens."""

from __future__ import annotations

from typing import Any

from ..errors import CacheOverflowError, DeviceMismatchError
from ..launch.error_word import devices_with_a_word, take_error
from ..limits import is_integer

__all__ = ["check"]


def check(device: int | None = None) -> None:
    """Raise what calls over KV caches on GPUs could not: lengths that lie on a GPU are not looked at by a call.

    Where a sequence of a call, or of a replay of a graph, has more tokens than slots, a token has no row of rotary embedding or no page, or
    a length, a padding or a row of a contiguous cache is none, what does not fit is not written, attention covers what fits, and the error
    word of the GPU is set. This waits for all work on the GPU, reads the word and clears it. It costs a synchronisation, so call it now and
    then, in no capture, and not while another thread makes calls. In host memory lengths are checked by the call, which raises a
    SeqLensError and writes nothing.

    Args:
        device: number of a GPU; None is every one on which there were calls over KV caches.

    Raises:
        CacheOverflowError: names the sequence; of several, the last in its batch. Of several GPUs, the others keep theirs.
        DeviceMismatchError: ``device`` is no number of a GPU.
        RuntimeFlashAttnError: an earlier kernel failed, or a graph is being captured.
    """
    given: Any = device
    if given is not None and not (is_integer(given) and given >= 0):
        raise DeviceMismatchError(f"device: got {given!r}; allowed are None and the number of a GPU")
    for index in devices_with_a_word() if device is None else (int(given),):
        found = take_error(index)
        if found:
            raise CacheOverflowError(found - 1, index)
