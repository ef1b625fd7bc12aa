"""Arrays of any library, read without copying: torch, NumPy, CuPy, our own DeviceArray, DLPack, ``__cuda_array_interface__``.

The order of the tries is by cost: torch's own attributes take 0.4 us, everything else more (and is off the steady-state path).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import ArrayTypeError, DeviceMismatchError, DTypeError, StrideError
from ..launch.driver import driver
from ..limits import not_built
from ..problem import ArrayInfo
from ..types import Device, DType
from .device_array import DeviceArray
from .dlpack import BorrowedTensor, read_dlpack
from .torch_hooks import recorder

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "as_numpy",
    "contiguous_strides",
    "dtype_name_of",
    "is_cupy",
    "jax_array_of",
    "numpy_dtype",
    "read_array",
    "share_memory",
    "user_array",
    "why_not_written",
]

_DTYPES: Final = {
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "float8_e4m3fn": DType.F8E4M3,
    "float8_e5m2": DType.F8E5M2,
    "float32": DType.F32,
    "float64": DType.F64,
}
_JAX: Final = frozenset({"jax", "jaxlib"})
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_IMMUTABLE: Final = frozenset({"jax", "jaxlib", "tensorflow"})  # packages whose arrays never change, whatever they say of their memory
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
    if is_cupy(x):
        return _read_cupy(x, name)
    return _read_protocol(x, name)


def _read_protocol(x: Any, name: str) -> ArrayInfo:
    """DLPack first: it knows bfloat16 and costs no question to the driver."""
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        view = read_dlpack(x, name)
        return _info(view.ptr, view.shape, view.strides, view.dtype_name, view.device, view.borrowed)
    if hasattr(x, "__cuda_array_interface__"):
        return _read_cuda_array_interface(x, name)
    raise ArrayTypeError(
        f"{name}: got {type(x).__module__}.{type(x).__qualname__}, which is no array; allowed are torch tensors, NumPy and CuPy arrays, "
        f"DeviceArray, and objects with __dlpack__ or __cuda_array_interface__{_advice_for(x)}"
    )


def _advice_for(x: Any) -> str:
    """What makes an array of ``x``, as the end of a message; empty where nothing does."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):  # a Quantized, whose values and descale are two arguments
        return f"; pass its {' and its '.join(x._fields)}, each as an argument of its own"
    if isinstance(x, (list, tuple, int, float)):
        return "; call numpy.asarray"
    return "; call it outside of jax.jit" if _packages(x) & _JAX else ""


def why_not_written(info: ArrayInfo) -> str:
    """Why elements of an array may not be written, as "a read-only NumPy array"; empty where its library says nothing against it."""
    source = info.source
    if isinstance(source, np.ndarray):
        return "" if source.flags.writeable else "a read-only NumPy array"
    if type(source) is BorrowedTensor and source.why_not_written:
        return source.why_not_written
    owner = user_array(info)
    if _packages(owner) & _IMMUTABLE:
        return f"an array of {type(owner).__module__}, which is immutable and so read-only"
    interface: Any = None if _is_torch(owner) else getattr(owner, "__cuda_array_interface__", None)
    return "an array that __cuda_array_interface__ calls read-only" if interface is not None and interface["data"][1] else ""


def jax_array_of(info: ArrayInfo) -> Any:
    """The array of JAX that was read; None where it was another library's."""
    source = info.source
    return source.owner if type(source) is BorrowedTensor and _packages(source.owner) & _JAX else None


def user_array(info: ArrayInfo) -> Any:
    """The object that was read."""
    source = info.source
    return source.owner if type(source) is BorrowedTensor else source


def _packages(x: Any) -> frozenset[str]:
    """The packages that the class of ``x`` and its bases come from."""
    return frozenset(kind.__module__.partition(".")[0] for kind in type(x).__mro__)


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _info(ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype_name: str, device: Device, source: Any) -> ArrayInfo:
    if 0 in shape:  # steps of an empty array are never taken, and NumPy may give any
        strides = contiguous_strides(shape)
    return ArrayInfo(ptr, shape, strides, _DTYPES.get(dtype_name), dtype_name, device, source)


def _read_torch(x: Any, name: str, torch: Any) -> ArrayInfo:
    recording = recorder()
    if recording:
        raise not_built("tracing", f"{name} is being recorded by {recording}, which would not see this call")
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
            f"{name}: got {type(x).__qualname__} without memory of its own (a fake tensor, or inside a torch.func transform): {error}; "
            "allowed are tensors with memory; call outside of the transform, and take gradients by torch.autograd"
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


def is_cupy(x: Any) -> bool:
    """Whether this is an array of CuPy, if that is there."""
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
    (first_a, end_a), (first_b, end_b) = _reach(a), _reach(b)
    if end_a <= first_b or end_b <= first_a:  # nearly always, and a tenth of the cost of what follows
        return False
    # NumPy compares addresses and strides and reads nothing, so addresses on a GPU will do.
    first, second = (np.asarray(_HostInterface(info, numpy_dtype(info.dtype_name))) for info in (a, b))
    try:
        return bool(np.shares_memory(first, second, max_work=_OVERLAP_WORK))
    except np.exceptions.TooHardError:
        return True


def _reach(info: ArrayInfo) -> tuple[int, int]:
    """Address of the first byte of an array that is not empty, and the one behind its last."""
    size = info.dtype.itemsize if info.dtype is not None else numpy_dtype(info.dtype_name).itemsize
    low = high = 0
    for count, step in zip(info.shape, info.strides, strict=True):
        if step < 0:
            low += (count - 1) * step
        else:
            high += (count - 1) * step
    return info.ptr + low * size, info.ptr + (high + 1) * size


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
