from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atomr_accel_flashattn.errors import NoDriverError
from atomr_accel_flashattn.launch import driver
from atomr_accel_flashattn.launch.launcher import load_kernel
from tests.fakes import libcuda
from tests.jit.kernels import MASK

_HERE = Path(__file__).parent
_HELPERS = {"pointers", "loaded", "prepared", "current", "in_threads"}
_SCENARIOS = [
    pytest.param(module, node.name, id=node.name)
    for module in ("scenarios", "scenarios_fa3")
    for node in ast.parse((_HERE / f"{module}.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name not in _HELPERS and not node.name.startswith("_")
]


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return libcuda.build(tmp_path_factory.mktemp("driver")) or pytest.skip("the fake driver needs a C compiler")


@pytest.fixture(scope="session")
def scenario_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenario_cache")


@pytest.mark.parametrize(("module", "scenario"), _SCENARIOS)
def test_with_a_fake_driver(module: str, scenario: str, fake_driver: Path, scenario_cache: Path):
    environ = {**os.environ, "LD_LIBRARY_PATH": str(fake_driver), "SCENARIO_CACHE": str(scenario_cache), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.jit.{module}", scenario],
        env=environ, cwd=_HERE.parent.parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(driver.device_count() > 0, reason="this machine has a GPU")
def test_no_driver_is_named_and_asking_again_neither_hangs_nor_changes_the_answer():
    for _ in range(3):
        with pytest.raises(NoDriverError, match="no NVIDIA driver on this machine"):
            load_kernel(MASK, 0)
    assert driver.device_count() == 0
