"""Whether the arrays of a request are still the ones it was made of.

A request keeps its arrays alive, but not their memory: torch can resize a storage to nothing, NumPy
can resize an array in place, and both can then hand the memory to somebody else. On a GPU other
memory has another address, because old and new exist side by side while one is copied to the other;
host memory may shrink where it is. So the address is looked at, and on the host shape and size too,
before and after each launch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from ..dispatch import FaFwdDispatch
from ..errors import StaleArrayError
from ..problem import ArrayInfo

__all__ = ["NO_ARRAYS", "Fingerprint"]

_QKV: Final = ("q", "k", "v")
_SINCE_MADE: Final = "since the request was made"
_SINCE_ASK: Final = "between ask and reply"

_Read: TypeAlias = Callable[[Any], Any] | None
_readers: dict[type, tuple[_Read, _Read]] = {}
"""By class: address on a GPU, facts (address, shape, ...) on the host; None: cannot change."""


class Fingerprint:
    """What tells the memory of a call's arrays from other memory.

    On a GPU that is the address that the request was made with; on the host, what was seen at ask.
    """

    __slots__ = ("_arrays", "_facts", "_names")

    def __init__(self, names: Sequence[str] = (), arrays: Sequence[ArrayInfo] = ()) -> None:
        self._names = names
        self._arrays = arrays
        self._facts: list[Any] | None = None

    @staticmethod
    def of(request: FaFwdDispatch) -> Fingerprint:
        """Of the inputs, and of the caller's ``out``: all on one device, as requests see to.

        Raises:
            StaleArrayError: one is not what it was when the request was made.
        """
        problem = request.problem
        if request.out_array or problem.alibi_slopes or problem.learned_sink or problem.cu_seqlens_q or problem.dropout:
            found = Fingerprint(*_arrays_of(request))
        else:
            found = Fingerprint(_QKV, (problem.q, problem.k, problem.v))
        if problem.q.device.kind == "cpu":
            found._read_facts()
        else:
            found.check(_SINCE_MADE)
        return found

    def _read_facts(self) -> None:
        self._facts = [_facts_of(info) for info in self._arrays]
        for info, facts in zip(self._arrays, self._facts, strict=True):
            if facts is not None and facts[:2] != (info.ptr, info.shape):
                raise self._stale(info, _SINCE_MADE, (info.ptr, info.shape), facts)

    def check(self, when: str = _SINCE_ASK) -> None:
        """Raise StaleArrayError if an array was freed, resized or moved. ``when``: for the text."""
        if self._facts is not None:
            for info, before in zip(self._arrays, self._facts, strict=True):
                facts = _facts_of(info)
                if facts != before:
                    raise self._stale(info, when, before, facts)
            return
        for info in self._arrays:
            source = info.source
            read = (_readers.get(type(source)) or _readers_of(source))[0]
            address = info.ptr if read is None else read(source)
            if address != info.ptr:
                raise self._stale(info, when, info.ptr, address)

    def _stale(self, array: ArrayInfo, when: str, before: Any, now: Any) -> StaleArrayError:
        name = next(name for name, info in zip(self._names, self._arrays, strict=True) if info is array)
        return StaleArrayError(
            f"{name}: its memory changed {when}: address (and shape and size) were {before} and are {now}; allowed are arrays that are "
            "neither freed nor resized before the reply; keep them as they are until then, or send a copy"
        )


NO_ARRAYS: Final = Fingerprint()


def _arrays_of(request: FaFwdDispatch) -> tuple[Sequence[str], Sequence[ArrayInfo]]:
    """Their names, and what they are."""
    problem = request.problem
    named = {name: getattr(problem, name) for name in (*_QKV, "alibi_slopes", "learned_sink", "cu_seqlens_q", "cu_seqlens_k")}
    named |= {"rng": None if problem.dropout is None else problem.dropout.rng, "out": request.out_array}
    present = {name: info for name, info in named.items() if info is not None}
    return list(present), list(present.values())


def _facts_of(info: ArrayInfo) -> Any:
    read = (_readers.get(type(info.source)) or _readers_of(info.source))[1]
    return None if read is None else read(info.source)


def _readers_of(source: Any) -> tuple[_Read, _Read]:
    """Those of the class of ``source``, to be found at once by the next."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    found: tuple[_Read, _Read] = (None, None)
    if torch is not None and isinstance(source, torch.Tensor):
        found = (torch.Tensor.data_ptr, lambda tensor: (tensor.data_ptr(), tensor.shape, tensor.untyped_storage().nbytes()))
    elif isinstance(source, np.ndarray):
        found = (None, lambda array: (array.ctypes.data, array.shape))
    elif cupy is not None and isinstance(source, cupy.ndarray):
        found = (lambda array: int(array.data.ptr), None)
    return _readers.setdefault(type(source), found)
