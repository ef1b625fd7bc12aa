"""mypy on code that uses the package, and that all overloads of a call are its signature."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import functional

ROOT = Path(__file__).parents[2]


def test_mypy_sees_the_types_that_calls_return(tmp_path: Path):
    """An ignore that is not needed is an error too, so what is wrong in that file is known to be found."""
    api = pytest.importorskip("mypy.api")
    snippet = Path(__file__).with_name("functional_calls.py")
    options = ["--strict", "--warn-unused-ignores", f"--cache-dir={tmp_path}", f"--config-file={ROOT / 'pyproject.toml'}"]
    shown, errors, status = api.run([*options, str(snippet)])
    assert status == 0, shown + errors


TREE = ast.parse(Path(functional.__file__).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", functional.__all__)
def test_every_overload_has_the_arguments_of_the_call(name: str):
    definitions = [node for node in TREE.body if isinstance(node, ast.FunctionDef) and node.name == name]
    overloads = definitions[:-1]
    assert len(overloads) == 3
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    for each in overloads:
        positional = [argument.arg for argument in each.args.args]
        assert positional == [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [argument.arg for argument in each.args.kwonlyargs] == [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert len(each.args.defaults) == sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty for p in parameters)
