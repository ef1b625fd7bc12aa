"""examples/decode.py and decode_graph.py: their tokens are those of dense attention, whatever the pages and the chunks."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = runpy.run_path(str(EXAMPLES / "decode.py"))


def test_it_runs(capsys: pytest.CaptureFixture[str]):
    EXAMPLE["main"]()
    assert capsys.readouterr().out.count("sure tokens as by dense attention") == 4


def test_pages_and_chunks_change_no_token():
    model = EXAMPLE["Model"](layers=2, seed=3)
    rng = np.random.default_rng(0)
    system, *prompts = (rng.integers(0, model.vocabulary, length).tolist() for length in (33, 5, 40, 1))
    made = [EXAMPLE["Server"](model, 400 // size, size).generate(system, prompts, 6, chunk) for size, chunk in ((1, 7), (16, 64), (5, 1))]
    assert made[0] == made[1] == made[2]
    for prompt, tokens in zip(prompts, made[0], strict=True):
        sure, equal = EXAMPLE["agreement"](model, system + prompt, tokens)
        assert equal == sure > 0


@pytest.mark.torch
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_of_torch(device: str, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torch")
    graph: dict[str, Any] = runpy.run_path(str(EXAMPLES / "decode_graph.py"))
    graph["main"](["--device", device, "--layers", "2", "--tokens", "6" if device == "cpu" else "40"])
    assert capsys.readouterr().out.count("sure tokens as by dense attention") == 4
