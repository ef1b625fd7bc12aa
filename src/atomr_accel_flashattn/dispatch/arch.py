"""Which architecture calls on a device compile for."""

from __future__ import annotations

from functools import cache

from ..errors import ArchUnsupportedError
from ..launch.driver import device_properties
from ..types import Device, SmArch

__all__ = ["arch_of_capability", "best_arch"]


def arch_of_capability(major: int, minor: int) -> SmArch:
    """The architecture whose cubins run on a compute capability.

    Raises:
        ArchUnsupportedError: older than 8.0, or a family that is not built.
    """
    exact = {(8, 0): SmArch.SM_80, (8, 6): SmArch.SM_86, (8, 7): SmArch.SM_86, (8, 9): SmArch.SM_89, (9, 0): SmArch.SM_90A}
    arch = exact.get((major, minor)) or {10: SmArch.SM_100, 12: SmArch.SM_120}.get(major)
    if arch is None:
        raise ArchUnsupportedError(
            f"compute capability: got {major}.{minor}; allowed are 8.0, 8.6, 8.7, 8.9, 9.0, 10.x and 12.x; use the CPU backend"
        )
    return arch


def best_arch(device: Device) -> SmArch:
    """The architecture that calls on ``device`` compile for: on Hopper sm_90a, where ``lookup`` gives each call the family that can do it.

    Raises:
        ArchUnsupportedError: a GPU that no kernel is built for.
        NoDriverError: a GPU device on a machine without a driver.
    """
    return SmArch.CPU if device.kind == "cpu" else _arch_of_gpu(device.index)


@cache
def _arch_of_gpu(index: int) -> SmArch:
    return arch_of_capability(*device_properties(index).compute_capability)
