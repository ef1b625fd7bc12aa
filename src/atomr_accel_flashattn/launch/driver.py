"""The CUDA driver: asked for once, checked once; its errors under our names.

Everything goes through ``cuda.bindings.driver``, except the one call of the steady state: :func:`launch_function` is ``cuLaunchKernelEx``
through ctypes with arguments that exist already, 0.17 us on top of the driver's own time where the bindings need 0.22-0.33.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from ..errors import DeviceLostError, DriverTooOldError, LaunchError, NoDriverError

__all__ = [
    "MINIMUM_DRIVER",
    "DeviceProperties",
    "LaunchConfig",
    "check",
    "cuda_error",
    "current_context",
    "device_count",
    "device_properties",
    "driver",
    "driver_function",
    "driver_version",
    "launch_function",
    "primary_context",
]

MINIMUM_DRIVER = 13000  # cuDriverGetVersion of CUDA 13.0: older drivers do not read the cubins of NVRTC 13

# Errors after which the context, and so the process, is of no use (CUDA Driver API, CUresult).
_STICKY = frozenset(
    {
        "CUDA_ERROR_ASSERT",
        "CUDA_ERROR_CONTAINED",
        "CUDA_ERROR_DEINITIALIZED",
        "CUDA_ERROR_DEVICE_UNAVAILABLE",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
        "CUDA_ERROR_EXTERNAL_DEVICE",
        "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "CUDA_ERROR_INVALID_PC",
        "CUDA_ERROR_LAUNCH_FAILED",
        "CUDA_ERROR_LAUNCH_TIMEOUT",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
        "CUDA_ERROR_MPS_CLIENT_TERMINATED",
        "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    }
)


class DeviceProperties(NamedTuple):
    """What we ask of a device. ``memory`` in bytes; ``compute_capability`` as (9, 0)."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory: int


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def driver() -> Any:
    """``cuda.bindings.driver``, initialised.

    Raises:
        NoDriverError: no driver library, or one that finds no GPU.
        DriverTooOldError: it is older than CUDA 13.0.
    """
    _library()
    from cuda.bindings import driver as bindings

    status, version = bindings.cuDriverGetVersion()
    if int(status) == 0 and version < MINIMUM_DRIVER:
        raise DriverTooOldError(
            f"the NVIDIA driver is for CUDA {_dotted(version)}; the kernels need CUDA {_dotted(MINIMUM_DRIVER)} (driver 580) or later: "
            "update the driver, or use the CPU backend"
        )
    (status,) = bindings.cuInit(0)
    if int(status):
        raise NoDriverError(
            f"the NVIDIA driver does not start: {_describe(bindings, status)}. Is there a GPU, and is it visible "
            "(nvidia-smi, CUDA_VISIBLE_DEVICES)? NumPy arrays run on the CPU backend without one"
        )
    return bindings


@cache
def driver_function(name: str) -> Any:
    """A function of the driver library as a ctypes function returning its CUresult. The interpreter lock is free meanwhile."""
    return getattr(ctypes.CDLL(_library()), name)


def launch_function() -> Any:
    """``cuLaunchKernelEx(config*, function, arguments**, extra**) -> int``."""
    return driver_function("cuLaunchKernelEx")


def driver_version() -> str:
    """CUDA version of the driver, as ``"13.0"``."""
    return _dotted(check(driver().cuDriverGetVersion(), "cuDriverGetVersion"))


def device_count() -> int:
    """Number of visible GPUs; 0 without a driver that can be used."""
    try:
        return int(check(driver().cuDeviceGetCount(), "cuDeviceGetCount"))
    except (NoDriverError, DriverTooOldError):
        return 0


@cache
def device_properties(index: int) -> DeviceProperties:
    """Name, compute capability, SMs and memory of GPU ``index``."""
    cuda = driver()
    device = _device(index)
    attribute = cuda.CUdevice_attribute

    def ask(which: Any) -> int:
        return int(check(cuda.cuDeviceGetAttribute(which, device), "cuDeviceGetAttribute"))

    return DeviceProperties(
        check(cuda.cuDeviceGetName(128, device), "cuDeviceGetName").split(b"\0", 1)[0].decode(),
        (
            ask(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            ask(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        ),
        ask(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        int(check(cuda.cuDeviceTotalMem(device), "cuDeviceTotalMem")),
    )


_contexts: dict[int, Any] = {}
_contexts_lock = threading.Lock()


def primary_context(index: int) -> Any:
    """The primary context of GPU ``index``, which torch, CuPy and the CUDA runtime use too. Retained once, until the process ends."""
    context = _contexts.get(index)
    if context is None:
        with _contexts_lock:
            context = _contexts.get(index)
            if context is None:
                context = check(driver().cuDevicePrimaryCtxRetain(_device(index)), "cuDevicePrimaryCtxRetain")
                _contexts[index] = context
    return context


@contextlib.contextmanager
def current_context(index: int) -> Iterator[None]:
    """Make the primary context of GPU ``index`` current in this thread, and the one before it afterwards."""
    cuda = driver()
    check(cuda.cuCtxPushCurrent(primary_context(index)), "cuCtxPushCurrent")
    try:
        yield
    finally:
        cuda.cuCtxPopCurrent()


def check(result: tuple[Any, ...], what: str, kernel_name: str = "") -> Any:
    """The value of ``(status, value)``, None of ``(status,)``.

    Raises:
        LaunchError: the call ``what`` failed; :class:`DeviceLostError` when nothing works any more after it.
    """
    if int(result[0]):
        raise cuda_error(int(result[0]), what, kernel_name)
    return result[1] if len(result) > 1 else None


def cuda_error(code: int, what: str, kernel_name: str = "") -> LaunchError:
    """The exception for CUDA error ``code`` of the call ``what``."""
    cuda = driver()
    name, text = _name_and_text(cuda, cuda.CUresult(code))
    if name in _STICKY:
        return DeviceLostError(
            f"{what} failed: {text}. The GPU context is lost and every later call fails too: restart the process. The kernel at fault may "
            "be an earlier one, of this or another package; ATOMR_FLASHATTN_DEBUG=1 waits for each of ours and tells",
            kernel_name=kernel_name,
            cuda_error=name,
        )
    return LaunchError(f"{what} failed: {text}", kernel_name=kernel_name, cuda_error=name)


@cache
def _library() -> str:
    """Load the driver library and return its path. Asked for first: some bindings hang at their second use without one."""
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        loaded = load_nvidia_dynamic_lib("cuda")
    except (DynamicLibNotFoundError, OSError) as error:
        raise NoDriverError(
            "no NVIDIA driver on this machine (its library libcuda.so.1 was not found). "
            "Install driver 580 or later to run on a GPU; NumPy arrays run on the CPU backend without one"
        ) from error
    return str(loaded.abs_path)


def _device(index: int) -> Any:
    count = check(driver().cuDeviceGetCount(), "cuDeviceGetCount")
    if not 0 <= index < count:
        raise LaunchError(f"there is no GPU {index}: {count} visible (CUDA_VISIBLE_DEVICES)")
    return check(driver().cuDeviceGet(index), "cuDeviceGet")


def _name_and_text(bindings: Any, status: Any) -> tuple[str, str]:
    """CUDA's name and sentence for an error."""
    _, name = bindings.cuGetErrorName(status)
    _, text = bindings.cuGetErrorString(status)
    return (name or str(status).encode()).decode(), (text or b"unknown error").decode()


def _describe(bindings: Any, status: Any) -> str:
    return "{}, {}".format(*_name_and_text(bindings, status))


def _dotted(version: int) -> str:
    """13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"
