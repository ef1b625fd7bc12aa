"""The tune command on the card of these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atomr_accel_flashattn.bench.cells import Cell
from atomr_accel_flashattn.cli import tune as tune_module
from atomr_accel_flashattn.tiles.saved import SAVED_TILES, read_saved_tiles
from tests.cli.conftest import Ask, Invoke

from .conftest import Card

pytestmark = pytest.mark.torch


@pytest.fixture
def small_cells(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The shapes that every command below tunes."""
    sizes: dict[str, Any] = {"group": "x", "head_dim": 64, "heads": 2, "heads_kv": 1, "causal": True}
    found = [Cell(lengths=(80, 80), **sizes), Cell(lengths=(100,), **sizes)]
    monkeypatch.setattr(tune_module, "shapes_of", lambda _patterns, _shape: found)
    monkeypatch.setattr(tune_module, "device_count", lambda: 1)
    monkeypatch.setattr(tune_module, "_current_device", lambda: 0)
    return found


COMMAND = ("tune", "--cells", "x", "--tiles", "m128n*w4s1*b2", "--rounds", 2)


def test_tune_checks_times_and_keeps_the_winner(ask: Ask, small_cells: list[Cell], card: Card, tmp_path: Path) -> None:
    found = ask(*COMMAND, "--out", tmp_path / "records")
    assert [shape["shape"] for shape in found["shapes"]] == [str(cell) for cell in small_cells]
    best = found["shapes"][0]["tiles"][0]
    assert (best["tile"], best["finalist"], best["refused"], len(best["rounds"])) == ("m128n48w4s1pb2", True, None, 2)
    assert best["tflops"] == pytest.approx(small_cells[0].flops / best["ms"] * 1e-9)
    (winner,) = found["winners"]
    assert (winner["tile"], winner["shapes"]) == ("m128n48w4s1pb2", [str(cell) for cell in small_cells])
    assert winner["speedup"] > 1.1
    assert winner["short_q"] is found["shapes"][0]["short_q"] is True
    assert found["table"] == [
        f"64: Tile(block_m=128, block_n=48, warps=4, min_blocks=2),  # fa2_fwd sm_80, {winner['speedup']:.3f}x over 2 shapes"
    ]
    assert found["skipped"] == []
    assert found["saved"] == str(tmp_path / "kernels" / SAVED_TILES)
    record = json.loads(Path(found["record"]).read_text())
    assert record["kind"] == "tune"
    assert record["winners"] == found["winners"]
    (entry,) = read_saved_tiles(tmp_path / "kernels")
    assert str(entry.tile) == winner["tile"]
    (listed,) = ask("cache", "list")["tiles"]
    assert (listed["kernel"], listed["tile"], listed["current"]) == ("fa2_fwd_sm80_bf16_d64_rightbound_shortq", winner["tile"], True)


def test_tune_of_the_backward_keeps_its_winner_beside_that_of_the_forward(
    ask: Ask, small_cells: list[Cell], card: Card, tmp_path: Path
) -> None:
    ask(*COMMAND)
    card.ms = lambda tile: 1.0 + tile.block_n / 100
    found = ask("tune", "--cells", "x", "--tiles", "m64n*w4s1b1", "--rounds", 2, "--backward", "--out", tmp_path / "records")
    assert found["direction"] == "backward"
    (winner,) = found["winners"]
    assert (winner["tile"], winner["shapes"]) == ("m64n32w4s1b1", [str(cell) for cell in small_cells])
    best = found["shapes"][0]["tiles"][0]
    assert best["tflops"] == pytest.approx(2.5 * small_cells[0].flops / best["ms"] * 1e-9)
    assert {entry.kernel.partition("_sm")[0] for entry in read_saved_tiles(tmp_path / "kernels")} == {"fa2_fwd", "fa2_bwd"}


@pytest.mark.usefixtures("small_cells")
def test_tune_shows_the_fastest_the_one_in_use_and_what_was_wrong(invoke: Invoke, card: Card, tmp_path: Path) -> None:
    card.wrong = lambda tile: tile.block_n == 48
    result = invoke(*COMMAND, "--no-save", "--table")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "in use" in text
    assert "m128n48w4s1b2: wrong: relative error" in text
    assert "64: Tile(block_m=128, block_n=32, warps=4, min_blocks=2),  # fa2_fwd sm_80" in text
    assert "not kept" in text
    assert not (tmp_path / "kernels" / SAVED_TILES).exists()


@pytest.mark.usefixtures("small_cells")
def test_a_tile_in_use_that_is_wrong_fails_the_command(invoke: Invoke, card: Card) -> None:
    card.wrong = lambda tile: tile.block_n == 64
    result = invoke(*COMMAND)
    assert result.exit_code == 1
    assert "the tile in use could not be timed on 2 shapes: x_d64_h2x1_causal_80: wrong: relative error" in result.stderr
