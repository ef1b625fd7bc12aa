"""What all tests share: what is skipped where, and a kernel cache and a thread count of their own."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: what merges is decided by the change, not by luck. `--hypothesis-profile=explore` draws new ones.
settings.register_profile("explore", deadline=None)
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers share the cores already; read when NumPy is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled kernels between runs, apart from the user's own: their keys hold everything that decides their code."""
    os.environ.setdefault("ATOMR_FLASHATTN_CACHE_DIR", str(Path(config.rootpath) / ".pytest_cache" / "kernels"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot do."""
    absent = {}
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        absent["gpu"] = pytest.mark.skip(reason="no GPU that kernels run on")
    for package in ("torch", "ray"):
        if find_spec(package) is None:
            absent[package] = pytest.mark.skip(reason=f"{package} is not installed: make test {package.upper()}=1")
    for item in items:
        for name, skip in absent.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


def _has_gpu() -> bool:
    from atomr_accel_flashattn.launch.driver import device_count

    return device_count() > 0 or os.environ.get("ATOMR_FLASHATTN_TEST_DEVICE") == "cpu"
