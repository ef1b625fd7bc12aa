"""``info``: what is here. Devices, versions, environment, cache."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.text import Text

from ..dispatch import arch_of_capability
from ..env import VARIABLES, settings
from ..errors import ArchUnsupportedError, CacheError, FlashAttnError
from ..jit.cache import KernelCache
from ..jit.nvrtc import nvrtc_version
from ..launch.driver import MINIMUM_DRIVER, device_count, device_properties, driver_version
from .output import Json, console, make_table, print_json, print_rows, size_text

__all__ = ["gather", "info"]

_DISTRIBUTIONS = (
    "atomr-accel-flashattn",
    "cuda-bindings",
    "cuda-pathfinder",
    "nvidia-cuda-nvrtc",
    "numpy",
    "ml_dtypes",
    "torch",
    "cupy-cuda13x",
)


def info(as_json: Json = False) -> None:
    """Show the devices, the versions, the environment and the cache."""
    found = gather()
    if as_json:
        print_json(found)
        return
    screen = console()
    versions = make_table("Versions", ("what", "version"))
    for name, number in found["versions"].items():
        versions.add_row(name, number or Text("not installed", "dim"))
    screen.print(versions)

    if found["devices"]:
        devices = make_table("Devices", ("device", "name", "compute capability", "kernels for", "SMs", "memory"), numeric=("SMs", "memory"))
        for device in found["devices"]:
            devices.add_row(
                f"cuda:{device['index']}",
                device["name"],
                device["compute_capability"],
                device["arch"] or Text(device["refused"], "red"),
                str(device["multiprocessors"]),
                size_text(device["memory_bytes"]),
            )
        screen.print(devices)
    else:
        screen.print(Text.assemble(("Devices", "bold"), f"\nno GPU: {found['no_device']}\n"), soft_wrap=True)

    rows = [(name, "-" if value in {None, ""} else str(value)) for name, value in found["settings"].items()]
    print_rows(screen, "Settings", ("environment variable", "value"), rows)
    held = found["cache"]
    contents = held["refused"] or f"{held['kernels']} kernels, {size_text(held['bytes'])}, in {held['directory']}"
    screen.print(Text.assemble(("Cache", "bold"), f"\n{contents}"), soft_wrap=True)


def gather() -> dict[str, Any]:
    """Everything that ``info`` shows, as plain values. Never raises for what is missing: it says what is."""
    devices, reason = _devices()
    return {
        "versions": _versions(),
        "devices": devices,
        "no_device": reason,
        "settings": {VARIABLES[name]: str(value) if isinstance(value, Path) else value for name, value in asdict(settings()).items()},
        "cache": _cache(),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    for name, ask in (("NVRTC", nvrtc_version), ("CUDA of the driver", driver_version)):
        try:
            found[name] = ask()
        except FlashAttnError:
            found[name] = None
    return found


def _devices() -> tuple[list[dict[str, Any]], str | None]:
    """The visible GPUs; without any, the reason."""
    count = device_count()
    if count == 0:
        return [], _why_no_device()
    return [_device(index) for index in range(count)], None


def _why_no_device() -> str:
    try:
        return f"the driver is for CUDA {driver_version()} and shows no device; kernels need CUDA {MINIMUM_DRIVER // 1000}"
    except FlashAttnError as error:
        return str(error)


def _device(index: int) -> dict[str, Any]:
    facts = device_properties(index)
    arch = refused = None
    try:
        arch = arch_of_capability(*facts.compute_capability).value
    except ArchUnsupportedError as error:
        refused = str(error)
    return {
        "index": index,
        "name": facts.name,
        "compute_capability": "{}.{}".format(*facts.compute_capability),
        "arch": arch,
        "refused": refused,
        "multiprocessors": facts.multiprocessors,
        "memory_bytes": facts.memory,
    }


def _cache() -> dict[str, Any]:
    folder = settings().cache_dir
    empty = {"directory": str(folder) if folder else None, "kernels": 0, "bytes": 0}
    if folder is None:
        return {**empty, "refused": "no folder: this user has no home; set ATOMR_FLASHATTN_CACHE_DIR"}
    try:
        cache = KernelCache(folder)
        return {**empty, "kernels": len(cache), "bytes": cache.size(), "refused": None}
    except CacheError as error:
        return {**empty, "refused": str(error)}
