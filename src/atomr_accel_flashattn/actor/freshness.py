"""Whether the arrays of a request are still the ones it was made of.

A request keeps its arrays alive, but not their memory: torch can resize a storage to nothing, NumPy can resize an array in place, and
both can then hand the memory to somebody else. On a GPU other memory has another address, because old and new exist side by side while
one is copied to the other; host memory may shrink where it is. So the address is looked at, and on the host shape and size too, before
and after each launch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..dispatch import FaFwdDispatch
from ..errors import StaleArrayError

__all__ = ["Fingerprint"]

_Read: TypeAlias = Callable[[Any], Any]


class _Readers(NamedTuple):
    """How arrays of a class are looked at: ``address`` on a GPU, ``facts`` (address, shape, bytes of storage) on the host.

    None of those that cannot change.
    """

    address: _Read | None = None
    facts: _Read | None = None


_readers: dict[type, _Readers] = {}


class Fingerprint:
    """Of every array of a call whose library lets it change, what tells its memory from other memory."""

    __slots__ = ("_seen",)

    def __init__(self, seen: list[tuple[str, Any, _Read, Any]]) -> None:
        self._seen = seen

    @classmethod
    def of(cls, request: FaFwdDispatch) -> Fingerprint:
        """Of the inputs, and of the caller's ``out``.

        Raises:
            StaleArrayError: one is not what it was when the request was made.
        """
        problem = request.problem
        seen: list[tuple[str, Any, _Read, Any]] = []
        for name, info in (
            ("q", problem.q),
            ("k", problem.k),
            ("v", problem.v),
            ("alibi_slopes", problem.alibi_slopes),
            ("learned_sink", problem.learned_sink),
            ("cu_seqlens_q", problem.cu_seqlens_q),
            ("cu_seqlens_k", problem.cu_seqlens_k),
            ("rng", None if problem.dropout is None else problem.dropout.rng),
            ("out", request.out_array),
        ):
            if info is None:
                continue
            source = info.source
            address, facts = _readers.get(type(source)) or _readers_of(source)
            on_host = info.device.kind == "cpu"
            read = facts if on_host else address
            if read is None:
                continue
            now, made = read(source), info.ptr
            if now != made and not (on_host and now[:2] == (made, info.shape)):
                raise _stale(name, "since the request was made", (made, info.shape), now)
            seen.append((name, source, read, now))
        return cls(seen)

    def check(self) -> None:
        """Look again.

        Raises:
            StaleArrayError: an array was freed, resized or moved.
        """
        for name, source, read, before in self._seen:
            now = read(source)
            if now != before:
                raise _stale(name, "between ask and reply", before, now)


def _readers_of(source: Any) -> _Readers:
    """Those of the class of ``source``, to be found at once by the next."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    found = _Readers()
    if torch is not None and isinstance(source, torch.Tensor):
        found = _Readers(torch.Tensor.data_ptr, _of_torch)
    elif isinstance(source, np.ndarray):
        found = _Readers(facts=_of_numpy)
    elif cupy is not None and isinstance(source, cupy.ndarray):
        found = _Readers(_of_cupy)
    return _readers.setdefault(type(source), found)


def _of_torch(source: Any) -> tuple[Any, ...]:
    return source.data_ptr(), source.shape, source.untyped_storage().nbytes()


def _of_numpy(source: Any) -> tuple[Any, ...]:
    return source.ctypes.data, source.shape


def _of_cupy(source: Any) -> int:
    return int(source.data.ptr)


def _stale(name: str, when: str, before: Any, now: Any) -> StaleArrayError:
    return StaleArrayError(
        f"{name}: its memory changed {when}: address (and shape and size) were {before} and are {now}; allowed are arrays that are neither "
        "freed nor resized before the reply; keep them as they are until then, or send a copy"
    )
