"""A GPU made of host memory. Everything above the driver runs as on a card: dispatch, packing, plans, addresses, tensor maps, the actor."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from atomr_accel_flashattn import merge
from atomr_accel_flashattn.actor import gpu as actor_gpu
from atomr_accel_flashattn.dispatch import arch as dispatch_arch, choice
from atomr_accel_flashattn.kernels.backward import BackwardSpec
from atomr_accel_flashattn.launch import driver, launcher
from atomr_accel_flashattn.launch.driver import DeviceProperties
from atomr_accel_flashattn.launch.launcher import LoadedKernel
from atomr_accel_flashattn.runtime import execute, gradients, merging, on_cache, overflow, plan, step
from atomr_accel_flashattn.torch_ops import repeat, repeat_cache
from atomr_accel_flashattn.types import SmArch
from tests.emulator.running import flat_tensor

from .arrays import empty_like, empty_workspace
from .backward_kernels import run_backward_kernel
from .driver import FakeDriver
from .kernel import move_map, read_parameters, run_kernel

if TYPE_CHECKING:
    import pytest

    from atomr_accel_flashattn.kernels.spec import KernelSpec
    from atomr_accel_flashattn.problem import ArrayInfo

__all__ = ["STREAM", "FakeGpu"]

STREAM = 77


@dataclass
class FakeGpu:
    """What was launched: (spec, parameters, stream). The FA3 family's parameters are their ``fwd``.

    ``repeated`` says of each whether one before it was of the same plan: plans load their kernels, and each loading has its number here.
    ``driver`` is where streams and events are, and when launches are finished. ``workspaces`` says of each that was made whether another
    stream may use it, and ``used_on`` for which streams torch was told so: (address, stream).
    """

    properties: DeviceProperties = field(default_factory=lambda: DeviceProperties("Fake", (9, 0), 132, 1 << 30))
    driver: FakeDriver = field(default_factory=FakeDriver)
    launches: list[tuple[KernelSpec, Any, int]] = field(default_factory=list)
    repeated: list[bool] = field(default_factory=list)
    grids: list[int] = field(default_factory=list)
    counters: dict[int, int] = field(default_factory=dict)
    specs: list[KernelSpec] = field(default_factory=list)
    workspaces: list[tuple[int, bool]] = field(default_factory=list)
    used_on: list[tuple[int, int]] = field(default_factory=list)
    status: int = 0  # what the next launches return, without computing; 0 computes
    error: Any = field(default_factory=lambda: np.zeros(1, np.int32))  # the error word of every device
    raises: BaseException | None = None  # what the next launches raise, as a Ctrl-C would
    _numbers: set[int] = field(default_factory=set)

    def install(self, monkeypatch: pytest.MonkeyPatch, arch: SmArch = SmArch.SM_90A) -> None:
        """Take the place of the driver under dispatch, plans, launches and the actor, as a GPU whose calls compile for ``arch``."""
        for module in (choice, plan, launcher):
            monkeypatch.setattr(module, "device_properties", lambda _index: self.properties)
        monkeypatch.setattr(plan, "_plans", {})  # none that hold kernels of other cards
        for name in ("shortcuts", "latest"):
            monkeypatch.setattr(repeat, name, {})
        monkeypatch.setattr(dispatch_arch, "_arch_of_gpu", lambda _index: arch)
        monkeypatch.setattr(merging, "_launches", {})
        for module in (on_cache, repeat_cache):
            monkeypatch.setattr(module, "error_word", lambda _index: self.error.ctypes.data)
        monkeypatch.setattr(overflow, "devices_with_a_word", lambda: (0,))
        monkeypatch.setattr(overflow, "take_error", self.take_error)
        for module in (plan, merging, step):
            monkeypatch.setattr(module, "load_kernel", self.load)
        for module in (execute, gradients, merge):
            monkeypatch.setattr(module, "empty_like_framework", empty_like)
        for module in (execute, gradients, step):
            monkeypatch.setattr(module, "empty_workspace", self.empty_workspace)
        monkeypatch.setattr(step, "clear", lambda _index, address, size, _stream: ctypes.memset(address, 0, size))
        for module in (execute, gradients):
            monkeypatch.setattr(module, "used_on", lambda info, stream: self.used_on.append((info.ptr, stream)))
        for name, stand_in in {
            "counters_for": self.counters_for,
            "encode": lambda spec, _index: flat_tensor(spec),
            "move_function": lambda: move_map,
            "launch_function": lambda: self.on_launch,
            "_wait": lambda _kernel, _stream: None,
        }.items():
            monkeypatch.setattr(launcher, name, stand_in)
        monkeypatch.setattr(driver, "driver", lambda: self.driver)  # which names errors
        for name, stand_in in {
            "driver": lambda: self.driver,
            "current_context": self.driver.current_context,
            "primary_context": self.driver.primary_context,
        }.items():
            monkeypatch.setattr(actor_gpu, name, stand_in)

    @property
    def last(self) -> Any:
        """Parameters of the last launch."""
        return self.launches[-1][1]

    def load(self, spec: KernelSpec, device_index: int) -> LoadedKernel:
        """Stands in for ``load_kernel``: a function is the number of its spec."""
        self.specs.append(spec)
        return LoadedKernel(spec, device_index, cast("Any", None), None, len(self.specs))

    def empty_workspace(self, like: ArrayInfo, size: int, *, other_stream: bool) -> ArrayInfo:
        """Stands in for the function of that name."""
        made = empty_workspace(like, size)
        self.workspaces.append((made.ptr, other_stream))
        return made

    def take_error(self, _index: int) -> int:
        """Stands in for the function of that name."""
        found = int(self.error[0])
        self.error[0] = 0
        return found

    def counters_for(self, device_index: int, stream: int) -> int:
        """Stands in for the function of that name."""
        return self.counters.setdefault(stream, 4096 + 8 * len(self.counters) + (device_index << 32))

    def on_launch(self, config: Any, function: Any, arguments: Any, _extra: None) -> int:
        """Stands in for cuLaunchKernelEx."""
        number, config, address = ctypes.addressof(function._obj), config._obj, arguments._obj[0]
        spec, grid, stream = self.specs[number - 1], config.grid[0], config.stream or 0
        params = read_parameters(spec, address)
        self.driver.launchers.append(threading.current_thread().name)
        if self.raises is not None:
            raise self.raises
        if self.status:
            return self.status
        self.grids.append(grid)
        self.launches.append((spec, params, stream))
        self.repeated.append(number in self._numbers)
        self._numbers.add(number)
        self.driver.log.append(("launch", stream, tuple(getattr(params, name, 0) or 0 for name in "qkv")))
        if isinstance(spec, BackwardSpec):
            run_backward_kernel(spec, params, grid=grid)
        else:
            run_kernel(spec, params, address, grid=grid, counters=self.counters.get(stream))
        return 0
