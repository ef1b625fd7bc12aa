"""Whether the arrays of a request are still the ones it was made of.

A request keeps its arrays alive, but not their memory: torch can resize a storage to nothing, NumPy can resize an array in place, and
both can then hand the memory to somebody else. What is looked at costs 0.2 us an array, so it is looked at before and after each launch.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..dispatch import FaFwdDispatch
from ..errors import StaleArrayError
from ..problem import ArrayInfo

__all__ = ["Fingerprint"]


class Fingerprint:
    """Address, shape and storage of every array of a call whose library lets them change."""

    __slots__ = ("_seen",)

    def __init__(self, seen: list[tuple[str, Any, tuple[Any, ...]]]) -> None:
        self._seen = seen

    @classmethod
    def of(cls, request: FaFwdDispatch) -> Fingerprint:
        """Of the inputs, and of the caller's ``out``.

        Raises:
            StaleArrayError: one is not what it was when the request was made.
        """
        seen = []
        for name, info in _arrays(request):
            facts = _facts(info.source)
            if facts is None:
                continue
            if info.ptr != facts[0] or info.shape != facts[1]:
                raise _stale(name, "since the request was made", (info.ptr, info.shape), facts)
            seen.append((name, info.source, facts))
        return cls(seen)

    def check(self) -> None:
        """Look again.

        Raises:
            StaleArrayError: an array was freed, resized or moved.
        """
        for name, source, before in self._seen:
            now = _facts(source)
            if now != before:
                raise _stale(name, "between ask and reply", before, now)


def _arrays(request: FaFwdDispatch) -> list[tuple[str, ArrayInfo]]:
    problem = request.problem
    named = [
        ("q", problem.q),
        ("k", problem.k),
        ("v", problem.v),
        ("alibi_slopes", problem.alibi_slopes),
        ("learned_sink", problem.learned_sink),
        ("cu_seqlens_q", problem.cu_seqlens_q),
        ("cu_seqlens_k", problem.cu_seqlens_k),
        ("rng", None if problem.dropout is None else problem.dropout.rng),
        ("out", request.out_array),
    ]
    return [(name, info) for name, info in named if info is not None]


def _facts(source: Any) -> tuple[Any, ...] | None:
    """(address, shape, bytes of storage); None for arrays that cannot change."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        return source.data_ptr(), tuple(source.shape), source.untyped_storage().nbytes()
    if isinstance(source, np.ndarray):
        return source.ctypes.data, source.shape
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(source, cupy.ndarray):
        return int(source.data.ptr), tuple(source.shape)
    return None


def _stale(name: str, when: str, before: Any, now: Any) -> StaleArrayError:
    return StaleArrayError(
        f"{name}: its memory changed {when}: (address, shape, ...) were {before} and are {now}; allowed are arrays that are neither "
        "freed nor resized before the reply; keep them as they are until then, or send a copy"
    )
