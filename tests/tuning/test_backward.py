"""The search for tiles of the backward, on the card made of host memory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench.cells import Cell  # noqa: E402
from atomr_accel_flashattn.bench.gradients import Differentiable, backward_request_of  # noqa: E402
from atomr_accel_flashattn.bench.inputs import GRADIENT_ERROR_LIMIT, check_gradients, make_inputs  # noqa: E402
from atomr_accel_flashattn.dispatch import lookup  # noqa: E402
from atomr_accel_flashattn.errors import DispatchError  # noqa: E402
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family, Tile  # noqa: E402
from atomr_accel_flashattn.limits import NOT_BUILT  # noqa: E402
from atomr_accel_flashattn.runtime.execute import run  # noqa: E402
from atomr_accel_flashattn.tiles.saved import read_saved_tiles  # noqa: E402
from atomr_accel_flashattn.tuning import Options, by_kernel, by_table_row, keep, table_row, winners  # noqa: E402

from .conftest import Card  # noqa: E402
from .test_search import CELL, SHAPES, fastest, tune, tune_all  # noqa: E402

pytestmark = pytest.mark.torch

NARROW = Options(backward=True, tiles=("m64n*w[48]s1b1",), rounds=2)
DETERMINISTIC = pytest.param(
    replace(CELL, deterministic=True), marks=pytest.mark.skipif("deterministic" in NOT_BUILT, reason="refused by name"), id="deterministic"
)


def ms(tile: Tile) -> float:
    """The fastest has 32 keys."""
    return 1.0 + tile.block_n / 100 + tile.warps / 1000


@pytest.mark.parametrize("cell", SHAPES, ids=str)
def test_the_backward_request_of_a_shape_does_what_its_check_expects(cell: Cell) -> None:
    inputs = make_inputs(cell, torch.device("cpu"), l2_bytes=0, dout=True)[0]
    made = run(Differentiable.of(cell, inputs).request())
    assert check_gradients(cell, inputs, (made.dq, made.dk, made.dv)) < 5e-3
    recomputed = run(backward_request_of(cell, inputs))
    assert check_gradients(cell, inputs, (recomputed.dq, recomputed.dk, recomputed.dv)) < 5e-3
    for wrong in ((made.dq.flip(-2), made.dk, made.dv), (made.dq, made.dk.roll(1, -3), made.dv), (made.dq, made.dk, made.dv * 0)):
        assert check_gradients(cell, inputs, wrong) > 0.1
    assert check_gradients(cell, inputs, (made.dq, made.dk, made.dv * math.nan)) == math.inf


@pytest.mark.parametrize("cell", [*SHAPES, DETERMINISTIC], ids=str)
def test_every_shape_can_be_tuned(card: Card, cell: Cell) -> None:
    card.ms = ms
    result = tune(cell, NARROW)
    assert isinstance(result.spec, Fa2BackwardSpec)
    timed = [trial for trial in result.trials if trial.rounds]
    assert len(timed) >= 3
    assert all(trial.error is not None and trial.error < GRADIENT_ERROR_LIMIT[cell.dtype] / 2 for trial in timed)
    assert result.flops == cell.backward_flops
    assert fastest(result).block_n == 32


def test_all_launches_of_a_backward_are_timed(card: Card) -> None:
    tune(options=NARROW)
    headers = [launch[0].HEADER for launch in card.launches]
    assert headers[0] == headers[1] == "fa2_fwd", "a forward for each input set, and no more"
    assert headers[-3:] == ["bwd_preprocess", "fa2_bwd", "bwd_postprocess"]
    assert all(isinstance(spec, Fa2BackwardSpec) for spec in card.compiled)


def test_wrong_silent_and_spilling_tiles_are_reported_and_not_timed(card: Card) -> None:
    card.wrong = lambda tile: tile.block_n == 32
    card.silent = lambda tile: (tile.block_m, tile.block_n, tile.warps) == (64, 64, 4)  # not the forward's
    card.spills = lambda tile: 65 if tile.block_n == 64 and tile.warps == 8 else 0
    result = tune(options=NARROW)
    reasons = {str(trial.tile): trial.refused or "" for trial in result.trials}
    assert reasons["m64n32w4s1b1"].startswith("wrong: relative error 1, at most 0.04 allowed")
    assert reasons["m64n64w4s1b1"] == "wrong: it leaves rows unwritten, or NaN in them"
    assert reasons["m64n64w8s1b1"] == "spills 65 bytes"
    assert result.in_use.rounds


def test_a_winner_is_saved_and_later_calls_take_it(card: Card, tmp_path: Path) -> None:
    card.ms = ms
    result = tune(options=NARROW)
    (found,) = winners([result], by_kernel)
    before = result.spec
    assert found.tile == Tile(block_m=64, block_n=32, warps=4) != before.tile
    keep([found], tmp_path / "kernels", 0)
    (entry,) = read_saved_tiles(tmp_path / "kernels")
    assert (entry.kernel, entry.current) == ("fa2_bwd_sm80_bf16_d64_rightbound", True)
    forward = fa.DispatchKey(fa.SmArch.SM_80, fa.DType.BF16, 64, causal=True, gqa_ratio=2)
    key = replace(forward, extras=fa.Extras(direction="bwd"))
    assert lookup(key) == replace(before, tile=found.tile)
    assert lookup(forward).tile.block_n == 64, "the forward's tile stays"
    assert lookup(replace(key, extras=fa.Extras(direction="bwd", tiles_for=fa.SmArch.SM_80))) == before
    inputs = make_inputs(CELL, torch.device("cpu"), l2_bytes=0, dout=True)[0]
    assert check_gradients(CELL, inputs, _on(card, CELL)) < 5e-3
    assert card.last_tile == found.tile


def _on(card: Card, cell: Cell) -> list[torch.Tensor]:
    """The gradients of the first inputs of a cell, made on the card."""
    from .conftest import search

    (inputs, *_) = search.make_inputs(cell, torch.device("cpu"), l2_bytes=0, seed=0, dout=True)
    made = run(Differentiable.of(cell, inputs).request())
    assert card.launches
    return [each.as_subclass(torch.Tensor) for each in (made.dq, made.dk, made.dv)]


def test_the_rows_of_the_backward_are_those_of_its_own_table(card: Card) -> None:
    card.ms = ms
    options = replace(NARROW, group=by_table_row)
    found = winners(tune_all([CELL, replace(CELL, causal=False), replace(CELL, head_dim=32)], options), by_table_row)
    assert [table_row(each).partition(",  # ")[0] for each in found] == [
        f"{width}: Tile(block_m=64, block_n=32, warps=4)" for width in (64, 32)
    ]
    assert "  # fa2_bwd sm_80, " in table_row(found[0])


@pytest.mark.usefixtures("hopper")
def test_hopper_tunes_the_mma_sync_kernel_and_has_no_other() -> None:
    assert tune(options=NARROW).spec.arch is fa.SmArch.SM_90
    with pytest.raises(DispatchError, match=r"family: got fa3 for x_d64.*, which resolves to fa2_bwd_sm90"):
        tune(options=replace(NARROW, family=Family.FA3))
