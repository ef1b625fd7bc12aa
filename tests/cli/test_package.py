"""What people see before they run anything: the README, the wheel, the time of an import."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from atomr_accel_flashattn.cli.matrix import rendered_readme, support_matrix

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_matrix_is_current() -> None:
    assert rendered_readme(README, support_matrix(ROOT / "benchmarks" / "results")) == README, "run: make readme"


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TORCH_BLOCKS = [block for block in BLOCKS if "import torch" in block]


def run_block(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said in re.findall(r"print\(.*\)  # (.*)", block):
        assert said in done.stdout or said.startswith("plan ")


@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in TORCH_BLOCKS])
def test_readme_examples_run(block: str) -> None:
    run_block(block)


@pytest.mark.torch
@pytest.mark.gpu
@pytest.mark.parametrize("block", TORCH_BLOCKS)
def test_readme_examples_for_a_gpu_run(block: str) -> None:
    run_block(block)


@pytest.mark.torch
@pytest.mark.parametrize("block", TORCH_BLOCKS)
def test_readme_examples_for_a_gpu_run_on_the_cpu_too(block: str) -> None:
    assert 'device="cuda"' in block
    run_block(block.replace('device="cuda"', 'device="cpu"'))


def test_readme_begins_with_what_a_new_user_asks_for() -> None:
    assert len(TORCH_BLOCKS) == 1
    assert TORCH_BLOCKS[0].count("\n") <= 10
    order = ["\n```diff\n", *TORCH_BLOCKS, "\n### Beside flash-attn\n", "\n## Speed\n", "\n<!-- matrix: start -->\n"]
    places = [README.index(part) for part in order]
    assert places == sorted(places)


def test_the_imports_that_readme_tells_to_change_are_there() -> None:
    (block,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    lines = block.splitlines()
    new = [line[1:] for line in lines if line.startswith("+")]
    assert [line[1:].replace("flash_attn", "atomr_accel_flashattn", 1) for line in lines if line.startswith("-")] == new
    subprocess.run([sys.executable, "-c", "\n".join(new)], check=True)


def test_readme_speed_is_that_of_its_record() -> None:
    """Ahead and behind are by 3 % and more; cells count where a peer did them in full; softcap stands apart."""
    (path,) = set(re.findall(r"\[record\]\((benchmarks/results/forward_\S+T151238\.json)\)", README))
    record = json.loads((ROOT / path).read_text(encoding="utf-8"))
    assert record["skipped"] == record["failures"] == []
    rows = [row for row in record["rows"] if "softcap" not in row["group"]]
    ratios = {peer: [ratio for row in rows if (ratio := speed_over(row, peer))] for peer in ("fa2", "cudnn", "fa3", "fa4")}
    ratios["fastest"] = [
        min(each) for row in rows if (each := [ratio for peer in ("fa2", "cudnn", "fa3", "fa4") if (ratio := speed_over(row, peer))])
    ]
    said = README.partition("<!-- speed: start -->")[2].partition("<!-- speed: end -->")[0].strip().splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in said] == [summary(each) for each in ratios.values()]


def test_readme_says_what_the_other_family_is_on_the_card_that_timed_it() -> None:
    (path,) = re.findall(r"benchmarks/results/forward_\S+T041024\.json", README)
    rows = json.loads((ROOT / path).read_text(encoding="utf-8"))["rows"]
    cells, mean, ahead, ties, behind = summary(
        [ratio for row in rows if "softcap" not in row["group"] and (ratio := speed_over(row, "fa2"))]
    )
    text = " ".join(README.split())
    assert "were timed on a Hopper card" in text
    assert (
        f"{mean} of the speed of torch's FlashAttention-2, the geometric mean of the same {cells} cells ({ahead} ahead, {ties} ties;"
        in text
    )
    assert behind == "0"


def speed_over(row: dict[str, Any], peer: str) -> float | None:
    """Our speed over a peer's; None where it has no time, or did something less."""
    ours, theirs = row["results"]["ours"], row["results"].get(peer)
    return theirs["ms"] / ours["ms"] if theirs and theirs["ms"] and not theirs["note"] else None


def summary(ratios: list[float]) -> list[str]:
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    ahead, behind = sum(ratio > 1.03 for ratio in ratios), sum(ratio < 0.97 for ratio in ratios)
    return [str(len(ratios)), f"{mean:.2f}", str(ahead), str(len(ratios) - ahead - behind), str(behind)]


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
    subprocess.run(command, check=True)
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


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)], check=True, cwd=ROOT)
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


def test_the_sdist_is_the_whole_tree(sdist: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607 - git
    if listed.returncode != 0 or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    assert [path for path in listed.stdout.splitlines() if (ROOT / path).exists() and not (sdist / path).exists()] == []


def test_the_tests_that_read_other_files_pass_in_the_sdist(sdist: Path) -> None:
    tests = ["tests/cli/test_docs.py::test_files_that_are_named_exist[README.md]", "tests/cli/test_package.py"]
    chosen = ["-k", "files_that_are_named or matrix_is_current or links_lead or of_its_record"]
    environ = os.environ | {"PYTHONPATH": str(sdist / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests, *chosen]
    done = subprocess.run(command, cwd=sdist, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_metadata_names_authors_licence_and_a_typer_that_works() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (author,) = project["authors"]
    assert f"Copyright 2026 {author['name']}\n" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert any(each.startswith("typer>=0.15.4") for each in project["dependencies"])


def test_every_dependency_has_a_lowest_version_to_test_with() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "lowest_versions.py"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert {"typer==0.15.4", "cuda-toolkit==13.0.0"} <= set(lines)
    assert all(re.fullmatch(r"[\w.-]+==\d+(\.\d+)*", line) for line in lines)
    assert "make test-lowest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_a_wheel_of_nvrtc_has_the_size_that_readme_tells() -> None:
    assert "58 MB downloaded and 142 MB unpacked" in " ".join(README.split())
    files = importlib.metadata.files("nvidia-cuda-nvrtc") or []
    unpacked = sum(file.size or 0 for file in files) / 2**20
    if importlib.metadata.version("nvidia-cuda-nvrtc").startswith("13.5."):
        assert 135 < unpacked < 150


def test_every_cuda_header_names_its_licence() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "spdx.py", "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), "run: python tools/spdx.py"


def test_the_page_for_contributors_names_verbs_that_there_are() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = re.findall(r"make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert {"lint", "test", "test-lowest", "format", "readme"} <= set(verbs)
    assert [verb for verb in verbs if not re.search(rf"^{verb}:", makefile, re.MULTILINE)] == []


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
    done = subprocess.run([sys.executable, "-m", "atomr_accel_flashattn", "info"], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ConstructionError: ATOMR_FLASHATTN_CACHE_READONLY='maybe'")
    assert "Traceback" not in done.stderr
