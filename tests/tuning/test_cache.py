"""The tiles of the kernel over a KV cache, searched on a card whose kernels run in the emulator and whose times are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench.cache_cells import CacheCell  # noqa: E402
from atomr_accel_flashattn.bench.cache_requests import cache_request  # noqa: E402
from atomr_accel_flashattn.bench.timing import Contestant  # noqa: E402
from atomr_accel_flashattn.cli import tune as tune_module  # noqa: E402
from atomr_accel_flashattn.cli.tune_shapes import shapes_of  # noqa: E402
from atomr_accel_flashattn.dispatch import forget_lookups, lookup, resolve  # noqa: E402
from atomr_accel_flashattn.kernels.kvcache import Fa2KvCacheSpec, SplitCombineSpec  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Tile  # noqa: E402
from atomr_accel_flashattn.tiles.saved import kernel_without_tile, read_saved_tiles  # noqa: E402
from atomr_accel_flashattn.tiles.space import tiles_that_fit  # noqa: E402
from atomr_accel_flashattn.tuning import Options, ShapeResult, by_kernel, keep, search, table_row, tune_shapes, winners  # noqa: E402
from atomr_accel_flashattn.tuning.search import _first_candidates  # noqa: E402
from tests.cli.conftest import Ask, Invoke  # noqa: E402
from tests.cli.test_tune import BY_HAND  # noqa: E402

from .conftest import Card, _fake_cache_inputs  # noqa: E402

pytestmark = pytest.mark.torch

CELL = CacheCell(group="x", batch=1, length=600, heads=2, heads_kv=1, head_dim=32, layout="page16")
ROWS = replace(CELL, layout="rows", queries=20)
NARROW = Options(tiles=("m16n*w4s1b1", "m32n16w4s1b1"), rounds=2)


@pytest.fixture
def card(card: Card) -> Card:
    """As in the conftest; two stages cost time, so that the tile in use loses."""
    card.ms = lambda tile: 1.0 + tile.stages / 10 + tile.block_n / 1000
    return card


def tune(cell: CacheCell, options: Options = NARROW) -> ShapeResult:
    (result,), left = tune_shapes([cell], options, lambda _cell: lambda *_step: None, lambda _result: None)
    assert left == []
    return result


def test_a_cell_over_pages_is_tuned_split_or_not(card: Card) -> None:
    card.properties = card.properties._replace(multiprocessors=8)  # so that a sequence is split
    result = tune(CELL)
    assert isinstance(result.spec, Fa2KvCacheSpec)
    assert (result.spec.paged, result.spec.split, result.cache_rows) == (True, True, 16)
    timed = [trial for trial in result.trials if trial.rounds]
    assert [str(trial.tile) for trial in timed][:2] == ["m16n16w4s1b1", "m16n32w4s1b1"]
    assert all(trial.error is not None and trial.error < 5e-3 for trial in timed)
    assert result.flops == CELL.flops
    assert {type(launch[0]) for launch in card.launches} == {Fa2KvCacheSpec, SplitCombineSpec}
    assert all(trial.tile.block_m == 16 for trial in result.trials), "no tile has more rows than the shape"


def test_a_winner_is_for_calls_with_as_many_rows(card: Card, tmp_path: Path) -> None:
    results = [tune(CELL), tune(replace(CELL, length=400))]
    (winner,) = winners(results, by_kernel)
    assert (str(winner.tile), winner.cache_rows) == ("m16n16w4s1b1", 16)
    assert winner.kernel == "fa2_kvcache_sm80_bf16_d32_packgqa_rightbound_paged_rows16".replace("packgqa_", "")
    assert table_row(winner).startswith("32: Tile(block_m=16, block_n=16, warps=4),  # fa2_kvcache sm_80, 16 rows, ")
    folder = tmp_path / "kernels"
    keep([winner], folder, 0)
    assert [str(entry.tile) for entry in read_saved_tiles(folder)] == ["m16n16w4s1b1"]
    for queries, stages in ((1, 1), (8, 1), (9, 2), (70, 2)):
        inputs = _fake_cache_inputs(cell := replace(CELL, queries=queries), torch.device("cpu"), seed=0)[0]
        spec: Any = lookup(cache_request(cell, inputs).dispatch_key())
        assert spec.tile.stages == stages, "of calls with more rows the tile is the package's"


def test_more_rows_have_tiles_with_as_many(card: Card) -> None:
    result = tune(ROWS)
    assert (result.cache_rows, result.spec.tile.block_m) == (64, 64)
    assert {trial.tile.block_m for trial in result.trials if trial.rounds} == {16, 32, 64}


@pytest.mark.parametrize("queries", [70, 32, 1], ids=["short q", "few rows", "decode"])
def test_a_winner_is_kept_under_the_name_that_calls_look_for(hopper: Card, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(resolve, "saved_tile", lambda spec, **told: asked.append(kernel_without_tile(spec, **told)))
    forget_lookups()
    stand: Any = search._stand(replace(CELL, queries=queries, length=1040, head_dim=128, batch=2), Options())
    assert asked[-1] == kernel_without_tile(stand.spec, short_q=stand.short_q, cache_rows=stand.cache_rows)
    assert stand.spec.family is (fa.Family.FA2 if queries == 1 else fa.Family.FA3)
    forget_lookups()


def test_wrong_silent_and_broken_tiles_are_reported(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = card.on_launch

    def silent(*arguments: Any) -> int:
        code = launch(*arguments)
        if card.last_tile.block_n == 16:
            for out in outs:
                out.fill_(float("nan"))
        return code

    outs: list[Any] = []
    enter = search.CacheStand.enter
    monkeypatch.setattr(search.CacheStand, "enter", lambda self, trial: (outs.__setitem__(slice(None), self._outs), enter(self, trial))[1])
    monkeypatch.setattr(card, "on_launch", silent)
    monkeypatch.setattr("atomr_accel_flashattn.launch.launcher.launch_function", lambda: silent)
    card.fails = lambda tile: tile.block_n == 32 and tile.stages == 1
    reasons = {str(trial.tile): trial.refused for trial in tune(CELL).trials}
    assert reasons["m16n16w4s1b1"] == "wrong: it leaves rows unwritten, or NaN in them"
    assert reasons["m16n32w4s1b1"] == "does not compile: ptxas gave up"


def test_times_are_of_one_call_where_a_graph_holds_more(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    class Graphs:
        def ready(self, _cell: CacheCell, calls: Any) -> tuple[Contestant, int]:
            return Contestant(calls, search.CacheStand._contestant.__globals__["contextlib"].nullcontext), 10

    monkeypatch.setattr(search, "clock_of", lambda _device: Graphs())
    trial = tune(CELL).trials[0]
    assert trial.ms == pytest.approx(card.ms(trial.tile) / 10)


def test_candidates_have_no_more_rows_and_every_axis_of_the_kernel() -> None:
    spec: Any = lookup(fa.DispatchKey(fa.SmArch.SM_90A, fa.DType.BF16, 128, causal=True, paged=True, gqa_ratio=4))
    tiles = _first_candidates(spec, Options(), 16)
    assert {tile.block_m for tile in tiles} == {16}
    assert {(tile.warps, tile.stages) for tile in tiles} == {(4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)}
    assert {tile.min_blocks for tile in tiles} >= {1, 2, 3}
    assert len(tiles) < len(list(tiles_that_fit(spec)))
    assert Tile(block_m=16, block_n=16, warps=4, stages=2) in tiles


def test_the_command_takes_cells_of_both_benchmarks_and_keeps_their_winners(
    ask: Ask, invoke: Invoke, card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert [str(cell) for cell in shapes_of("decode_1x4k_page16,gqa_d128_h32x8_causal_2k", BY_HAND._replace(seqlen=()))] == [
        "gqa_d128_h32x8_causal_2k",
        "decode_1x4k_page16",
    ]
    assert not any(
        cell.layout == "dense" for cell in shapes_of("few*,prefill*", BY_HAND._replace(seqlen=())) if isinstance(cell, CacheCell)
    )
    monkeypatch.setattr(tune_module, "shapes_of", lambda _patterns, _shape: [CELL])
    monkeypatch.setattr(tune_module, "device_count", lambda: 1)
    monkeypatch.setattr(tune_module, "_current_device", lambda: 0)
    found = ask("tune", "--cells", "x", "--tiles", "m16n16w4s1b1", "--rounds", 2, "--out", tmp_path / "records")
    (winner,) = found["winners"]
    assert (winner["tile"], winner["cache_rows"], winner["shapes"]) == ("m16n16w4s1b1", 16, [str(CELL)])
    assert json.loads(Path(found["record"]).read_text())["shapes"][0]["cache_rows"] == 16
    refused = invoke("tune", "--cells", "x", "--backward")
    assert refused.exit_code == 2
    assert "has no gradients" in " ".join(refused.stderr.replace("│", " ").split())
