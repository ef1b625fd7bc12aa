"""The file of tuned tiles: found by what is asked, ignored when it is not ours, safe to write from many threads."""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomr_accel_flashattn.dispatch import DispatchKey, Extras, forget_lookups, lookup
from atomr_accel_flashattn.env import settings
from atomr_accel_flashattn.errors import CacheError, CacheWarning
from atomr_accel_flashattn.jit.cache import CacheKey, KernelCache
from atomr_accel_flashattn.kernels.spec import KernelSpec, Tile
from atomr_accel_flashattn.launch.driver import DeviceProperties
from atomr_accel_flashattn.tiles import saved as saved_tiles
from atomr_accel_flashattn.tiles.saved import (
    SAVED_TILES,
    SavedTile,
    headers_identity,
    kernel_without_tile,
    read_saved_tiles,
    remove_saved_tiles,
    save_tiles,
    saved_tiles_problem,
)
from atomr_accel_flashattn.types import DType, SmArch

KEY = DispatchKey(SmArch.SM_90, DType.BF16, 128, causal=True)
TUNED = Tile(block_m=128, block_n=32, warps=4, stages=2, min_blocks=2, persistent=True)
CARD = DeviceProperties("NVIDIA H100 80GB HBM3", (9, 0), 132, 85 * 10**9)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[DeviceProperties]:
    """The GPUs of this machine."""
    found = [CARD]
    monkeypatch.setattr(saved_tiles, "device_count", lambda: len(found))
    monkeypatch.setattr(saved_tiles, "device_properties", lambda index: found[index])
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[DeviceProperties]) -> Iterator[Path]:
    """An empty cache folder that this process looks into."""
    monkeypatch.setenv("ATOMR_FLASHATTN_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    forget_lookups()
    yield tmp_path
    monkeypatch.undo()
    settings.cache_clear()
    forget_lookups()


def spec_of(key: DispatchKey = KEY) -> KernelSpec:
    spec = lookup(key)
    assert isinstance(spec, KernelSpec)
    return spec


def entry(**changes: Any) -> SavedTile:
    fields: dict[str, Any] = {
        "device": CARD.name,
        "compute_capability": "9.0",
        "headers": headers_identity("fa2_fwd"),
        "kernel": "fa2_fwd_sm90_bf16_d128_rightbound",
        "tile": TUNED,
        "shapes": ("grid_d128_h16_causal_2k",),
        "speedup": 1.07,
        "when": "2026-01-02T03:04:05+00:00",
    }
    return SavedTile(**fields | changes)


def keep(*entries: SavedTile, folder: Path) -> None:
    save_tiles(entries, folder)
    forget_lookups()


def test_the_name_of_a_kernel_without_its_tile(folder: Path) -> None:
    assert kernel_without_tile(spec_of()) == entry().kernel
    assert kernel_without_tile(replace(spec_of(), tile=TUNED)) == entry().kernel


def test_short_and_long_sequences_have_a_saved_tile_each(folder: Path) -> None:
    before = spec_of()
    short_q = replace(KEY, extras=Extras(short_q=True))
    assert kernel_without_tile(before, short_q=True) == f"{entry().kernel}_shortq"
    keep(entry(), folder=folder)
    assert (spec_of().tile, spec_of(short_q).tile) == (TUNED, before.tile)
    keep(entry(kernel=f"{entry().kernel}_shortq", tile=replace(TUNED, stages=1)), folder=folder)
    assert (spec_of().tile, spec_of(short_q).tile) == (TUNED, replace(TUNED, stages=1))


def test_calls_take_the_saved_tile_of_their_kernel_and_no_other_kernel_does(folder: Path) -> None:
    before = spec_of()
    keep(entry(), folder=folder)
    assert spec_of() == replace(before, tile=TUNED)
    for other in (replace(KEY, causal=False), replace(KEY, dtype=DType.F16), replace(KEY, head_dim=64), replace(KEY, arch=SmArch.SM_80)):
        assert spec_of(other).tile != TUNED
    assert spec_of(replace(KEY, extras=Extras(tiles_for=SmArch.SM_80))).tile == before.tile
    assert not spec_of(replace(KEY, extras=Extras(persistent=False))).tile.persistent, "a scheduler that is asked for wins"


def test_the_tile_follows_the_key_and_no_number_of_the_call(folder: Path) -> None:
    keep(entry(), folder=folder)
    assert {spec_of(replace(KEY, gqa_ratio=ratio)).tile for ratio in (1, 4, 16)} == {TUNED}


@pytest.mark.parametrize(
    "changes", [{"device": "NVIDIA H200"}, {"compute_capability": "9.1"}, {"headers": "0" * 16}], ids=lambda changes: next(iter(changes))
)
def test_tiles_of_another_device_or_other_headers_are_not_used(folder: Path, changes: dict[str, str]) -> None:
    before = spec_of()
    keep(entry(**changes), folder=folder)
    assert spec_of() == before


def test_the_first_device_that_has_a_tile_decides(folder: Path, devices: list[DeviceProperties]) -> None:
    keep(entry(), entry(device="NVIDIA H200", tile=replace(TUNED, block_n=48)), folder=folder)
    devices[:] = [CARD._replace(name="NVIDIA T4"), CARD._replace(name="NVIDIA H200"), CARD]
    assert spec_of().tile.block_n == 48


def test_without_a_gpu_no_saved_tile_is_used(folder: Path, devices: list[DeviceProperties]) -> None:
    before = spec_of()
    keep(entry(), folder=folder)
    devices.clear()
    assert spec_of() == before


@pytest.mark.parametrize("switch", ["DISABLE_TUNED", "DISABLE_CACHE"])
def test_an_environment_variable_switches_them_off(folder: Path, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    before = spec_of()
    keep(entry(), folder=folder)
    monkeypatch.setenv(f"ATOMR_FLASHATTN_{switch}", "1")
    settings.cache_clear()
    assert spec_of() == before


def test_the_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []

    def read(where: Path) -> tuple[SavedTile, ...]:
        reads.append(where)
        return (entry(),)

    monkeypatch.setattr(saved_tiles, "read_saved_tiles", read)
    for causal in (True, False):
        for varlen in (True, False):
            lookup(replace(KEY, causal=causal, varlen=varlen))
    assert reads == [folder]


def test_a_folder_without_the_file_asks_for_no_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_tiles, "device_count", lambda: pytest.fail("nothing was saved"))
    spec_of()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot read"),
        ("\xff\xfe", "cannot read"),
        ("[]", "is no file of saved tiles of format 1"),
        ('{"format": 2, "tiles": []}', "is no file of saved tiles of format 1"),
        ('{"format": 1, "tiles": {}}', "is no file of saved tiles of format 1"),
        ('{"format": 1, "tiles": [{}, 7, null]}', "3 of 3 entries are damaged"),
    ],
)
def test_a_damaged_or_foreign_file_is_a_warning_and_is_ignored(folder: Path, text: str, said: str) -> None:
    before = spec_of()
    (folder / SAVED_TILES).write_bytes(text.encode("latin-1"))
    (folder / SAVED_TILES).chmod(0o644)  # whatever the umask
    forget_lookups()
    with pytest.warns(CacheWarning, match=said):
        assert spec_of() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec_of(replace(KEY, causal=False))  # said once


def test_a_file_that_cannot_be_read_is_a_warning(folder: Path) -> None:
    (folder / SAVED_TILES).mkdir()
    forget_lookups()
    with pytest.warns(CacheWarning, match="cannot read"):
        spec_of()


@pytest.mark.parametrize(
    "damage",
    [
        lambda one: one["tile"].update(block_m="128"),
        lambda one: one["tile"].update(persistent=1),
        lambda one: one["tile"].update(colour=1),
        lambda one: one["tile"].update(q_in_registers=False, overlap=False),  # fields of earlier versions
        lambda one: one["tile"].pop("warps"),
        lambda one: one.update(speedup="fast"),
        lambda one: one.update(shapes=[1]),
        lambda one: one.update(more=1),
        lambda one: one.pop("device"),
    ],
)
def test_an_entry_with_a_field_of_another_kind_is_left_out(folder: Path, damage: Any) -> None:
    keep(entry(), entry(kernel="whole"), folder=folder)
    document = json.loads((folder / SAVED_TILES).read_text())
    damage(document["tiles"][0])
    (folder / SAVED_TILES).write_text(json.dumps(document))
    with pytest.warns(CacheWarning, match="1 of 2 entries are damaged"):
        assert read_saved_tiles(folder) == (entry(kernel="whole"),)


def test_a_saved_tile_that_no_longer_fits_is_a_warning_and_is_ignored(folder: Path) -> None:
    before = spec_of()
    keep(entry(tile=replace(TUNED, stages=99)), folder=folder)
    with pytest.warns(CacheWarning, match="is ignored: it needs .* bytes of shared memory"):
        assert spec_of() == before


def test_a_new_winner_takes_the_place_of_the_old_one_and_leaves_the_others(folder: Path) -> None:
    stale = entry(headers="0" * 16)
    keep(stale, entry(), folder=folder)
    keep(entry(speedup=2.0), entry(kernel="fa2_fwd_sm80_f16_d64"), folder=folder)
    assert set(read_saved_tiles(folder)) == {stale, entry(speedup=2.0), entry(kernel="fa2_fwd_sm80_f16_d64")}
    assert [found.current for found in sorted(read_saved_tiles(folder), key=lambda found: found.headers == "0" * 16)] == [True, True, False]
    assert not list(folder.glob(".new-*"))


def test_a_damaged_file_is_written_over_and_one_of_another_format_is_not(folder: Path) -> None:
    (folder / SAVED_TILES).write_text("{")
    (folder / SAVED_TILES).chmod(0o644)
    with pytest.warns(CacheWarning, match="cannot read"):
        keep(entry(), folder=folder)
    assert read_saved_tiles(folder) == (entry(),)
    newer = '{"format": 2, "tiles": []}'
    (folder / SAVED_TILES).write_text(newer)
    with pytest.raises(CacheError, match="of format 1; it is left as it is"):
        keep(entry(), folder=folder)
    assert (folder / SAVED_TILES).read_text() == newer


def test_a_folder_that_cannot_be_written_is_an_error_for_who_saves(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"cannot keep tiles in .*--no-save"):
        save_tiles([entry()], tmp_path / "file")


@pytest.mark.parametrize("planted", ["writable", "link", "by somebody else"])
def test_a_file_that_somebody_else_can_have_written_is_not_used_and_is_replaced(folder: Path, tmp_path: Path, planted: str) -> None:
    before, path = spec_of(), folder / SAVED_TILES
    keep(entry(), folder=folder)
    match planted:
        case "writable":
            path.chmod(0o646)
            said = "it is writable by others (mode 0646)"
        case "link":
            path.rename(folder / "elsewhere")
            path.symlink_to(folder / "elsewhere")
            said = "it is a symbolic link"
        case _:
            if os.geteuid() != 0:
                pytest.skip("only root can give files away")
            os.chown(path, 12345, 12345)
            said = "it belongs to user 12345"
    forget_lookups()
    with pytest.warns(CacheWarning, match=f"{SAVED_TILES} is not read: {re.escape(said)}") as caught:
        assert spec_of() == before
    assert len(caught) == 1
    assert saved_tiles_problem(folder) == f"{SAVED_TILES}: {said}"
    keep(entry(speedup=2.0), folder=folder)
    assert read_saved_tiles(folder) == (entry(speedup=2.0),)
    assert (saved_tiles_problem(folder), path.is_symlink(), path.stat().st_mode & 0o777) == ("", False, 0o644)


def test_tiles_of_a_folder_that_others_could_write_are_set_aside(folder: Path) -> None:
    before = spec_of()
    keep(entry(), folder=folder)
    folder.chmod(0o777)
    with pytest.warns(CacheWarning, match=r"tuned tiles, where there were any, are kept in a file \*\.untrusted"):
        assert spec_of() == before
    assert (folder.stat().st_mode & 0o777, (folder / f"{SAVED_TILES}.untrusted").exists()) == (0o700, True)
    keep(entry(), folder=folder)
    assert spec_of().tile == TUNED
    remove_saved_tiles(folder)
    assert not list(folder.glob(f"{SAVED_TILES}*"))


def test_a_folder_that_others_can_write_is_one_warning_and_an_error_for_who_saves(folder: Path) -> None:
    before = spec_of()
    keep(entry(), folder=folder)
    folder.chmod(0o1777)
    with pytest.warns(CacheWarning, match="nothing is loaded from the cache folder .* tuned tiles are not used") as caught:
        assert spec_of() == before
    assert len(caught) == 1
    assert KernelCache(folder).get(CacheKey("k", "ab" * 32)) is None
    assert saved_tiles_problem(folder) == "", "the folder has that problem"
    with pytest.raises(CacheError, match="nothing is loaded from its folder: it is writable by others"):
        save_tiles([entry()], folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
def test_tiles_of_an_administrator_are_used_where_the_cache_is_declared_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = spec_of()
    keep(entry(), folder=folder)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 12345, 12345)
    forget_lookups()
    with pytest.warns(CacheWarning, match="it belongs to user 12345"):
        assert spec_of() == before
    monkeypatch.setenv("ATOMR_FLASHATTN_CACHE_READONLY", "1")
    settings.cache_clear()
    forget_lookups()
    assert spec_of().tile == TUNED


def test_many_writers_lose_nothing(folder: Path) -> None:
    threads = [threading.Thread(target=save_tiles, args=([entry(kernel=f"k{n}")], folder)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_saved_tiles(folder)) == 12


def test_the_kernel_cache_leaves_the_file_alone_and_it_has_its_own_removal(folder: Path) -> None:
    keep(entry(), folder=folder)
    cache = KernelCache(folder)
    assert (len(cache), cache.list(), cache.verify()) == (0, (), (0, ()))
    cache.clear()
    assert remove_saved_tiles(folder) == 1
    assert remove_saved_tiles(folder) == 0
    assert read_saved_tiles(folder) == ()
