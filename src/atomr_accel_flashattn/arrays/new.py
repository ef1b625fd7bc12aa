"""New arrays in the library of another one, and views and copies of arrays for functional calls."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import HeadDimError, OutputError
from ..problem import ArrayInfo
from .device_array import DeviceArray
from .dlpack import BorrowedTensor
from .read import as_numpy, is_cupy, numpy_dtype, read_array
from .torch_hooks import tell_written

__all__ = ["copy_into", "draw_seed_and_offset", "empty_like_framework", "pad_last", "unbind"]


def empty_like_framework(like: ArrayInfo, shape: tuple[int, ...], dtype_name: str | None = None, *, fallback: bool = False) -> ArrayInfo:
    """A new uninitialised array in the library and on the device of ``like``.

    It is row-major, except that a torch tensor of the same shape and type keeps the order of its dimensions, as ``torch.empty_like`` does.

    Args:
        like: whose library and device.
        shape: sizes.
        dtype_name: element type, None is that of ``like``.
        fallback: whether a library that we cannot allocate with gets a NumPy array or a DeviceArray.

    Raises:
        OutputError: such a library without ``fallback``; the caller has to give ``out=``.
    """
    source, name = like.source, dtype_name or like.dtype_name
    torch = sys.modules.get("torch")
    array: Any
    if torch is not None and isinstance(source, torch.Tensor):
        array = _empty_torch(torch, source, shape, getattr(torch, name))
    elif isinstance(source, np.ndarray):
        array = np.empty(shape, numpy_dtype(name))
    elif isinstance(source, DeviceArray):
        array = DeviceArray.empty(shape, name, like.device.index)
    elif is_cupy(source):
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device.index):
            array = cupy.empty(shape, numpy_dtype(name))
    elif fallback:
        array = np.empty(shape, numpy_dtype(name)) if like.device.kind == "cpu" else DeviceArray.empty(shape, name, like.device.index)
    else:
        owner = source.owner if isinstance(source, BorrowedTensor) else source
        raise OutputError(
            f"out: got None, and an array of {type(owner).__module__}.{type(owner).__qualname__} cannot be made here; "
            f"allowed is out= of shape {shape} and type {name}, or inputs of torch, NumPy, CuPy or DeviceArray"
        )
    return read_array(array, "out")


def _empty_torch(torch: Any, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """``torch.empty_like`` where it leaves the last dimension contiguous (inputs with steps of 0 may come out otherwise)."""
    if shape == tuple(like.shape) and dtype == like.dtype:
        array = torch.empty_like(like)
        if array.stride(-1) == 1:
            return array
    return like.new_empty(shape, dtype=dtype)


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


def copy_into(target: ArrayInfo, values: Any, user_array: Any) -> Any:
    """Write ``values`` (of a library that we can slice) into the caller's array and return that."""
    if target.device.kind == "cpu":
        as_numpy(target)[...] = as_numpy(read_array(values, "values"))
        tell_written(target.source)
    else:
        target.source[...] = values
    return user_array


def draw_seed_and_offset(like: ArrayInfo) -> ArrayInfo | None:
    """int64[2] on the device of ``like`` from its library's own generator; None without one.

    So the library's seeding, graph replay and activation checkpointing see the right pattern.
    """
    source = like.source
    low, high = -(2**63), 2**63 - 1
    torch = sys.modules.get("torch")
    array: Any
    if torch is not None and isinstance(source, torch.Tensor):
        array = source.new_empty((2,), dtype=torch.int64).random_(low, high)
    elif isinstance(source, np.ndarray):
        array = np.random.randint(low, high, 2, dtype=np.int64)  # noqa: NPY002 - the generator that np.random.seed controls
    elif is_cupy(source):
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device.index):
            array = cupy.random.randint(low, high, 2, dtype=np.int64)
    else:
        return None
    return read_array(array, "rng")
