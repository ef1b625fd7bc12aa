"""Load a kernel on a device, and launch it.

A steady-state launch touches three things: this thread's block of parameters, one ctypes array assignment for the addresses, one foreign
call with arguments that exist already; in the FA3 family also the tensor map of every address that changed, and the counters of a stream
that may be captured. Nothing on that path looks at the device: a function belongs to its context, and CUDA refuses to launch it from
another one before anything has run; only then is the right context made current and the launch repeated.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..env import settings
from ..errors import LaunchError
from .cache import KernelCache
from .compile import CompiledKernel, compile_kernel
from .counters import LEGACY_STREAMS, counters_for
from .driver import LaunchConfig, check, cuda_error, current_context, device_properties, driver, launch_function, primary_context
from .params import Fa3FwdParams, KernelParams
from .spec import KernelSpec
from .tensor_map import TENSOR_MAP_ALIGNMENT, move, move_function

__all__ = ["LaunchPlan", "LoadedKernel", "launch", "load_kernel"]

_MAX_GRID = (1 << 31) - 1
_NOWHERE = (-1, -1, -1)  # addresses that no map has
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

P = TypeVar("P", bound=KernelParams)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedKernel:
    """A kernel on one device. ``function`` is a CUfunction of the device's primary context; ``module`` keeps it alive."""

    spec: KernelSpec
    device_index: int
    compiled: CompiledKernel
    module: Any
    function: int

    def plan(self, params: P, grid: int, addresses: int | None = None) -> LaunchPlan[P]:
        """A launch of ``grid`` blocks with ``params``, ready to be repeated with other addresses.

        Args:
            params: the parameters; they are copied.
            grid: number of blocks.
            addresses: how many of the leading addresses every launch brings; the others stay as they are. None: all of them.

        Raises:
            LaunchError: ``grid`` outside 1..2^31-1.
        """
        plan = _WaitingLaunchPlan if settings().debug else LaunchPlan
        return plan(self, params, grid, params.POINTERS if addresses is None else addresses)


class _Block:
    """Parameters and launch configuration of one thread, and what ctypes needs to pass them.

    ``arguments`` are those of cuLaunchKernelEx, converted once: passing them costs 0.05 us less than objects that ctypes must look into.
    """

    __slots__ = ("_config", "_of_kernel", "_params", "arguments", "pointers", "stream")

    def __init__(self, kernel: LoadedKernel, params: KernelParams, grid: int, addresses: int) -> None:
        self._params = _aligned_copy(params)
        self._config = LaunchConfig((grid, 1, 1), (kernel.spec.tile.threads, 1, 1), kernel.spec.shared_memory)
        self._of_kernel = (ctypes.c_void_p * 1)(ctypes.addressof(self._params))
        self.pointers: Any = (ctypes.c_uint64 * addresses).from_buffer(self._params)
        self.stream = 0
        function = ctypes.c_char.from_address(kernel.function)  # never read: a CUfunction is a handle
        self.arguments = (ctypes.byref(self._config), ctypes.byref(function), ctypes.byref(self._of_kernel), None)

    def set_stream(self, stream: int) -> None:
        """Launch into ``stream`` from now on."""
        self._config.stream = stream
        self.stream = stream


class _MappedBlock(_Block):
    """A :class:`_Block` of the FA3 family: tensor maps follow the addresses of q, k and v, the counters follow the stream.

    Nothing has to :meth:`follow` when the addresses are those in ``mapped`` and the stream is the one in ``settled``.
    """

    __slots__ = ("_at", "_device_index", "_maps", "_persistent", "_replace_address", "_values", "mapped", "settled")

    def __init__(self, kernel: LoadedKernel, params: Fa3FwdParams, grid: int, addresses: int) -> None:
        super().__init__(kernel, params, grid, addresses)
        self._values: Any = self._params
        self._device_index = kernel.device_index
        self._persistent = kernel.spec.tile.persistent
        self._maps = tuple(ctypes.addressof(each) for each in (self._values.q_map, self._values.k_map, self._values.v_map))
        self._at = list(params.addresses()[:3])  # where each map reads
        self._replace_address = move_function()
        self.mapped = params.addresses()[:3]
        self.settled = _NO_STREAM

    def follow(self, stream: int, pointers: tuple[int, ...]) -> None:
        """Read ``pointers`` through the maps, and count in the counters of ``stream``.

        Every launch asks anew for those of a stream that may be captured, or be another one under the same handle. The legacy default
        stream is neither.
        """
        if pointers[:3] != self.mapped:
            self._move(pointers[:3])
        if stream != self.settled:
            self.settled = _NO_STREAM  # until the counters are there
            if self._persistent:
                self._values.counters = counters_for(self._device_index, stream)
            if stream <= LEGACY_STREAMS or not self._persistent:
                self.settled = stream

    def _move(self, qkv: tuple[int, ...]) -> None:
        """An array without elements has the address 0 in every call, and its map is never read."""
        at, self.mapped = self._at, _NOWHERE  # until all have moved
        for i in range(3):
            now = qkv[i]
            if now != at[i] and now:
                at[i] = 0  # until it has moved
                if self._replace_address(self._maps[i], now):
                    move(self._maps[i], now, self._device_index)
                at[i] = now
        self.mapped = qkv


class _ThreadBlocks(threading.local):
    """A :class:`_Block` for each thread that asks: another thread may write its addresses while CUDA reads ours."""

    def __init__(self, kernel: LoadedKernel, params: KernelParams, grid: int, addresses: int) -> None:
        if isinstance(params, Fa3FwdParams):
            self.block: Any = _MappedBlock(kernel, params, grid, addresses)
        else:
            self.block = _Block(kernel, params, grid, addresses)


class LaunchPlan(Generic[P]):
    """A launch whose shapes are fixed: only addresses and stream change from call to call. Safe to share between threads."""

    __slots__ = ("_blocks", "_launch", "_mapped", "grid", "kernel")

    def __init__(self, kernel: LoadedKernel, params: P, grid: int, addresses: int) -> None:
        _check_grid(kernel, grid)
        self.kernel = kernel
        self.grid = grid
        self._launch = launch_function()
        self._blocks = _ThreadBlocks(kernel, params, grid, addresses)
        self._mapped = isinstance(params, Fa3FwdParams)

    def launch(self, stream: int, pointers: tuple[int, ...]) -> None:
        """Launch into ``stream`` (a raw CUstream, 0 for the default one) on ``pointers``, the leading addresses of the parameters.

        Raises:
            ValueError: more or fewer addresses than the plan was made for.
            LaunchError: CUDA refused the launch.
            DeviceLostError: an earlier kernel left the context unusable.
        """
        block = self._blocks.block
        block.pointers[:] = pointers
        if stream != block.stream:
            block.set_stream(stream)
        if self._mapped and (stream != block.settled or pointers[:3] != block.mapped):
            block.follow(stream, pointers)
        code = self._launch(*block.arguments)
        if code:
            _recover(self.kernel, self.grid, block, code)


class _WaitingLaunchPlan(LaunchPlan[P]):
    """The debug form: waits for the kernel, so that its errors are raised by the call that made them."""

    __slots__ = ()

    def launch(self, stream: int, pointers: tuple[int, ...]) -> None:
        super().launch(stream, pointers)
        _wait(self.kernel, stream)


def launch(kernel: LoadedKernel, grid: int, params: KernelParams, stream: int) -> None:
    """Launch once, at the addresses in ``params``. Launches of one shape that repeat are cheaper through :meth:`LoadedKernel.plan`.

    Raises:
        LaunchError: ``grid`` outside 1..2^31-1, or CUDA refused the launch.
        DeviceLostError: an earlier kernel left the context unusable.
    """
    _check_grid(kernel, grid)
    block = _Block(kernel, params, grid, params.POINTERS)
    block.set_stream(stream)
    code = launch_function()(*block.arguments)
    if code:
        _recover(kernel, grid, block, code)
    if settings().debug:
        _wait(kernel, stream)


def _aligned_copy(params: KernelParams) -> KernelParams:
    """The same parameters on an address that tensor maps may have."""
    room = bytearray(ctypes.sizeof(params) + TENSOR_MAP_ALIGNMENT)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % TENSOR_MAP_ALIGNMENT
    room[offset : offset + ctypes.sizeof(params)] = bytes(params)
    return type(params).from_buffer(room, offset)  # keeps `room`


def _check_grid(kernel: LoadedKernel, grid: int) -> None:
    if not 1 <= grid <= _MAX_GRID:
        raise LaunchError(f"a grid of {grid} blocks: allowed are 1..{_MAX_GRID}; split the batch", kernel_name=kernel.spec.kernel_name)


def _recover(kernel: LoadedKernel, grid: int, block: _Block, code: int) -> None:
    """After a launch that failed with ``code``: try again under the device's context if the thread's was another or none, else raise."""
    index, spec = kernel.device_index, kernel.spec
    if code in _WRONG_CONTEXT:
        cuda, again = driver(), launch_function()
        current = int(check(cuda.cuCtxGetCurrent(), "cuCtxGetCurrent", spec.kernel_name))
        if current == 0 and index == 0:  # what the CUDA runtime would make current here; let it stay, and the next launch is quick
            check(cuda.cuCtxSetCurrent(primary_context(index)), "cuCtxSetCurrent", spec.kernel_name)
            code = again(*block.arguments)
        elif current != int(primary_context(index)):  # for this launch only: the thread's current device is not ours to change
            with current_context(index):
                code = again(*block.arguments)
    if code:
        size = f"{grid} blocks of {spec.tile.threads} threads, {spec.shared_memory} bytes of shared memory"
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
