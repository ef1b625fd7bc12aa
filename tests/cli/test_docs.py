"""The pages under docs/ name files, classes and functions; all of them exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

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
