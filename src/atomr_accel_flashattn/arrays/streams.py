"""Streams: the one that an array's library uses now, and copies that wait for it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from ..errors import ArrayTypeError
from ..problem import ArrayInfo
from .device_array import DeviceArray
from .read import as_numpy, is_cupy
from .torch_hooks import hooks

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LEGACY_DEFAULT_STREAM", "copy_to_host", "current_stream", "raw_stream", "used_on"]

LEGACY_DEFAULT_STREAM: Final = 1  # CU_STREAM_LEGACY: ordered with every blocking stream of the device


def current_stream(info: ArrayInfo) -> int:
    """The raw CUstream that the array's library uses now; the legacy default stream where it has no such notion."""
    source = info.source
    if type(source) in hooks.plain_types and hooks.raw_stream is not None:
        return hooks.raw_stream(info.device.index)  # type: ignore[no-any-return]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):  # a subclass, or the first call
        return int(torch._C._cuda_getCurrentRawStream(info.device.index))  # noqa: SLF001 - 0.2 us; the public call costs 8
    if is_cupy(source):
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(info.device.index):
            return int(cupy.cuda.get_current_stream().ptr)
    if hasattr(source, "__cuda_array_interface__"):
        return int(source.__cuda_array_interface__.get("stream") or LEGACY_DEFAULT_STREAM)
    return LEGACY_DEFAULT_STREAM


def raw_stream(stream: Any) -> int:
    """The CUstream handle of an integer, or of a stream of torch, CuPy, cuda.core or anything with ``__cuda_stream__``.

    Raises:
        ArrayTypeError: none of these.
    """
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise ArrayTypeError(
        f"stream: got {type(stream).__qualname__}; allowed are a raw CUstream as int, and streams of torch, CuPy and cuda.core"
    )


def used_on(info: ArrayInfo, stream: int) -> None:
    """Let torch know that its tensor is used on a raw CUstream, so that its memory is not given away before that is done with it."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(info.source, torch.Tensor):
        with torch.cuda.device(info.device.index):
            info.source.record_stream(torch.cuda.ExternalStream(stream) if stream else torch.cuda.default_stream())


def copy_to_host(info: ArrayInfo) -> np.ndarray[Any, Any]:
    """A NumPy copy of a contiguous array, wherever it lives. Synchronises: for debugging checks only."""
    if info.device.kind == "cpu":
        return as_numpy(info).copy()
    view = DeviceArray.borrow(info.ptr, info.shape, info.dtype_name, info.device.index, owner=info.source)
    return view.numpy(stream=current_stream(info))
