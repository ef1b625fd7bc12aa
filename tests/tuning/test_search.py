"""The search on a card made of host memory, whose times are made up and whose answers are real."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench.cells import Cell  # noqa: E402
from atomr_accel_flashattn.bench.families import request_of  # noqa: E402
from atomr_accel_flashattn.bench.inputs import check_rows, make_inputs  # noqa: E402
from atomr_accel_flashattn.dispatch import lookup  # noqa: E402
from atomr_accel_flashattn.errors import DeviceLostError, DispatchError  # noqa: E402
from atomr_accel_flashattn.kernels.forward import ForwardSpec  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family, Tile  # noqa: E402
from atomr_accel_flashattn.runtime.execute import run  # noqa: E402
from atomr_accel_flashattn.tiles.saved import read_saved_tiles  # noqa: E402
from atomr_accel_flashattn.tuning import (  # noqa: E402
    Options,
    ShapeResult,
    by_kernel,
    by_table_row,
    keep,
    search,
    table_row,
    tune_shapes,
    winners,
)
from atomr_accel_flashattn.tuning.search import Watch  # noqa: E402
from tests.fakes.tensors import fake  # noqa: E402

from .conftest import Card  # noqa: E402

pytestmark = pytest.mark.torch

CELL = Cell(group="x", head_dim=64, heads=2, heads_kv=1, lengths=(80, 80), causal=True)
SHAPES = [
    CELL,
    replace(CELL, causal=False, band=(20, -1)),
    replace(CELL, causal=False, band=(7, 9), dtype=fa.DType.F16),
    replace(CELL, v_head_dim=32, length_k=200),
    replace(CELL, length_k=30),
    replace(CELL, lengths=(20, 80, 70), packed=True),
    replace(CELL, window=16, alibi=True),
]
NARROW = Options(tiles=("m128n*w4s[12]*b2",), rounds=3)


def tune(cell: Cell = CELL, options: Options = NARROW) -> ShapeResult:
    return tune_all([cell], options)[0]


def tune_all(cells: list[Cell], options: Options = NARROW, watch: Watch = lambda _what, _done, _total: None) -> list[ShapeResult]:
    done: list[ShapeResult] = []
    results, left = tune_shapes(cells, options, lambda _cell: watch, done.append)
    assert left == []
    assert sorted(map(str, (each.cell for each in done))) == sorted(map(str, cells))
    return results


def fastest(result: ShapeResult) -> Tile:
    return result.trials[0].tile


@pytest.mark.parametrize("cell", SHAPES, ids=str)
def test_the_request_of_a_shape_does_what_its_check_expects(cell: Cell) -> None:
    inputs = make_inputs(cell, torch.device("cpu"), l2_bytes=0)[0]
    out = run(request_of(cell, inputs)).out
    assert out.shape[-1] == cell.value_dim
    assert check_rows(cell, inputs, out) < 5e-3
    assert check_rows(cell, inputs, out.flip(-2)) > 0.1


def test_the_arithmetic_of_a_shape_counts_visible_pairs() -> None:
    square = replace(CELL, lengths=(80,), heads=1)
    assert replace(square, causal=False, band=(-1, -1)).flops == 4 * 64 * 80 * 80
    assert replace(square, causal=False, band=(7, 9)).flops == 4 * 64 * sum(min(80, i + 10) - max(0, i - 7) for i in range(80))
    assert replace(square, length_k=100, v_head_dim=32).flops == 2 * 96 * sum(20 + i + 1 for i in range(80))
    assert replace(square, length_k=30).flops == 4 * 64 * sum(range(31))
    assert replace(square, length_k=100, v_head_dim=32).min_bytes == 2 * 96 * (80 + 100)
    names = [str(cell) for cell in SHAPES]
    assert names[1:4] == ["x_d64_h2x1_window20xall_80", "x_d64_h2x1_window7x9_80_f16", "x_d64v32_h2x1_causal_80x200"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.value)
@pytest.mark.parametrize("cell", SHAPES, ids=str)
def test_every_shape_can_be_tuned_in_either_family(hopper: Card, cell: Cell, family: Family) -> None:
    patterns = ("m128n64w4s1b2", "m128n32w4s1*b2") if family is Family.FA2 else ("m128n64*s2*",)
    result = tune(cell, replace(NARROW, family=family, tiles=patterns))
    assert result.spec.family is family
    timed = [trial for trial in result.trials if trial.rounds]
    assert len(timed) >= 2
    assert all(trial.error is not None and trial.error < 5e-3 for trial in timed)
    assert {launch[0].family for launch in hopper.launches} == {family}


def test_the_search_finds_the_fastest_tile_and_then_its_schedule(card: Card) -> None:
    steps: list[tuple[str, int, int]] = []
    (result,) = tune_all([CELL], Options(rounds=4), lambda *step: steps.append(step))
    best = fastest(result)
    assert (best.block_n, best.persistent, best.stages) == (48, True, 1)
    assert card.ms(best) == min(map(card.ms, (spec.tile for spec in card.compiled)))
    assert len(card.compiled) == len(set(card.compiled)), "no kernel is compiled twice"
    persistent = [spec for spec in card.compiled if spec.tile.persistent]
    assert 0 < len(persistent) < len(card.compiled) / 10, "schedules are tried on the fastest tiles only"
    assert all(len(trial.rounds) == (4 if trial.finalist else 1) for trial in result.trials if trial.rounds)
    assert result.in_use.finalist
    assert str(result.in_use.tile) in card.turns[-1], "the tile in use runs in the final"
    assert ("final", 4, 4) in steps
    assert {what for what, done, total in steps if done == total} >= {"compiling tiles", "compiling schedules"}
    assert "checking and timing tiles" in {what for what, _done, _total in steps}


def test_wrong_silent_spilling_and_broken_tiles_are_reported_and_not_timed(card: Card) -> None:
    card.wrong = lambda tile: tile.block_n == 48
    card.silent = lambda tile: tile.block_n == 32
    card.fails = lambda tile: tile.block_n == 16
    card.spills = lambda tile: 65 if tile.block_n == 80 else 64
    result = tune()
    reasons = {trial.tile.block_n: trial.refused for trial in result.trials if trial.refused}
    assert (reasons[48] or "").startswith("wrong: relative error 1")
    assert reasons[32] == "wrong: it leaves rows unwritten, or NaN in them"
    assert reasons[16] == "does not compile: ptxas gave up"
    assert reasons[80] == "spills 65 bytes"
    assert all(trial.rounds == [] for trial in result.trials if trial.refused)
    assert fastest(result).block_n == 64
    launched = {launch[0].tile.block_n for launch in card.launches}
    assert not launched & {16, 80}


def test_a_tile_that_spills_is_timed_when_it_is_the_one_in_use(card: Card) -> None:
    card.spills = lambda _tile: 1000
    result = tune()
    assert [trial.tile for trial in result.trials if trial.rounds] == [result.spec.tile]


def test_a_tile_in_use_that_is_wrong_wins_nothing(card: Card) -> None:
    card.wrong = lambda tile: tile.block_n == 64
    result = tune()
    assert (result.in_use.refused or "").startswith("wrong")
    assert winners([result], by_kernel) == []


@pytest.mark.usefixtures("hopper")
def test_tiles_that_a_small_launch_does_not_tell_apart_are_timed_once() -> None:
    result = tune(options=Options(tiles=("m128n64w12s2*",), rounds=1))
    refused = {str(trial.tile): trial.refused for trial in result.trials if trial.refused}
    assert refused["m128n64w12s2b1"] == "the same launch as m128n64w12s2pb1 here"


def test_a_kernel_that_takes_the_device_down_ends_the_search(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_arguments: Any) -> int:
        raise DeviceLostError("launching failed")

    monkeypatch.setattr(card, "on_launch", lost)
    monkeypatch.setattr("atomr_accel_flashattn.launch.launcher.launch_function", lambda: lost)
    with pytest.raises(DeviceLostError):
        tune()


def test_the_budget_ends_the_search_and_says_so(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=100.0)  # of the search: every look at it finds 100 s gone
    monkeypatch.setattr(search.time, "perf_counter", lambda: next(clock))
    result = tune(options=Options(budget=500.0, rounds=9))
    assert not result.complete
    late = [trial for trial in result.trials if trial.refused == "the budget did not last"]
    assert len(late) > 100
    assert not any(trial.rounds for trial in late)
    assert result.in_use.rounds
    assert len(result.in_use.rounds) < 9
    results, left = tune_shapes([CELL, SHAPES[1]], Options(budget=-1.0), lambda _cell: lambda *_step: None, lambda _result: None)
    assert (results, left) == ([], [str(CELL), str(SHAPES[1])])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(tiles=("m1000*",)), "tiles: got m1000.; none of the [0-9]+ that fit fa2_fwd_sm80_bf16_d64.* matches: m64"),
        (Options(family=Family.FA3), "family: got fa3 for x_d64.*, which resolves to fa2_fwd_sm120"),
    ],
)
def test_what_cannot_be_tuned_is_refused_by_name(card: Card, monkeypatch: pytest.MonkeyPatch, options: Options, said: str) -> None:
    if options.family:
        card.install(monkeypatch, fa.SmArch.SM_120)
    with pytest.raises(DispatchError, match=said):
        tune(options=options)


def test_the_winner_of_a_kernel_is_the_fastest_over_its_shapes(card: Card) -> None:
    long = replace(CELL, lengths=(160,))
    first, second = tune_all([CELL, long])
    (found,) = winners([first, second], by_kernel)
    assert found.tile.block_n == 48
    assert found.shapes == (str(CELL), str(long))
    assert math.isclose(found.speedup, card.ms(found.spec.tile) / card.ms(found.tile))
    other = tune(replace(CELL, causal=False))
    assert len(winners([first, second, other], by_kernel)) == 2
    assert len(winners([first, second, other], by_table_row)) == 1


def test_a_tile_that_is_good_for_one_shape_only_does_not_win(card: Card) -> None:
    first = tune()
    card.ms = lambda tile: 3.0 if tile.block_n == 48 else 1.0 + tile.block_n / 1000
    second = tune(replace(CELL, lengths=(160,)))
    (found,) = winners([first, second], by_kernel)
    assert found.tile.block_n != 48


def test_the_finalists_of_shapes_that_share_a_kernel_are_the_same_on_all_of_them(card: Card) -> None:
    def ms(tile: Tile) -> float:
        short = card.launches[-1][1].seqlen_q == 80
        bad_keys, good_schedule = (48, 0.9) if short else (32, 0.5)
        return (2.0 if tile.block_n == bad_keys else 1.0 + tile.block_m / 1e5) * (good_schedule if tile.persistent != short else 1.0)

    card.ms = ms
    options = Options(tiles=("m64n*w4s1*", "m128n*w4s1*b2"), rounds=2)
    results = tune_all([CELL, replace(CELL, lengths=(160,)), replace(CELL, causal=False)], options)
    short, long, other = ({trial.tile for trial in result.trials if trial.finalist} for result in results)
    assert short == long != other
    found, _ = winners(results, by_kernel)
    assert found.tile.block_n not in {32, 48}
    assert found.tile.persistent


def test_a_schedule_that_a_short_shape_does_not_tell_apart_can_still_win(hopper: Card) -> None:
    hopper.properties = hopper.properties._replace(multiprocessors=4)
    hopper.ms = lambda tile: 1.0 if tile.persistent else 0.5
    options = Options(tiles=("m128n*w12s2*", "m192n64w16s2*"), rounds=1)
    results = tune_all([replace(CELL, lengths=(80,)), replace(CELL, lengths=(300,) * 4)], options)
    assert any(trial.same_as for trial in results[0].trials)
    (found,) = winners(results, by_kernel)
    assert not found.tile.persistent
    assert math.isclose(found.speedup, 2**0.5)


def short_and_long(card: Card, options: Options) -> list[ShapeResult]:
    """Two shapes of one kernel at head dim 128: a short one, the fastest with 64 keys, and a long one, the fastest with 96."""

    def ms(tile: Tile) -> float:
        return 1.0 if tile.block_n == (64 if card.launches[-1][1].seqlen_q == 100 else 96) else 2.0

    card.ms = ms
    short = replace(CELL, head_dim=128, lengths=(100,))
    return tune_all([short, replace(short, lengths=(1100,))], options)


def test_a_short_and_a_long_shape_of_one_kernel_have_a_winner_each(hopper: Card, tmp_path: Path) -> None:
    results = short_and_long(hopper, Options(tiles=("m128n64w12s2*", "m128n96w12s2*"), rounds=1))
    found = winners(results, by_kernel)
    assert [(each.short_q, each.tile.block_n) for each in found] == [(True, 64), (False, 96)]
    for result, other in zip(results, (96, 64), strict=True):
        assert other not in {trial.tile.block_n for trial in result.trials if trial.finalist}, "they share no finalists either"
    keep(found, tmp_path / "kernels", 0)
    saved = {entry.kernel: entry.tile for entry in read_saved_tiles(tmp_path / "kernels")}
    kernel = "fa3_fwd_sm90a_bf16_d128_rightbound_packgqa"
    assert saved == {f"{kernel}_shortq": found[0].tile, kernel: found[1].tile}
    for winner in found:
        extras = fa.Extras(short_q=winner.short_q)
        key = fa.DispatchKey(fa.SmArch.SM_90A, fa.DType.BF16, 128, causal=True, gqa_ratio=2, extras=extras)
        assert lookup(key) == replace(winner.spec, tile=winner.tile)
    q, k = (fake(torch.zeros(1, 1100, heads, 128).bfloat16()) for heads in (2, 1))
    few = k[:, :300]  # that nobody splits
    for length, keys in ((100, 64), (1100, 96)):
        fa.flash_attn_func(q[:, :length], few, few, causal=True)
        assert hopper.launches[-1][0].tile.block_n == keys


def test_a_short_and_a_long_shape_have_a_row_each_where_there_is_a_table_for_few_rows(hopper: Card) -> None:
    results = short_and_long(hopper, Options(tiles=("m128n64w12s2*", "m128n96w12s2*"), rounds=1, group=by_table_row))
    short, long = map(table_row, winners(results, by_table_row))
    assert short.startswith("(128, 128): Tile(block_m=128, block_n=64, ")
    assert "  # fa3_fwd sm_90a, short q, 2.000x over 1 shapes" in short
    assert long.startswith("(128, 128): Tile(block_m=128, block_n=96, ")
    assert "  # fa3_fwd sm_90a, 2.000x over 1 shapes" in long


def test_the_other_family_has_one_row_for_both_and_a_saved_tile_for_each(card: Card) -> None:
    results = short_and_long(card, Options(tiles=("m128n64w4s1b2", "m128n96w4s1b1"), rounds=1, group=by_table_row))
    (row,) = winners(results, by_table_row)
    assert len(row.shapes) == 2
    assert "short q" not in table_row(row)
    assert [winner.short_q for winner in winners(results, by_kernel)] == [True, False]


def test_rows_for_few_rows_are_of_the_widths_and_architectures_that_have_some(card: Card) -> None:
    results = short_and_long(card, Options(tiles=("m128n64w4s1b2", "m128n96w4s1b1"), rounds=1))
    short = winners(results, by_kernel)[0]
    for arch, head_dim, start in (
        (fa.SmArch.SM_90A, 128, "(128, 128): Tile("),
        (fa.SmArch.SM_90A, 192, "(192, 192): Tile("),
        (fa.SmArch.SM_90, 256, "256: Tile("),
    ):
        family = fa.Family.FA3 if arch is fa.SmArch.SM_90A else fa.Family.FA2
        spec = lookup(fa.DispatchKey(arch, fa.DType.BF16, head_dim, causal=True, extras=fa.Extras(family=family)))
        assert isinstance(spec, ForwardSpec)
        row = table_row(replace(short, spec=spec))
        assert row.startswith(start)
        told_apart = by_table_row(spec, short_q=True) != by_table_row(spec, short_q=False)
        assert told_apart == ("short q" in row) == (arch is fa.SmArch.SM_90A and head_dim == 128)


def test_less_than_a_percent_is_noise(card: Card) -> None:
    card.ms = lambda tile: 1.0 if tile.block_n == 64 and tile.stages == 1 else 0.995
    result = tune()
    (found,) = winners([result], by_kernel)
    assert (found.tile, found.speedup) == (result.spec.tile, 1.0)


def test_later_calls_use_what_was_kept(card: Card, tmp_path: Path) -> None:
    """Plans hold the kernels that they were made with: none of before is left."""
    q = fake(torch.randn(2, 80, 2, 64).bfloat16())
    k, v = (fake(torch.randn(2, 80, 1, 64).bfloat16()) for _ in range(2))
    for _ in range(2):
        fa.flash_attn_func(q, k, v, causal=True)
    before = card.launches[-1][0]
    found = winners([tune()], by_kernel)
    path = keep(found, tmp_path / "kernels", 0)
    (entry,) = read_saved_tiles(path.parent)
    assert (entry.tile, entry.device, entry.shapes) == (found[0].tile, "Fake", (str(CELL),))
    expected = replace(before, tile=found[0].tile)
    assert expected != before
    for _ in range(2):
        fa.flash_attn_func(q, k, v, causal=True)
        assert card.launches[-1][0] == expected
    fa.flash_attn_func(q, k, v, causal=True, softcap=10.0)
    assert card.launches[-1][0].tile == before.tile
    assert tune().in_use.tile == found[0].tile, "a second search starts from the first one's winner"


def test_a_winner_is_a_row_of_its_table(card: Card) -> None:
    (found,) = winners([tune()], by_table_row)
    row = table_row(replace(found, tile=Tile(block_m=128, block_n=48, warps=4, stages=2, min_blocks=2, persistent=True)))
    assert row.startswith("64: Tile(block_m=128, block_n=48, warps=4, stages=2, min_blocks=2),  # fa2_fwd sm_80, ")
    spec = lookup(fa.DispatchKey(fa.SmArch.SM_90A, fa.DType.BF16, 192, extras=fa.Extras(v_head_dim=128, family=Family.FA3)))
    assert isinstance(spec, ForwardSpec)
    assert table_row(replace(found, spec=spec, tile=spec.tile)).startswith("(192, 128): Tile(block_m=128, ")


def test_tiles_of_calls_that_are_split_are_those_of_the_whole_kernel(hopper: Card) -> None:
    """A tile that is named is no tile of the kernel that splits the keys."""
    cell = Cell(group="few", head_dim=64, heads=2, heads_kv=1, lengths=(16,), length_k=3000, causal=True)
    result = tune(cell, Options(tiles=("m128n64w12s2*",), rounds=1))
    assert {spec.HEADER for spec, *_ in hopper.launches} == {"fa3_fwd"} == {result.spec.HEADER}


@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.value)
def test_fp8_is_tuned_in_either_family(hopper: Card, family: Family) -> None:
    patterns = ("m64n32w4s[12]*",) if family is Family.FA2 else ("m128n64*s2*",)
    result = tune(replace(CELL, dtype=fa.DType.F8E4M3), replace(NARROW, family=family, tiles=patterns))
    assert (result.spec.family, result.spec.dtype) == (family, fa.DType.F8E4M3)
    timed = [trial for trial in result.trials if trial.rounds]
    assert len(timed) >= 2
    assert all(trial.error is not None and trial.error < 5e-2 for trial in timed)
    assert {launch[0].family for launch in hopper.launches} == {family}
