"""Arrays of any library, read without copying: torch, NumPy, CuPy, our own DeviceArray, DLPack, ``__cuda_array_interface__``.

The order of the tries is by cost: torch's own attributes take 0.4 us, everything else more (and is off the steady-state path).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import ArrayTypeError, DeviceMismatchError, DTypeError, HeadDimError, OutputError, StrideError
from ..launch.driver import driver
from ..problem import ArrayInfo
from ..types import Device, DType
from .device_array import DeviceArray
from .dlpack import BorrowedTensor, read_dlpack
from .torch_hooks import hooks

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "LEGACY_DEFAULT_STREAM",
    "as_numpy",
    "contiguous_strides",
    "copy_into",
    "copy_to_host",
    "current_stream",
    "draw_seed_and_offset",
    "dtype_name_of",
    "empty_like_framework",
    "numpy_dtype",
    "pad_last",
    "raw_stream",
    "read_array",
    "share_memory",
    "unbind",
]

LEGACY_DEFAULT_STREAM: Final = 1  # CU_STREAM_LEGACY: ordered with every blocking stream of the device
_DTYPES: Final = {
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "float8_e4m3fn": DType.F8E4M3,
    "float8_e5m2": DType.F8E5M2,
    "float32": DType.F32,
    "float64": DType.F64,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_OVERLAP_WORK: Final[Any] = 10_000  # candidates that NumPy looks at; views of one packed buffer need fewer than ten
_BIT_TYPES: Final = {"bfloat16": "<u2", "float8_e4m3fn": "|u1", "float8_e5m2": "|u1"}  # how NumPy's array interface can carry them


def dtype_name_of(dtype: DType) -> str:
    """Long name, as NumPy and torch spell it: ``DType.BF16`` -> ``"bfloat16"``."""
    return _NAMES[dtype]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a long name; bfloat16 and fp8 come from ml_dtypes."""
    if name in _BIT_TYPES:
        import ml_dtypes

        name = getattr(ml_dtypes, name)
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def read_array(x: Any, name: str) -> ArrayInfo:
    """Describe an array: pointer, shape, strides in elements, element type, device. Nothing is copied, nothing is synchronised.

    Args:
        x: torch tensor, NumPy array, DeviceArray, CuPy array, or any object with ``__dlpack__`` or ``__cuda_array_interface__``.
        name: what messages call it, as ``"q"``.

    Raises:
        ArrayTypeError: no array, or one without plain memory (sparse, masked, fake, transformed tensors).
        DTypeError: an element type that we cannot name.
        DeviceMismatchError: neither host nor CUDA memory.
        StrideError: strides that are no whole number of elements.
    """
    if isinstance(x, ArrayInfo):
        return x
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _read_torch(x, name, torch)
    if isinstance(x, np.ndarray):
        return _read_numpy(x, name)
    if isinstance(x, DeviceArray):
        return _info(x.ptr, x.shape, contiguous_strides(x.shape), x.dtype_name, Device("cuda", x.device_index), x)
    if _is_cupy(x):
        return _read_cupy(x, name)
    return _read_protocol(x, name)


def _read_protocol(x: Any, name: str) -> ArrayInfo:
    """DLPack first: it knows bfloat16 and costs no question to the driver."""
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        view = read_dlpack(x, name)
        return _info(view.ptr, view.shape, view.strides, view.dtype_name, view.device, view.borrowed)
    if hasattr(x, "__cuda_array_interface__"):
        return _read_cuda_array_interface(x, name)
    advice = "; call numpy.asarray" if isinstance(x, (list, tuple)) else ""
    raise ArrayTypeError(
        f"{name}: got {type(x).__module__}.{type(x).__qualname__}, which is no array; allowed are torch tensors, NumPy and CuPy arrays, "
        f"DeviceArray, and objects with __dlpack__ or __cuda_array_interface__{advice}"
    )


def _info(ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype_name: str, device: Device, source: Any) -> ArrayInfo:
    if 0 in shape:  # steps of an empty array are never taken, and NumPy may give any
        strides = contiguous_strides(shape)
    return ArrayInfo(ptr, shape, strides, _DTYPES.get(dtype_name), dtype_name, device, source)


def _read_torch(x: Any, name: str, torch: Any) -> ArrayInfo:
    device = x.device
    if device.type not in {"cpu", "cuda"}:
        raise DeviceMismatchError(f"{name}: got a torch tensor on {device}; allowed are cpu and cuda; move it there with .to()")
    if x.layout is not torch.strided or x.is_nested or x.is_neg():
        what, advice = f"a torch tensor of layout {x.layout}", "call .to_dense()"
        if x.is_nested:
            what, advice = "a nested torch tensor", "pack the sequences and use flash_attn_varlen_func"
        elif x.is_neg():
            what, advice = "a torch tensor with its negative bit set", "call .resolve_neg()"
        raise ArrayTypeError(f"{name}: got {what}; allowed are plain strided tensors; {advice}")
    try:
        ptr = x.data_ptr()
    except RuntimeError as error:
        raise ArrayTypeError(
            f"{name}: got {type(x).__qualname__} without memory of its own (a fake tensor, or inside a torch.func transform): {error}"
        ) from error
    if ptr == 0 and x.numel():
        raise ArrayTypeError(
            f"{name}: got a torch tensor of shape {tuple(x.shape)} without memory (its storage was freed, or never made); "
            "allowed are tensors that hold their elements"
        )
    place = Device("cuda", device.index) if device.type == "cuda" else Device("cpu", 0)
    return _info(ptr, tuple(x.shape), tuple(x.stride()), str(x.dtype).removeprefix("torch."), place, x)


def _read_numpy(x: np.ndarray[Any, Any], name: str) -> ArrayInfo:
    if isinstance(x, np.ma.MaskedArray):
        raise ArrayTypeError(f"{name}: got a masked array, whose mask would be ignored; allowed are plain arrays; call .filled() first")
    if not x.dtype.isnative:
        raise DTypeError(
            f"{name}: got {x.dtype} in foreign byte order; allowed is the native order; call .astype(x.dtype.newbyteorder('='))"
        )
    strides = _whole_strides(x.strides, x.dtype.itemsize, name)
    return _info(x.ctypes.data, x.shape, strides, x.dtype.name, Device("cpu", 0), x)


def _is_cupy(x: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def _read_cupy(x: Any, name: str) -> ArrayInfo:
    strides = _whole_strides(x.strides, x.dtype.itemsize, name)
    return _info(int(x.data.ptr), tuple(x.shape), strides, x.dtype.name, Device("cuda", int(x.device.id)), x)


def _whole_strides(strides: tuple[int, ...], itemsize: int, name: str) -> tuple[int, ...]:
    if any(step % itemsize for step in strides):
        raise StrideError(
            f"{name}: got strides {strides} in bytes; allowed are multiples of the element size {itemsize}; copy it to a plain array"
        )
    return tuple(step // itemsize for step in strides)


def _read_cuda_array_interface(x: Any, name: str) -> ArrayInfo:
    interface: Mapping[str, Any] = x.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise ArrayTypeError(f"{name}: got a __cuda_array_interface__ with a mask, which would be ignored; allowed are plain arrays")
    dtype = np.dtype(interface["typestr"])
    if dtype.kind not in "fiub":
        raise DTypeError(
            f"{name}: got __cuda_array_interface__ type {interface['typestr']!r}; allowed are floats and integers "
            "(bfloat16 needs __dlpack__)"
        )
    shape = tuple(int(size) for size in interface["shape"])
    given = interface.get("strides")
    strides = contiguous_strides(shape) if given is None else _whole_strides(tuple(given), dtype.itemsize, name)
    ptr = int(interface["data"][0] or 0)
    return _info(ptr, shape, strides, dtype.name, Device("cuda", _device_of_pointer(ptr, name)), x)


def _device_of_pointer(ptr: int, name: str) -> int:
    """Ordinal of the GPU that owns an address; an empty array has none and counts as device 0."""
    if ptr == 0:
        return 0
    cuda = driver()
    status, ordinal = cuda.cuPointerGetAttribute(cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, ptr)
    if int(status):
        raise DeviceMismatchError(
            f"{name}: got address {ptr:#x} in its __cuda_array_interface__, which is not CUDA memory ({status.name}); "
            "allowed is an array that is alive on a GPU"
        )
    return int(ordinal)


def as_numpy(info: ArrayInfo) -> np.ndarray[Any, Any]:
    """A NumPy view of host memory: same shape, strides and element type (bfloat16 through ml_dtypes), no copy.

    Raises:
        DeviceMismatchError: the array is on a GPU.
    """
    if info.device.kind != "cpu":
        raise DeviceMismatchError(f"an array on {info.device} has no NumPy view; allowed are arrays in host memory")
    dtype = numpy_dtype(info.dtype_name)
    if not all(info.shape):
        return np.empty(info.shape, dtype)
    return np.asarray(_HostInterface(info, dtype)).view(dtype)


def share_memory(a: ArrayInfo, b: ArrayInfo) -> bool:
    """Whether two arrays on one device have an element in common; what cannot be decided in a moment counts as shared."""
    if 0 in a.shape or 0 in b.shape:
        return False
    # NumPy compares addresses and strides and reads nothing, so addresses on a GPU will do.
    first, second = (np.asarray(_HostInterface(info, numpy_dtype(info.dtype_name))) for info in (a, b))
    try:
        return bool(np.shares_memory(first, second, max_work=_OVERLAP_WORK))
    except np.exceptions.TooHardError:
        return True


class _HostInterface:
    """Lends host memory to NumPy through ``__array_interface__``; NumPy keeps it, and it keeps the source, alive."""

    def __init__(self, info: ArrayInfo, dtype: np.dtype[Any]) -> None:
        self.source = info.source
        self.__array_interface__ = {
            "version": 3,
            "data": (info.ptr, False),
            "shape": info.shape,
            "strides": tuple(step * dtype.itemsize for step in info.strides),
            "typestr": _BIT_TYPES.get(info.dtype_name, dtype.str),
        }


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
    elif _is_cupy(source):
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
    if isinstance(source, np.ndarray) or _is_cupy(source):
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
    if _is_cupy(source):
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
    else:
        target.source[...] = values
    return user_array


def current_stream(info: ArrayInfo) -> int:
    """The raw CUstream that the array's library uses now; the legacy default stream where it has no such notion."""
    source = info.source
    if type(source) in hooks.plain_types and hooks.raw_stream is not None:
        return hooks.raw_stream(info.device.index)  # type: ignore[no-any-return]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):  # a subclass, or the first call
        return int(torch._C._cuda_getCurrentRawStream(info.device.index))  # noqa: SLF001 - 0.2 us; the public call costs 8
    if _is_cupy(source):
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
    elif _is_cupy(source):
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device.index):
            array = cupy.random.randint(low, high, 2, dtype=np.int64)
    else:
        return None
    return read_array(array, "rng")


def copy_to_host(info: ArrayInfo) -> np.ndarray[Any, Any]:
    """A NumPy copy of a contiguous array, wherever it lives. Synchronises: for debugging checks only."""
    if info.device.kind == "cpu":
        return as_numpy(info).copy()
    view = DeviceArray.borrow(info.ptr, info.shape, info.dtype_name, info.device.index, owner=info.source)
    return view.numpy(stream=current_stream(info))
