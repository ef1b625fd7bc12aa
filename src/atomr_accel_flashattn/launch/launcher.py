"""Load a kernel on a device, and launch it.

A launch touches three things: this thread's storage of parameters, one ctypes array assignment for the addresses, one foreign call with
arguments that exist already; for kernels that read through tensor maps also the map of every address that changed, and for persistent ones
the counters of a stream that may be captured. Nothing on that path looks at the device: a function belongs to its context, and CUDA refuses
to launch it from another one before anything has run; only then is the right context made current and the launch repeated.
"""

from __future__ import annotations

import copy
import ctypes
import threading
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

from ..env import settings
from ..errors import LaunchError
from ..jit.cache import KernelCache
from ..jit.compile import CompiledKernel, compile_kernel
from ..kernels.params import KernelParams
from ..kernels.spec import KernelSpec
from ..kernels.used import record_kernel
from .counters import LEGACY_STREAMS, counters_for
from .driver import LaunchConfig, check, cuda_error, current_context, device_properties, driver, launch_function, primary_context
from .tensor_map import TENSOR_MAP_ALIGNMENT, encode, move, move_function

__all__ = ["Launch", "LaunchSeries", "LoadedKernel", "load_kernel"]

_NOWHERE = (-1,)  # addresses that no map has
_NO_STREAM = -1  # a handle that no stream has
_PLAIN_SHARED_BYTES = 48 * 1024  # dynamic shared memory that a kernel may use without asking
# The function belongs to another context than the current one, there is none, or it is gone: INVALID_CONTEXT, INVALID_HANDLE,
# CONTEXT_IS_DESTROYED.
_WRONG_CONTEXT = frozenset({201, 400, 709})
# What the driver says of a cubin that is damaged or for another GPU: INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX,
# UNSUPPORTED_PTX_VERSION, INVALID_SOURCE, NOT_FOUND (no such kernel in it).
_BAD_IMAGE = frozenset(
    {
        "CUDA_ERROR_INVALID_IMAGE",
        "CUDA_ERROR_INVALID_PTX",
        "CUDA_ERROR_INVALID_SOURCE",
        "CUDA_ERROR_NOT_FOUND",
        "CUDA_ERROR_NO_BINARY_FOR_GPU",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedKernel:
    """A kernel on one device. ``function`` is a CUfunction of the device's primary context; ``module`` keeps it alive."""

    spec: KernelSpec
    device_index: int
    compiled: CompiledKernel
    module: Any
    function: int

    def launch_of(self, params: KernelParams, grid: int, slots: tuple[str, ...]) -> Launch:
        """A launch of ``grid`` blocks with ``params`` (copied), ready to be made at any addresses; ``slots``: their names, in order."""
        kind = _WaitingLaunch if settings().debug else Launch
        return kind(self, params, grid, slots)


class _ParameterStorage:
    """Parameters and launch configuration of one thread, and what ctypes needs to pass them.

    ``arguments`` are those of cuLaunchKernelEx, converted once: passing them costs 0.05 us less than objects that ctypes must look into.
    """

    __slots__ = ("_config", "_of_kernel", "_params", "addresses", "arguments", "stream")

    def __init__(self, kernel: LoadedKernel, params: KernelParams, grid: int) -> None:
        self._params = _aligned_copy(params)
        self._config = LaunchConfig((grid, 1, 1), (kernel.spec.threads, 1, 1), kernel.spec.shared_memory)
        self._of_kernel = (ctypes.c_void_p * 1)(ctypes.addressof(self._params))
        self.addresses: Any = (ctypes.c_uint64 * len(params.SLOTS)).from_buffer(self._params)
        self.stream = 0
        function = ctypes.c_char.from_address(kernel.function)  # never read: a CUfunction is a handle
        self.arguments = (ctypes.byref(self._config), ctypes.byref(function), ctypes.byref(self._of_kernel), None)

    def set_stream(self, stream: int) -> None:
        """Launch into ``stream`` from now on."""
        self._config.stream = stream
        self.stream = stream


class _MappedStorage(_ParameterStorage):
    """Of a kernel with tensor maps, which follow the addresses of q, k and v, and counters, which follow the stream.

    Nothing has to :meth:`follow` when those addresses are ``mapped`` and the stream is the one in ``settled``.
    """

    __slots__ = ("_at", "_counts", "_device_index", "_maps", "_replace_address", "_values", "mapped", "settled")

    def __init__(self, kernel: LoadedKernel, params: KernelParams, grid: int) -> None:
        super().__init__(kernel, params, grid)
        self._values: Any = self._params
        self._device_index = kernel.device_index
        self._counts = params.counts
        self._maps = tuple(ctypes.addressof(getattr(self._values, name)) for name, _ in params.MAPS)
        self._at = [each.ptr for each in params.tensor_maps]  # where each map reads
        self._replace_address = move_function()
        self.mapped: tuple[int, ...] = _NOWHERE
        self.settled = _NO_STREAM

    def follow(self, stream: int, mapped: tuple[int, ...]) -> None:
        """Read the addresses ``mapped`` through the maps, and count in the counters of ``stream``.

        Every launch asks anew for those of a stream that may be captured, or be another one under the same handle. The legacy default
        stream is neither.
        """
        if mapped != self.mapped:
            self._move(mapped)
        if stream != self.settled:
            self.settled = _NO_STREAM  # until the counters are there
            if self._counts:
                self._values.counters = counters_for(self._device_index, stream)
            if stream <= LEGACY_STREAMS or not self._counts:
                self.settled = stream

    def _move(self, mapped: tuple[int, ...]) -> None:
        """An array without elements has the address 0 in every call, and its map is never read."""
        at, self.mapped = self._at, _NOWHERE  # until all have moved
        for i, now in enumerate(mapped):
            if now != at[i] and now:
                at[i] = 0  # until it has moved
                if self._replace_address(self._maps[i], now):
                    move(self._maps[i], now, self._device_index)
                at[i] = now
        self.mapped = mapped


class _StoragePerThread(threading.local):
    """Parameter storage for each thread that asks: another thread may write its addresses while CUDA reads ours."""

    def __init__(self, kernel: LoadedKernel, params: KernelParams, grid: int) -> None:
        self.storage: Any = (_MappedStorage if params.MAPS else _ParameterStorage)(kernel, params, grid)


class Launch:
    """A launch whose shapes are fixed: only addresses and stream change from call to call. Safe to share between threads."""

    __slots__ = ("_function", "_mapped", "_select", "_threads", "grid", "kernel", "params")

    def __init__(self, kernel: LoadedKernel, params: KernelParams, grid: int, slots: tuple[str, ...]) -> None:
        self.kernel = kernel
        self.grid = grid
        self.params = params
        first = params.SLOTS.index(params.MAPS[0][1]) if params.MAPS else 0
        for (name, slot), described in zip(params.MAPS, params.tensor_maps, strict=True):
            assert slot == params.SLOTS[first + params.MAPS.index((name, slot))]  # noqa: S101 - mapped addresses are neighbours
            setattr(params, name, type(getattr(params, name)).from_buffer_copy(encode(described, kernel.device_index)))
        self._function = launch_function()
        self._threads = _StoragePerThread(kernel, params, grid)
        self._mapped = slice(first, first + len(params.MAPS)) if params.MAPS else None
        self._select: Any = None if slots == params.SLOTS else itemgetter(*map(slots.index, params.SLOTS))

    def on_places(self, places: tuple[int, ...]) -> Launch:
        """The same launch, of addresses among others: that of slot i is the one at ``places[i]``."""
        return _on_places(self, places)

    def launch(self, stream: int, addresses: tuple[int, ...]) -> None:
        """Launch into ``stream`` (a raw CUstream, 0 for the default one); ``addresses`` in the order of the launch's slots.

        Raises:
            ValueError: more or fewer addresses than slots.
            LaunchError: CUDA refused the launch.
            DeviceLostError: an earlier kernel left the context unusable.
        """
        storage = self._threads.storage
        if self._select is not None:
            addresses = self._select(addresses)
        storage.addresses[:] = addresses
        if stream != storage.stream:
            storage.set_stream(stream)
        if self._mapped is not None:
            mapped = addresses[self._mapped]
            if stream != storage.settled or mapped != storage.mapped:
                storage.follow(stream, mapped)
        code = self._function(*storage.arguments)
        if code:
            _recover(self.kernel, self.grid, storage.arguments, code)

    @property
    def device_index(self) -> int:
        """The GPU that it is for."""
        return self.kernel.device_index

    @property
    def steps(self) -> tuple[tuple[KernelSpec, int], ...]:
        """Its kernel, and the grid of that."""
        return ((self.kernel.spec, self.grid),)

    def arguments(self) -> tuple[Any, ...]:
        """What this thread hands to cuLaunchKernelEx, as the last launch left it."""
        arguments: tuple[Any, ...] = self._threads.storage.arguments
        return arguments


class _SeriesStorage(_ParameterStorage):
    """Parameters that several kernels share, with a launch configuration for each."""

    __slots__ = ("_configs", "series")

    def __init__(self, kernels: tuple[LoadedKernel, ...], params: KernelParams, grids: tuple[int, ...]) -> None:
        super().__init__(kernels[0], params, grids[0])
        others = [_ParameterStorage(kernel, params, grid) for kernel, grid in zip(kernels[1:], grids[1:], strict=True)]
        self._configs = (self._config, *(each._config for each in others))  # noqa: SLF001 - of this class
        parameters = self.arguments[2]
        self.series = (self.arguments, *((*each.arguments[:2], parameters, each.arguments[3]) for each in others))

    def set_stream(self, stream: int) -> None:
        """Launch all into ``stream`` from now on."""
        for config in self._configs:
            config.stream = stream
        self.stream = stream


class _SeriesPerThread(threading.local):
    def __init__(self, kernels: tuple[LoadedKernel, ...], params: KernelParams, grids: tuple[int, ...]) -> None:
        self.storage = _SeriesStorage(kernels, params, grids)


class LaunchSeries:
    """Launches of several kernels, one behind the other, that take the same parameters: addresses are written once for all.

    For kernels without tensor maps and counters. Safe to share between threads.
    """

    __slots__ = ("_function", "_select", "_threads", "grids", "kernels", "params")

    def __init__(self, kernels: tuple[LoadedKernel, ...], params: KernelParams, grids: tuple[int, ...], slots: tuple[str, ...]) -> None:
        self.kernels = kernels
        self.grids = grids
        self.params = params
        self._function = launch_function()
        self._threads = _SeriesPerThread(kernels, params, grids)
        self._select: Any = None if slots == params.SLOTS else itemgetter(*map(slots.index, params.SLOTS))

    @property
    def device_index(self) -> int:
        """The GPU that it is for."""
        return self.kernels[0].device_index

    @property
    def steps(self) -> tuple[tuple[KernelSpec, int], ...]:
        """Its kernels in order, and their grids."""
        return tuple(zip((kernel.spec for kernel in self.kernels), self.grids, strict=True))

    def on_places(self, places: tuple[int, ...]) -> LaunchSeries:
        """As :meth:`Launch.on_places`."""
        return _on_places(self, places)

    def launch(self, stream: int, addresses: tuple[int, ...]) -> None:
        """As :meth:`Launch.launch`. After an error, those behind it are not launched."""
        storage = self._threads.storage
        storage.addresses[:] = addresses if self._select is None else self._select(addresses)
        if stream != storage.stream:
            storage.set_stream(stream)
        launch = self._function
        for index, arguments in enumerate(storage.series):
            code = launch(*arguments)
            if code:
                _recover(self.kernels[index], self.grids[index], arguments, code)


_AnyLaunch = TypeVar("_AnyLaunch", Launch, LaunchSeries)


def _on_places(launch: _AnyLaunch, places: tuple[int, ...]) -> _AnyLaunch:
    """A copy that shares the storage of parameters."""
    made, select = copy.copy(launch), launch._select  # noqa: SLF001 - of this module
    made._select = itemgetter(*(places if select is None else select(places)))  # noqa: SLF001 - of this module
    return made


class _WaitingLaunch(Launch):
    """The debug form: waits for the kernel, so that its errors are raised by the call that made them."""

    __slots__ = ()

    def launch(self, stream: int, addresses: tuple[int, ...]) -> None:
        super().launch(stream, addresses)
        _wait(self.kernel, stream)


def _aligned_copy(params: KernelParams) -> KernelParams:
    """The same parameters on an address that tensor maps may have."""
    room = bytearray(ctypes.sizeof(params) + TENSOR_MAP_ALIGNMENT)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % TENSOR_MAP_ALIGNMENT
    room[offset : offset + ctypes.sizeof(params)] = bytes(params)
    return type(params).from_buffer(room, offset)  # keeps `room`


def _recover(kernel: LoadedKernel, grid: int, arguments: tuple[Any, ...], code: int) -> None:
    """After a launch that failed with ``code``: try again under the device's context if the thread's was another or none, else raise."""
    index, spec = kernel.device_index, kernel.spec
    if code in _WRONG_CONTEXT:
        cuda, again = driver(), launch_function()
        current = int(check(cuda.cuCtxGetCurrent(), "cuCtxGetCurrent", spec.kernel_name))
        if current == 0 and index == 0:  # what the CUDA runtime would make current here; let it stay, and the next launch is quick
            check(cuda.cuCtxSetCurrent(primary_context(index)), "cuCtxSetCurrent", spec.kernel_name)
            code = again(*arguments)
        elif current != int(primary_context(index)):  # for this launch only: the thread's current device is not ours to change
            with current_context(index):
                code = again(*arguments)
    if code:
        size = f"{grid} blocks of {spec.threads} threads, {spec.shared_memory} bytes of shared memory"
        raise cuda_error(code, f"launching {size} on GPU {index}", spec.kernel_name)


def _wait(kernel: LoadedKernel, stream: int) -> None:
    """Wait for ``stream`` and raise what went wrong in it. While a graph is captured nothing runs, so there is nothing to wait for."""
    cuda, name = driver(), kernel.spec.kernel_name
    with current_context(kernel.device_index):
        capturing = check(cuda.cuStreamIsCapturing(stream), "cuStreamIsCapturing", name)
        if capturing == cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            check(cuda.cuStreamSynchronize(stream), "running the kernel", name)


_loaded: dict[tuple[KernelSpec, int], LoadedKernel] = {}
_loading: dict[tuple[KernelSpec, int], threading.Lock] = {}
_loading_guard = threading.Lock()


def load_kernel(spec: KernelSpec, device_index: int, cache: KernelCache | None = None) -> LoadedKernel:
    """``spec`` on GPU ``device_index``, compiled and loaded at the first call, remembered for later ones. Thread-safe.

    A cubin from disk that the driver does not take is compiled once more.

    Raises:
        NoDriverError, DriverTooOldError: this machine cannot run kernels.
        NvrtcMissingError, CompileError: it cannot make this one.
        LaunchError: the driver does not take it, as when it is for another architecture.
    """
    key = (spec, device_index)
    kernel = _loaded.get(key)
    if kernel is None:
        with _loading_guard:
            lock = _loading.setdefault(key, threading.Lock())
        with lock:
            kernel = _loaded.get(key)
            if kernel is None:
                kernel = _loaded[key] = _load(spec, device_index, cache)
                record_kernel(spec)
    return kernel


def _load(spec: KernelSpec, device_index: int, cache: KernelCache | None) -> LoadedKernel:
    driver()
    with current_context(device_index):
        compiled = compile_kernel(spec, cache)
        try:
            return _load_module(compiled, device_index)
        except LaunchError as error:
            if error.cuda_error not in _BAD_IMAGE or not compiled.cache_hit:
                raise
        return _load_module(compile_kernel(spec, cache, recompile=True), device_index)


def _load_module(compiled: CompiledKernel, device_index: int) -> LoadedKernel:
    """Hand the cubin to the driver, under the current context."""
    cuda = driver()
    spec = compiled.spec
    name = spec.kernel_name
    major, minor = device_properties(device_index).compute_capability
    what = f"loading a kernel for {spec.arch.value} on GPU {device_index} (compute capability {major}.{minor})"
    module = check(cuda.cuModuleLoadData(compiled.cubin), what, name)
    function = check(cuda.cuModuleGetFunction(module, name.encode()), what, name)
    if spec.shared_memory > _PLAIN_SHARED_BYTES:
        attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        what = f"asking for {spec.shared_memory} bytes of shared memory on GPU {device_index}"
        check(cuda.cuFuncSetAttribute(function, attribute, spec.shared_memory), what, name)
    return LoadedKernel(spec, device_index, compiled, module, int(function))
