"""docs/use-in-your-model.md: its snippets run in their order, and what it names exists."""

from __future__ import annotations

import functools
import re
import socket
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "use-in-your-model.md").read_text(encoding="utf-8")

KEPT: list[object] = []  # freed at the end of a test, a group of gloo may wait for ever: two_processes.py

# On a GPU the first snippet names another device.
DEVICES = ['device, dtype = "cpu", torch.float32', pytest.param('device, dtype = "cuda", torch.bfloat16', marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES, ids=lambda line: line.split('"')[1])
@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_its_snippets_run(device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Compiled by a backend that generates no code, which takes a minute."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names: dict[str, Any] = {"__name__": "page"}
    KEPT.append(names)
    page, lines = re.subn(r"^device, dtype = .*$", device, PAGE, flags=re.MULTILINE)
    assert lines == 1
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) > 8
    for block in blocks:
        exec(compile(block, f"snippet: {block.strip().splitlines()[0]}", "exec"), names)  # noqa: S102 - of our own page
        shown = capsys.readouterr().out
        for said in re.findall(r"print\(.*\)  # (.*)", block):
            assert said in shown
    torch._dynamo.reset()


def test_its_links_lead_somewhere():
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert len(local) > 2
    assert [link for link in local if not (ROOT / "docs" / link).exists()] == []
