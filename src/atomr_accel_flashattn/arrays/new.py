"""New arrays in the library of another one, and views and copies of arrays for functional calls."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import prod
from typing import Any, Final

import numpy as np

from ..errors import ArrayTypeError, HeadDimError, OutputError, StrideError
from ..problem import ArrayInfo
from .device_array import DeviceArray
from .read import as_numpy, is_cupy, jax_array_of, numpy_dtype, read_array, user_array
from .torch_hooks import tell_written

__all__ = [
    "can_write_at",
    "check_can_copy",
    "copy_into",
    "detached",
    "draw_seed",
    "draw_seed_and_offset",
    "empty_like_framework",
    "empty_torch",
    "empty_workspace",
    "filled_int32",
    "in_library_of",
    "int32_like",
    "pad_last",
    "row_major",
    "unbind",
    "write_at",
]

_LOWEST, _HIGHEST = -(2**63), 2**63 - 1  # of a seed and an offset, the highest excluded
_ALIGNMENT: Final = 64  # of host memory that JAX takes over without a copy


def empty_like_framework(like: ArrayInfo, shape: tuple[int, ...], dtype_name: str | None = None) -> ArrayInfo:
    """A new uninitialised array in the library and on the device of ``like``: torch, NumPy, CuPy, DeviceArray.

    For a library that we cannot allocate with it is a NumPy array in host memory, and a DeviceArray on a GPU; see :func:`in_library_of`.
    It is row-major, except that a torch tensor of the same shape and type keeps the order of its dimensions, as ``torch.empty_like`` does.
    """
    source, name = like.source, dtype_name or like.dtype_name
    torch = sys.modules.get("torch")
    array: Any
    if torch is not None and isinstance(source, torch.Tensor):
        array = empty_torch(source, shape, getattr(torch, name))
    elif isinstance(source, np.ndarray):
        array = np.empty(shape, numpy_dtype(name))
    elif isinstance(source, DeviceArray):
        array = DeviceArray.empty(shape, name, like.device.index)
    elif is_cupy(source):
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device.index):
            array = cupy.empty(shape, numpy_dtype(name))
    elif like.device.kind == "cpu":
        array = _empty_aligned(shape, numpy_dtype(name))
    else:
        array = DeviceArray.empty(shape, name, like.device.index)
    return read_array(array, "out")


def empty_workspace(like: ArrayInfo, size: int, *, other_stream: bool) -> ArrayInfo:
    """``size`` bytes of uninitialised memory on the GPU of ``like``, of its library.

    ``other_stream``: another stream than the current one may use it, and :func:`~.streams.used_on` says so. Only torch can be told;
    elsewhere it is memory that waits for the GPU when it is freed.
    """
    torch = sys.modules.get("torch")
    if other_stream and not (torch is not None and isinstance(like.source, torch.Tensor)):
        return read_array(DeviceArray.empty((-(-size // 4),), "float32", like.device.index), "workspace")
    return empty_like_framework(like, (-(-size // 4),), "float32")


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    size = prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def in_library_of(like: ArrayInfo, made: ArrayInfo) -> Any:
    """An array that :func:`empty_like_framework` made, for the user: one of JAX where ``like`` is.

    JAX takes over host memory as it is, and GPU memory too, except that bfloat16 there is copied once on the device.
    """
    theirs = jax_array_of(like)
    jax = None if theirs is None else sys.modules.get("jax")
    if jax is None or not isinstance(made.source, (np.ndarray, DeviceArray)):
        return user_array(made)
    if made.device.kind == "cpu":
        return jax.device_put(made.source, next(iter(theirs.devices())) if getattr(theirs, "committed", True) else None)
    array = jax.numpy.asarray(made.source)
    return array if array.dtype.name == made.dtype_name else array.view(made.dtype_name)


def empty_torch(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A new tensor whose last stride is 1: of the shape and type of ``like`` with the order of its dimensions, any other row-major.

    ``torch.empty_like`` keeps that order too, except that it gives tensors without values other strides than real ones where a size is 1.
    """
    if tuple(shape) == tuple(like.shape) and dtype == like.dtype:
        return like.new_empty_strided(shape, _strides_in_order(tuple(shape), tuple(like.stride())))
    return like.new_empty(shape, dtype=dtype)


def _strides_in_order(shape: tuple[Any, ...], strides: tuple[Any, ...]) -> tuple[Any, ...]:
    """Strides without gaps, of which the last is 1 and the others have the order of ``strides``; row-major where a step is 0.

    Numbers may be symbols of torch.compile; an order that depends on their values counts as row-major.
    """
    last = len(shape) - 1
    long = [at for at in range(last) if _holds(shape[at] > 1, otherwise=True)]
    order: list[int] = []  # of the dimensions, the outermost first
    for at in [] if any(_holds(strides[each] == 0, otherwise=False) for each in long) else long:
        place = len(order)
        while place and _holds(strides[order[place - 1]] < strides[at], otherwise=False):
            place -= 1
        order.insert(place, at)
    made, step = [1] * len(shape), shape[last]
    for at in reversed(order or long):
        made[at], step = step, step * shape[at]
    for at in reversed(range(last)):
        if at not in long:
            made[at] = made[at + 1] * shape[at + 1]
    return tuple(made)


def _holds(condition: Any, *, otherwise: bool) -> bool:
    """A condition on sizes; ``otherwise`` where torch does not know it before the call runs."""
    if isinstance(condition, bool):
        return condition
    symbols = sys.modules["torch.fx.experimental.symbolic_shapes"]
    return bool(symbols.guard_or_true(condition) if otherwise else symbols.guard_or_false(condition))


def can_write_at(info: ArrayInfo, like: ArrayInfo) -> bool:
    """Whether :func:`write_at` can read ``info`` and write ``like``: both of torch, or both of CuPy."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like.source, torch.Tensor):
        return isinstance(info.source, torch.Tensor)
    return is_cupy(like.source) and is_cupy(info.source)


def detached(info: ArrayInfo) -> Any:
    """The array itself, which autograd does not follow."""
    torch = sys.modules.get("torch")
    return info.source.detach() if torch is not None and isinstance(info.source, torch.Tensor) else info.source


def write_at(info: ArrayInfo, where: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], values: ArrayInfo, *, swapped: bool) -> None:
    """Write rows (n, ...), or (B, n, ...), to ``info[where]`` of (blocks, slots, ...), on a GPU; ``swapped``: slots are the third axis.

    ``where``: int64 indices in host memory, of n elements each. On the current stream of the library, torch or CuPy.
    """
    target, rows = detached(info), detached(values).reshape(-1, *values.shape[2 - len(info.shape) :])
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(target, torch.Tensor):
        index = tuple(_tensor_on(target, each) for each in where)
        if target.element_size() == 1:  # torch indexes bytes on every device, and fp8 on few
            target, rows = target.view(torch.uint8), rows.view(torch.uint8)
    else:
        index = tuple(map(sys.modules["cupy"].asarray, where))
    (target.swapaxes(1, 2) if swapped else target)[index] = rows[: len(where[0])]


def _tensor_on(like: Any, values: np.ndarray[Any, Any]) -> Any:
    """A copy of an array of NumPy as a tensor on the device of ``like``."""
    return sys.modules["torch"].from_numpy(values).to(like.device)


def int32_like(values: np.ndarray[Any, Any], like: Any) -> Any:
    """A small int32 array of NumPy in the library and on the device of ``like``; itself for None and NumPy.

    Raises:
        ArrayTypeError: a library that we cannot make arrays with.
    """
    if like is None or isinstance(like, np.ndarray):
        return values
    info = read_array(like, "like")
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(like, torch.Tensor):
        return _tensor_on(like, values)
    if isinstance(like, DeviceArray):
        return DeviceArray.from_numpy(values, info.device.index)
    if cupy is not None and isinstance(like, cupy.ndarray):
        with cupy.cuda.Device(info.device.index):
            return cupy.asarray(values)
    raise ArrayTypeError(f"like: got {type(like).__qualname__}; allowed are torch tensors, NumPy and CuPy arrays, DeviceArray and None")


def filled_int32(size: int, value: int, like: Any) -> Any:
    """int32 (size,), each ``value``, in the library and on the device of ``like``; errors: :func:`int32_like`.

    torch fills it by a kernel, which a CUDA graph may capture.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return like.new_full((size,), value, dtype=torch.int32)
    return int32_like(np.full(size, value, np.int32), like)


def unbind(info: ArrayInfo, axis: int) -> tuple[Any, ...]:
    """The slices along ``axis``, as views: arrays of the same library where it can slice, else descriptions, which requests take too."""
    source = info.source
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        return tuple(source.unbind(axis))
    index = (slice(None),) * axis
    if isinstance(source, np.ndarray) or is_cupy(source):
        return tuple(source[(*index, part)] for part in range(info.shape[axis]))
    shape, strides = (values[:axis] + values[axis + 1 :] for values in (info.shape, info.strides))
    step = info.strides[axis] * numpy_dtype(info.dtype_name).itemsize
    return tuple(replace(info, ptr=info.ptr + part * step, shape=shape, strides=strides) for part in range(info.shape[axis]))


def pad_last(info: ArrayInfo, size: int, name: str) -> Any:
    """A copy with zeros after the last dimension up to ``size``; the array itself when it has that size.

    Raises:
        HeadDimError: GPU memory of a library that we cannot pad with.
    """
    source, extra = info.source, size - info.shape[-1]
    torch = sys.modules.get("torch")
    if extra == 0:
        return info
    if torch is not None and isinstance(source, torch.Tensor):
        return torch.nn.functional.pad(source, (0, extra))
    widths = [(0, 0)] * (len(info.shape) - 1) + [(0, extra)]
    if is_cupy(source):
        return sys.modules["cupy"].pad(source, widths)
    if info.device.kind == "cpu":
        return np.pad(as_numpy(info), widths)
    raise HeadDimError(
        f"{name}: got head dim {info.shape[-1]} on {info.device}; allowed are multiples of 8, "
        "because this library cannot pad for us; pad with zeros"
    )


def row_major(info: ArrayInfo, name: str) -> Any:
    """A row-major copy of an array whose last stride is another than 1; the array itself when it is 1.

    Raises:
        StrideError: GPU memory of a library that we cannot copy with.
    """
    source = info.source
    torch = sys.modules.get("torch")
    if info.shape[-1] <= 1 or info.strides[-1] == 1:
        return info
    if torch is not None and isinstance(source, torch.Tensor):
        return source.contiguous()
    if is_cupy(source):
        return sys.modules["cupy"].ascontiguousarray(source)
    if info.device.kind == "cpu":
        return np.ascontiguousarray(as_numpy(info))
    raise StrideError(
        f"{name}: got strides {info.strides} on {info.device}; allowed is a last stride of 1, because this library cannot copy for us"
    )


def check_can_copy(target: ArrayInfo, like: ArrayInfo) -> None:
    """Whether :func:`copy_into` can write an array that is made in the library of ``like``.

    Raises:
        OutputError: GPU memory of another library.
    """
    torch = sys.modules.get("torch")
    same = type(target.source) is type(like.source) or (
        torch is not None and isinstance(target.source, torch.Tensor) and isinstance(like.source, torch.Tensor)
    )
    if target.device.kind != "cpu" and not same:
        raise OutputError(
            f"out: got {type(target.source).__qualname__} with q of {type(like.source).__qualname__}, and a head dim that is padded; "
            "allowed is an array of q's library, or head dims that are multiples of 8"
        )


def copy_into(target: ArrayInfo, values: Any, user_array: Any) -> Any:
    """Write ``values`` (of a library that we can slice) into the caller's array and return that."""
    if target.device.kind == "cpu":
        as_numpy(target)[...] = as_numpy(read_array(values, "values"))
        tell_written(target.source)
    else:
        target.source[...] = values
    return user_array


def draw_seed(like: Any) -> Any:
    """int64 (2,), the (seed, offset) of a dropout, on the device of a torch tensor and from torch's generator there.

    Drawn by a kernel, so that a CUDA graph draws anew in every replay.
    """
    return like.new_empty((2,), dtype=sys.modules["torch"].int64).random_(_LOWEST, _HIGHEST)


def draw_seed_and_offset(like: ArrayInfo) -> ArrayInfo | None:
    """int64[2] on the device of ``like`` from its library's own generator; None without one.

    So the library's seeding, graph replay and activation checkpointing see the right pattern.
    """
    source = like.source
    torch = sys.modules.get("torch")
    array: Any
    if torch is not None and isinstance(source, torch.Tensor):
        array = draw_seed(source)
    elif isinstance(source, np.ndarray):
        array = np.random.randint(_LOWEST, _HIGHEST, 2, dtype=np.int64)  # noqa: NPY002 - the generator that np.random.seed controls
    elif is_cupy(source):
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device.index):
            array = cupy.random.randint(_LOWEST, _HIGHEST, 2, dtype=np.int64)
    else:
        return None
    return read_array(array, "rng")
