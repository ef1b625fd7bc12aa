"""Whether the arrays of a request are still the ones it was made of.

A request keeps its arrays alive, but not their memory: torch can resize a storage to nothing, NumPy can resize an array in place, and
both can then hand the memory to somebody else. On a GPU other memory has another address, because old and new exist side by side while
one is copied to the other; host memory may shrink where it is. So the address is looked at, and on the host shape and size too, before
and after each launch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from ..dispatch import FaFwdDispatch
from ..errors import StaleArrayError
from ..problem import ArrayInfo

__all__ = ["NO_ARRAYS", "Fingerprint"]

_Read: TypeAlias = Callable[[Any], Any]
_QKV: Final = ("q", "k", "v")
_SINCE_MADE: Final = "since the request was made"
_SINCE_ASK: Final = "between ask and reply"


class _Readers(NamedTuple):
    """How arrays of a class are looked at: ``address`` on a GPU, ``facts`` (address, shape, bytes of storage) on the host.

    None of those that cannot change.
    """

    address: _Read | None = None
    facts: _Read | None = None


_readers: dict[type, _Readers] = {}


class Fingerprint:
    """Of every array of a call whose library lets it change, what tells its memory from other memory.

    On a GPU that is the address that the request was made with, and nothing else is kept.
    """

    __slots__ = ("_arrays", "_names")

    def __init__(self, names: Sequence[str], arrays: Sequence[ArrayInfo]) -> None:
        self._names = names
        self._arrays = arrays

    @staticmethod
    def of(request: FaFwdDispatch) -> Fingerprint:
        """Of the inputs, and of the caller's ``out``: all on one device, as requests see to.

        Raises:
            StaleArrayError: one is not what it was when the request was made.
        """
        problem = request.problem
        if request.out_array or problem.alibi_slopes or problem.learned_sink or problem.cu_seqlens_q or problem.dropout:
            names, arrays = _arrays_of(request)
        else:
            names, arrays = _QKV, (problem.q, problem.k, problem.v)
        if problem.q.device.kind == "cpu":
            return _HostFingerprint(names, arrays)
        fingerprint = Fingerprint(names, arrays)
        fingerprint.check(_SINCE_MADE)
        return fingerprint

    def check(self, when: str = _SINCE_ASK) -> None:
        """Look again.

        Args:
            when: something may have happened, for the error.

        Raises:
            StaleArrayError: an array was freed, resized or moved.
        """
        for info in self._arrays:
            source = info.source
            read = (_readers.get(type(source)) or _readers_of(source)).address
            now = info.ptr if read is None else read(source)
            if now != info.ptr:
                raise self._stale(info, when, info.ptr, now)

    def _stale(self, array: ArrayInfo, when: str, before: Any, now: Any) -> StaleArrayError:
        name = next(name for name, info in zip(self._names, self._arrays, strict=True) if info is array)
        return StaleArrayError(
            f"{name}: its memory changed {when}: address (and shape and size) were {before} and are {now}; allowed are arrays that are "
            "neither freed nor resized before the reply; keep them as they are until then, or send a copy"
        )


class _HostFingerprint(Fingerprint):
    """On the host, where memory may shrink in its place, what was seen at ask is kept."""

    __slots__ = ("_facts",)

    def __init__(self, names: Sequence[str], arrays: Sequence[ArrayInfo]) -> None:
        super().__init__(names, arrays)
        self._facts = [_facts_of(info) for info in arrays]
        for info, facts in zip(arrays, self._facts, strict=True):
            if facts is not None and facts[:2] != (info.ptr, info.shape):
                raise self._stale(info, _SINCE_MADE, (info.ptr, info.shape), facts)

    def check(self, when: str = _SINCE_ASK) -> None:
        for info, before in zip(self._arrays, self._facts, strict=True):
            now = _facts_of(info)
            if now != before:
                raise self._stale(info, when, before, now)


NO_ARRAYS: Final = Fingerprint((), ())


def _arrays_of(request: FaFwdDispatch) -> tuple[Sequence[str], Sequence[ArrayInfo]]:
    """Their names, and what they are."""
    problem, dropout = request.problem, request.problem.dropout
    named = {
        "q": problem.q,
        "k": problem.k,
        "v": problem.v,
        "alibi_slopes": problem.alibi_slopes,
        "learned_sink": problem.learned_sink,
        "cu_seqlens_q": problem.cu_seqlens_q,
        "cu_seqlens_k": problem.cu_seqlens_k,
        "rng": None if dropout is None else dropout.rng,
        "out": request.out_array,
    }
    present = {name: info for name, info in named.items() if info is not None}
    return list(present), list(present.values())


def _facts_of(info: ArrayInfo) -> Any:
    read = (_readers.get(type(info.source)) or _readers_of(info.source)).facts
    return None if read is None else read(info.source)


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
