"""What people see before they run anything: the README, the wheel, the time of an import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from atomr_accel_flashattn.cli.matrix import rendered_readme, support_matrix

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_matrix_is_current() -> None:
    assert rendered_readme(README, support_matrix(ROOT / "benchmarks" / "results")) == README, "run: make readme"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_readme_examples_run(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for said in re.findall(r"print\(.*\)  # (.*)", block):
        assert said in done.stdout


def test_readme_links_lead_somewhere() -> None:
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_wheel_is_under_a_megabyte_and_whole(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "atomr_accel_flashattn"
    wanted = {
        f"atomr_accel_flashattn/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.suffix in {".py", ".cuh", ".npz", ".typed"}
    }
    assert wanted <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"atomr_accel_flashattn"}


def import_seconds(code: str, bytecode: Path) -> float:
    """Seconds that ``code`` keeps the importing thread of a fresh interpreter busy, best of three: a busy machine does not count.

    Modules are compiled by the first run and lie in ``bytecode`` for the others, as an installed package has them; the threads that NumPy's
    BLAS starts and nobody waits for do not count.
    """
    timed = f"import sys, time; began = time.thread_time(); {code}; sys.stdout.write(str(time.thread_time() - began))"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ["PYTHONPYCACHEPREFIX"] = str(bytecode)
    command = [sys.executable, "-c", timed]
    return min(float(subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout) for _ in range(3))


def test_import_is_quick(tmp_path: Path) -> None:
    assert import_seconds("import atomr_accel_flashattn as fa; fa.flash_attn_func, fa.Fa2FwdRequest, fa.run", tmp_path) < 0.4


def test_command_line_is_there_at_once(tmp_path: Path) -> None:
    assert import_seconds("import atomr_accel_flashattn.cli", tmp_path) < 1.0


def test_import_brings_neither_torch_nor_cuda_nor_rich() -> None:
    code = "import sys, atomr_accel_flashattn as fa; fa.flash_attn_func, fa.run; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert {"torch", "cuda.core", "cuda.bindings", "rich", "matplotlib"} & loaded == set()


def test_a_setting_that_is_no_value_is_one_line() -> None:
    environ = os.environ | {"ATOMR_FLASHATTN_CACHE_READONLY": "maybe"}
    done = subprocess.run(
        [sys.executable, "-m", "atomr_accel_flashattn", "info"], capture_output=True, text=True, env=environ, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ConstructionError: ATOMR_FLASHATTN_CACHE_READONLY='maybe'")
    assert "Traceback" not in done.stderr
