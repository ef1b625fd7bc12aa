"""How the commands are called: in this process, with a kernel cache of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from atomr_accel_flashattn.cli import app
from atomr_accel_flashattn.env import settings

Invoke = Callable[..., Result]
Ask = Callable[..., Any]


def _runner() -> CliRunner:
    """One that keeps standard error apart; click before 8.2 has to be asked for it."""
    return CliRunner(mix_stderr=False) if "mix_stderr" in signature(CliRunner).parameters else CliRunner()


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables in their wide form: pytest-xdist tells its workers how wide the terminal is."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder that the environment names."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("ATOMR_FLASHATTN_CACHE_DIR", str(folder))
    settings.cache_clear()
    yield folder
    settings.cache_clear()


@pytest.fixture
def invoke() -> Invoke:
    """Run a command: ``invoke("cache", "size")``. Exceptions other than a clean exit are raised."""

    def call(*arguments: object) -> Result:
        result = _runner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def ask(invoke: Invoke) -> Ask:
    """Run a command with ``--json``, expect status 0, and give what it printed."""

    def call(*arguments: object) -> Any:
        result = invoke(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return call
