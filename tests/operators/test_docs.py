"""docs/use-in-your-model.md: its snippets run in their order, and what it names exists."""

from __future__ import annotations

import functools
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.bert_padding import pad_input, unpad_input

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


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_transformers_is_that_of_torch(causal: bool):
    """Padding on the left, as generate() has it, with all tokens and with the last one alone; its call by the names of transformers."""
    names: dict[str, Any] = {"fa": fa, "unpad_input": unpad_input, "pad_input": pad_input}
    block = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if block.startswith("def attend("))
    exec(compile(block, "attend", "exec"), names)  # noqa: S102 - of our own page
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), *torch.randn(2, 2, 2, 9, 16)
    tokens = torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    place = torch.arange(9)
    distance = place[:, None] - place
    near = ((distance >= 0) if causal else (distance > -3)) & (distance < 3)
    seen = near & tokens[:, None, None, :]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    for new in (9, 1):
        made, weights = names["attend"](
            SimpleNamespace(is_causal=causal), q[:, :, -new:], k, v, tokens, scaling=0.3, sliding_window=3, softcap=None, position_ids=None
        )
        assert weights is None
        own = tokens[:, -new:]
        torch.testing.assert_close(made[own], expected[:, -new:][own], rtol=1e-4, atol=1e-4)
        unpadded, _ = names["attend"](SimpleNamespace(is_causal=causal), q[:1, :, -new:], k[:1], v[:1], None, scaling=0.3, sliding_window=3)
        torch.testing.assert_close(unpadded, expected[:1, -new:], rtol=1e-4, atol=1e-4)
