"""Whether the arrays of a request are still the ones it was made of.

A request keeps its arrays alive, but not their memory: torch can resize a storage to nothing, NumPy can resize an array in place, and
both can then hand the memory to somebody else. What is looked at costs 0.2 us an array, so it is looked at before and after each launch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ..dispatch import FaFwdDispatch
from ..errors import StaleArrayError

__all__ = ["Fingerprint"]

_Read: TypeAlias = Callable[[Any], tuple[Any, ...]]  # (address, shape, bytes of storage); () of arrays that cannot change
_readers: dict[type, _Read] = {}


class Fingerprint:
    """Address, shape and storage of every array of a call whose library lets them change."""

    __slots__ = ("_seen",)

    def __init__(self, seen: list[tuple[str, Any, _Read, tuple[Any, ...]]]) -> None:
        self._seen = seen

    @classmethod
    def of(cls, request: FaFwdDispatch) -> Fingerprint:
        """Of the inputs, and of the caller's ``out``.

        Raises:
            StaleArrayError: one is not what it was when the request was made.
        """
        problem = request.problem
        named = [("q", problem.q), ("k", problem.k), ("v", problem.v)]
        for name, info in (
            ("alibi_slopes", problem.alibi_slopes),
            ("learned_sink", problem.learned_sink),
            ("cu_seqlens_q", problem.cu_seqlens_q),
            ("cu_seqlens_k", problem.cu_seqlens_k),
            ("rng", None if problem.dropout is None else problem.dropout.rng),
            ("out", request.out_array),
        ):
            if info is not None:
                named.append((name, info))
        seen = []
        for name, info in named:
            source = info.source
            read = _readers.get(type(source)) or _reader(source)
            facts = read(source)
            if not facts:
                continue
            if info.ptr != facts[0] or info.shape != facts[1]:
                raise _stale(name, "since the request was made", (info.ptr, info.shape), facts)
            seen.append((name, source, read, facts))
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


def _reader(source: Any) -> _Read:
    """What reads the facts of arrays of this class."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    read = _nothing
    if torch is not None and isinstance(source, torch.Tensor):
        read = _of_torch
    elif isinstance(source, np.ndarray):
        read = _of_numpy
    elif cupy is not None and isinstance(source, cupy.ndarray):
        read = _of_cupy
    return _readers.setdefault(type(source), read)


def _of_torch(source: Any) -> tuple[Any, ...]:
    return source.data_ptr(), source.shape, source.untyped_storage().nbytes()


def _of_numpy(source: Any) -> tuple[Any, ...]:
    return source.ctypes.data, source.shape


def _of_cupy(source: Any) -> tuple[Any, ...]:
    return int(source.data.ptr), tuple(source.shape)


def _nothing(source: Any) -> tuple[Any, ...]:  # noqa: ARG001 - as the others
    return ()


def _stale(name: str, when: str, before: Any, now: Any) -> StaleArrayError:
    return StaleArrayError(
        f"{name}: its memory changed {when}: (address, shape, ...) were {before} and are {now}; allowed are arrays that are neither "
        "freed nor resized before the reply; keep them as they are until then, or send a copy"
    )
