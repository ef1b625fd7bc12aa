"""examples/decode.py: its tokens are those of dense attention, whatever the pages and the chunks."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pytest

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "decode.py"))


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
