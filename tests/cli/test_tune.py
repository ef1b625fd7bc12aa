"""The tune command; the search itself is tested in tests/tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomr_accel_flashattn.cli import tune as tune_module
from atomr_accel_flashattn.cli.tune_shapes import Shape, shapes_of
from atomr_accel_flashattn.dispatch import forget_lookups
from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.launch.driver import DeviceProperties, device_count
from atomr_accel_flashattn.tiles import saved as saved_tiles
from atomr_accel_flashattn.tiles.saved import SavedTile, headers_identity, read_saved_tiles, save_tiles
from tests.cli.conftest import Ask, Invoke

BY_HAND = Shape(128, None, 16, None, None, (2048,), None, causal=True, window=None, varlen=None, alibi=False)
ENTRY = SavedTile(
    device="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    headers=headers_identity("fa2_fwd"),
    kernel="fa2_fwd_sm90_bf16_d128_rightbound",
    tile=Tile(block_m=128, block_n=32, warps=4, stages=2),
    shapes=("grid_d128_h16_causal_2k",),
    speedup=1.07,
    when="2026-01-02T03:04:05+00:00",
)


def shapes(**changes: Any) -> list[str]:
    return [str(cell) for cell in shapes_of(None, BY_HAND._replace(**changes))]


def test_shapes_are_cells_of_the_benchmark_or_given_by_hand() -> None:
    assert [cell.group for cell in shapes_of("gqa", BY_HAND._replace(seqlen=()))] == ["gqa"] * 4
    assert shapes() == ["tune_d128_h16_causal_2k"]
    (cell,) = shapes_of(None, BY_HAND)
    assert cell.batch == 8
    assert shapes(seqlen=(512, 100000), heads=32, heads_kv=8) == ["tune_d128_h32x8_causal_512", "tune_d128_h32x8_causal_100000"]
    assert shapes(head_dim=192, v_head_dim=128, seqlen_k=512, batch=1) == ["tune_d192v128_h16_causal_2kx512"]
    assert shapes(causal=False, window="127,-1") == ["tune_d128_h16_window127xall_2k"]
    assert shapes(seqlen=(), varlen="700,1, 33") == ["tune_d128_h16_causal_3seqs"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which shape?"),
        (("--cells", "gqa", "--seqlen", 64), "which shape?"),
        (("--cells", "no such cell"), "no benchmark cell matches"),
        (("--seqlen", 64, "--varlen", "3,4"), "--seqlen: got it beside --varlen"),
        (("--varlen", "3,x"), "--varlen: got 3,x; allowed are comma-separated integers"),
        (("--seqlen", 64, "--window", "3"), "--window: got 3; allowed are two integers"),
        (("--seqlen", 64, "--window", "3,-2"), "--window: got 3,-2; allowed are"),
        (("--seqlen", 64, "--window", "3,0", "--causal"), "--causal: got it beside --window"),
        (("--seqlen", 64, "--heads-kv", 3), "--heads-kv: got 3 with 16 heads"),
        (("--seqlen", 64, "--dtype", "f32"), "--dtype f32"),
        (("--seqlen", 64, "--family", "fa9"), "--family fa9"),
    ],
)
def test_what_is_no_shape_is_refused(invoke: Invoke, arguments: tuple[object, ...], said: str) -> None:
    result = invoke("tune", *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.skipif(device_count() > 0, reason="says what a machine without a GPU says")
@pytest.mark.usefixtures("cache_dir")
def test_without_a_gpu_it_says_so(invoke: Invoke) -> None:
    result = invoke("tune", "--seqlen", 64)
    assert result.exit_code == 1
    assert "DeviceMismatchError: tune: got a machine without a GPU" in result.stderr


@pytest.mark.parametrize("switch", ["CACHE_READONLY", "DISABLE_CACHE", "DISABLE_TUNED"])
def test_winners_that_later_calls_would_not_see_are_refused_before_the_search(
    invoke: Invoke, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv(f"ATOMR_FLASHATTN_{switch}", "1")
    result = invoke("tune", "--seqlen", 64)
    assert result.exit_code == 1
    assert f"CacheError: tune: ATOMR_FLASHATTN_{switch} is set" in result.stderr
    monkeypatch.setattr(tune_module, "device_count", lambda: 0)
    assert "without a GPU" in invoke("tune", "--seqlen", 64, "--no-save").stderr


# --- cache ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache_dir")
def test_cache_commands_know_the_tuned_tiles(ask: Ask, invoke: Invoke, cache_dir: Path) -> None:
    stale = replace(ENTRY, headers="0" * 16, kernel="older")
    save_tiles([ENTRY, stale], cache_dir)
    text = invoke("cache", "list").stdout
    assert ENTRY.kernel in text
    assert "2 tuned tiles" in text
    assert "no: other headers" in text
    assert {entry["kernel"]: entry["current"] for entry in ask("cache", "list")["tiles"]} == {ENTRY.kernel: True, "older": False}
    assert ask("cache", "verify")["removed"] == []
    assert ask("cache", "clear")["removed_tiles"] == 0
    assert len(read_saved_tiles(cache_dir)) == 2, "tuned tiles stay unless they are asked for"
    assert "and 2 tuned tiles" in invoke("cache", "clear", "--tiles").stdout
    assert read_saved_tiles(cache_dir) == ()


def test_a_cache_to_ship_takes_the_tuned_tiles_along(ask: Ask, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiles([ENTRY], cache_dir)
    monkeypatch.setattr(saved_tiles, "device_count", lambda: 1)
    monkeypatch.setattr(saved_tiles, "device_properties", lambda _index: DeviceProperties(ENTRY.device, (9, 0), 132, 1 << 36))
    forget_lookups()
    try:
        asked = ("compile", "--arch", "sm_90", "--dtype", "bf16", "--head-dim", 128, "--mask", "causal", "--out", tmp_path / "ship")
        tuned, short = ask(*asked)["kernels"]
        assert str(ENTRY.tile) in tuned["kernel"]
        assert str(ENTRY.tile) not in short["kernel"], "short sequences have a tile of their own"
        assert read_saved_tiles(tmp_path / "ship") == (ENTRY,)
    finally:
        monkeypatch.undo()
        forget_lookups()
