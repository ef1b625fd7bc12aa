"""Whether the arrays of a request still lie where they lay when it was made.

A request keeps its arrays alive, and not their memory: a tensor of torch can be given other data, storage and sizes, an array of NumPy can
be resized in place, and the memory of before may be somebody else's by now. So whoever runs a request looks first, and whoever keeps one
in flight looks again.

On a GPU the address and the shape are looked at: other memory has another address, because old and new exist side by side while one is
copied to the other. Host memory may change in its place, so there all of a description is read anew, and an array has to lie inside the
memory that it is a view of. Arrays that came through DLPack are lent for as long as their capsule lives, and are not looked at.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np

from ..arrays.read import is_cupy, read_array
from ..arrays.torch_hooks import hooks
from ..dispatch import FaBwdDispatch, FaFwdDispatch
from ..errors import ArrayTypeError, StaleArrayError
from ..kernels.forward import DESCALE_SLOTS
from ..problem import ArrayInfo, AttentionProblem, KvCache

__all__ = ["NO_ARRAYS", "Fingerprint", "arrays_beside", "arrays_of_cache", "check_array"]

_INPUTS: Final = ("q", "k", "v", "alibi_slopes", "learned_sink", "cu_seqlens_q", "cu_seqlens_k", "rng")
_BEHIND_LENGTHS: Final = ("left_pad", "k_new", "v_new", "cu_seqlens_new", "rotary_cos", "rotary_sin")
_NAMES: Final = (*_INPUTS, "out")
_BACKWARD_NAMES: Final = (*_INPUTS, "out", "lse", "dout", "dlse", "dq", "dk", "dv")
_SINCE_MADE: Final = "since the request was made"
_SINCE_ASK: Final = "between ask and reply"

_Read: TypeAlias = Callable[[Any], tuple[Any, Any]]
_readers: dict[type, _Read | None] = {}  # by class, how address and shape of a GPU array are read; None: they cannot change


class Fingerprint:
    """The arrays of a call, inputs and what the caller wants written, looked at as often as :meth:`check` is called."""

    __slots__ = ("_arrays", "_names")

    def __init__(self, arrays: tuple[ArrayInfo | None, ...] = (), names: tuple[str, ...] = ()) -> None:
        self._arrays = arrays
        self._names = names

    @staticmethod
    def of(request: FaFwdDispatch) -> Fingerprint:
        """Of a forward request, looked at once, now.

        Raises:
            StaleArrayError: an array is not what it was when the request was made.
        """
        arrays = (*_inputs(request.problem), request.out_array)
        cache = request.problem.cache
        names: tuple[str, ...] = _NAMES
        if cache is not None:
            arrays, names = (*arrays, *arrays_of_cache(cache)), _names_on_cache(cache.lengths_name)
        if request.problem.descales is not None:
            arrays, names = (*arrays, *_descales(request.problem)), (*names, *DESCALE_SLOTS)
        found = Fingerprint(arrays, names)
        found.check(_SINCE_MADE)
        return found

    @staticmethod
    def of_backward(request: FaBwdDispatch) -> Fingerprint:
        """The same of a backward request."""
        problem = request.problem
        arrays = (*_inputs(problem.forward), problem.out, problem.lse, problem.dout, problem.dlse, *request.gradient_arrays)
        found = Fingerprint(arrays, _BACKWARD_NAMES)
        found.check(_SINCE_MADE)
        return found

    def check(self, when: str = _SINCE_ASK) -> None:
        """Raise StaleArrayError where an array was freed, resized or moved. ``when``: for the message."""
        arrays = self._arrays
        plain = hooks.plain_types if arrays and arrays[0] and arrays[0].device[0] != "cpu" else ()
        for info in arrays:
            if info is None:
                continue
            source = info.source
            if (source.data_ptr() != info.ptr or source.shape != info.shape) if type(source) in plain else _moved(info):
                name = next(name for name, each in zip(self._names, arrays, strict=True) if each is info)
                raise _stale(name, info, when)

    def hold(self) -> list[Any]:
        """What keeps host memory in its place while it lives, as far as libraries let us. Then looks once more.

        NumPy resizes no array that there is a weak reference to. torch leaves memory alone that a second tensor has, except where the
        storage itself is resized, which torch's own operations do not survive in another thread either.
        """
        held: list[Any] = []
        torch = sys.modules.get("torch")
        for info in self._arrays:
            source = None if info is None else info.source
            if isinstance(source, np.ndarray):
                held += [weakref.ref(source), weakref.ref(_owner(source))]
            elif torch is not None and isinstance(source, torch.Tensor):
                held.append(source.detach())
        self.check(_SINCE_MADE)
        return held


NO_ARRAYS: Final = Fingerprint()


def check_array(info: ArrayInfo, name: str) -> None:
    """Raise StaleArrayError unless an array lies where it lay when ``info`` was read."""
    if _moved(info):
        raise _stale(name, info, "since it was read")


def _inputs(problem: AttentionProblem) -> tuple[ArrayInfo | None, ...]:
    """In the order of _INPUTS."""
    p, rng = problem, None if problem.dropout is None else problem.dropout.rng
    return p.q, p.k, p.v, p.alibi_slopes, p.learned_sink, p.cu_seqlens_q, p.cu_seqlens_k, rng


def arrays_beside(problem: AttentionProblem) -> tuple[ArrayInfo | None, ...]:
    """Lengths, tables, biases and the like: all that a forward reads beside q, k and v; new tokens of a cache among it."""
    _, _, _, *others = _inputs(problem)
    on_cache = () if problem.cache is None else arrays_of_cache(problem.cache)
    return (*others, *on_cache, *_descales(problem))


def _descales(problem: AttentionProblem) -> tuple[ArrayInfo | None, ...]:
    """In the order of DESCALE_SLOTS; none where K and V are not fp8."""
    return () if problem.descales is None else tuple(each and each.array for each in problem.descales)


def arrays_of_cache(cache: KvCache) -> tuple[ArrayInfo | None, ...]:
    """Those beside k and v, in the order of their names."""
    new = cache.new
    rotary = None if new is None else new.rotary
    tables = cache.blocks, cache.lengths, cache.left_pad
    of_new = (None,) * 3 if new is None else (new.k, new.v, new.cu_seqlens)
    return *tables, *of_new, *((None, None) if rotary is None else (rotary.cos, rotary.sin))


@lru_cache(maxsize=8)
def _names_on_cache(lengths: str) -> tuple[str, ...]:
    """Of the arrays of a call on a cache whose lengths the caller calls so."""
    return *_NAMES, "block_table", lengths, *_BEHIND_LENGTHS


def _moved(info: ArrayInfo) -> bool:
    source = info.source
    if info.device.kind == "cpu":
        return _moved_on_host(info)
    try:
        read = _readers[type(source)]
    except KeyError:
        read = _readers.setdefault(type(source), _reader_of(source))
    return read is not None and read(source) != (info.ptr, info.shape)


def _reader_of(source: Any) -> _Read | None:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        return lambda tensor: (tensor.data_ptr(), tensor.shape)
    if is_cupy(source):
        return lambda array: (int(array.data.ptr), array.shape)
    if not isinstance(source, tuple) and hasattr(source, "__cuda_array_interface__"):
        return _of_interface
    return None


def _of_interface(source: Any) -> tuple[Any, Any]:
    interface = source.__cuda_array_interface__
    return int(interface["data"][0] or 0), tuple(interface["shape"])


def _moved_on_host(info: ArrayInfo) -> bool:
    source = info.source
    torch = sys.modules.get("torch")
    is_torch = torch is not None and isinstance(source, torch.Tensor)
    if not is_torch and not isinstance(source, np.ndarray):
        return False
    try:
        if read_array(source, "array") != info:
            return True
    except ArrayTypeError:  # it has no memory any more
        return True
    if 0 in info.shape:
        return False
    if is_torch:
        storage = source.untyped_storage()
        first, size = storage.data_ptr(), storage.nbytes()
        itemsize = source.element_size()
    else:
        owner = _owner(source)
        if owner is source:
            return False
        first, size = _span(owner.ctypes.data, owner.shape, owner.strides, 1, owner.itemsize)
        itemsize = source.itemsize
    start, length = _span(info.ptr, info.shape, info.strides, itemsize, itemsize)
    return not first <= start <= start + length <= first + size


def _owner(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array whose memory this one is a view of, itself where it is none."""
    owner, base = array, getattr(array, "base", None)
    while base is not None:
        owner = base if isinstance(base, np.ndarray) else owner
        base = getattr(base, "base", None)
    return owner


def _span(ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], unit: int, itemsize: int) -> tuple[int, int]:
    """First byte and number of bytes of an array; ``unit``: bytes of a stride of 1."""
    steps = [(size - 1) * step * unit for size, step in zip(shape, strides, strict=True)]
    low, high = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
    return (ptr + low, high - low + itemsize) if all(shape) else (ptr, 0)


def _stale(name: str, info: ArrayInfo, when: str) -> StaleArrayError:
    return StaleArrayError(
        f"{name}: its memory changed {when}: an array of shape {info.shape} at address {info.ptr:#x} is there no more; "
        "allowed are arrays that are neither freed nor resized nor given other data; keep them as they are, or make the request anew"
    )
