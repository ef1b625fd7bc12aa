"""The pages under docs/ name files, classes and functions; all of them exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from atomr_accel_flashattn.bench.cache_cells import cache_cells, fp8_cache_cells
from atomr_accel_flashattn.bench.cells import all_cells, backward_cells, fp8_cells

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "atomr_accel_flashattn"
PAGES = ("README.md", "docs/architecture.md", "docs/life-of-a-request.md", "docs/performance.md")
FOREIGN = {
    *{"cuda.bindings", "cuda.core", "cuda.core.Program", "cuda.core.utils.FileStreamProgramCache", "cuLaunchKernelEx", "lazy_loader"},
    *{"cp.async", "cp.reduce.async.bulk"},
    *{"torch.empty_like", "torch.func", "torch.func.grad", "torch.library.register_autograd", "vmap"},
}


@cache
def spoken(page: str) -> list[str]:
    """What a page writes in code style, without its code blocks."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@cache
def defined_names() -> frozenset[str]:
    """Every class, function, method and constant of the package, in Python and in CUDA."""
    patterns = {".py": r"^\s*(?:class|def) (\w+)|^(\w+)(?:: [^=\n]+)? = ", ".cuh": r"\b(?:struct|class) (\w+)|\b(\w+)\("}
    texts = ((patterns[path.suffix], path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*") if path.suffix in patterns)
    return frozenset(name for pattern, text in texts for pair in re.findall(pattern, text, re.MULTILINE) for name in pair if name)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """A name without its folder is that of a file in some room of the package."""
    paths = [word for word in spoken(page) if re.fullmatch(r"[\w./-]+(\.(pyi?|cuh|md|toml)|/)", word)]
    names = {path.name for path in PACKAGE.rglob("*.*")}
    assert [path for path in paths if path not in names and not any((base / path).exists() for base in (PACKAGE, ROOT))] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_names_that_are_named_exist(page: str) -> None:
    settings = (PACKAGE / "env.py").read_text(encoding="utf-8")
    names = {word for word in spoken(page) if re.fullmatch(r"[A-Za-z_][\w.]*", word) and not re.search(r"\.(pyi?|cuh|md|h|toml)$", word)}
    unknown = {name for name in names - FOREIGN if name.rpartition(".")[2] not in defined_names()}
    assert {name for name in unknown if name not in settings} == set()


def test_every_kind_of_record_is_explained() -> None:
    """The kind is what a file's name begins with."""
    kinds = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in benchmark_tables())))
    names = sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir() if path.suffix in {".json", ".txt"})
    of_nvrtc = re.compile(r"^with_nvrtc_[\d.]+_")  # the same kind, with another compiler
    assert [name for name in names if not any(of_nvrtc.sub("", name).startswith(kind) for kind in kinds)] == []


def test_every_group_of_cells_is_explained() -> None:
    forward, cache = (set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) for part in benchmark_page().split("### Over a KV cache"))
    assert {cell.group for cell in [*all_cells(), *fp8_cells(), *backward_cells()]} - {"deterministic"} <= forward
    assert {cell.group for cell in [*cache_cells(), *fp8_cache_cells()]} <= cache


def benchmark_page() -> str:
    """What benchmarks/README.md says."""
    return (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def benchmark_tables() -> list[str]:
    """The rows of its tables."""
    return [line for line in benchmark_page().splitlines() if line.startswith("| `")]


PROSE = [
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_prose_has_at_most_100_columns(path: Path) -> None:
    """Tables, code and pictures may have more."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "![", "    "))]
    assert [line for line in prose if len(line) > 100] == []
