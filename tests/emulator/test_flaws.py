"""A kernel without one of its guards: it ends, and its answer depends on the order of threads. What the jitter tests on a card rely on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from atomr_accel_flashattn.jit.headers import headers_dir
from atomr_accel_flashattn.kernels.spec import Family, Tile
from atomr_accel_flashattn.types import DType
from tests.cases import Case, Values, build
from tests.check import check_case
from tests.gpu.jitter import FLAWS

from . import build as building
from .running import emulate
from .running_kvcache import Cached

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="the emulator needs a C++20 compiler")

CASE = Case(dtype=DType.BF16, heads=2, heads_kv=1, seqlen_q=200, seqlen_k=500, right=0)
TILES = {Family.FA2: None, Family.FA3: Tile(block_m=128, block_n=64, warps=12, stages=2, persistent=True)}


def forget() -> None:
    building._headers.cache_clear()
    building._library.cache_clear()
    building.load.cache_clear()


@pytest.fixture
def edit_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Path], object]], None]]:
    """From its call on, kernels are built from a copy of the headers, which the given function has edited."""

    def switch(edit: Callable[[Path], object]) -> None:
        folder = tmp_path / "cuda"
        shutil.copytree(headers_dir(), folder)
        edit(folder)
        monkeypatch.setattr(building, "headers_dir", lambda: folder)
        forget()

    yield switch
    forget()


@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.value)
def test_a_flaw_changes_bits_and_hangs_nothing(family: Family, edit_headers: Callable[..., None]):
    inputs = build(CASE)

    def bits(seed: int) -> bytes:
        return emulate(inputs, tile=TILES[family], family=family, seed=seed).out.view(np.uint16).tobytes()

    expected = bits(0)
    assert all(bits(seed) == expected for seed in range(1, 4))
    edit_headers(FLAWS[family].apply)
    assert any(bits(seed) != expected for seed in range(12))


SERIES_GUARDS = {
    "no maximum yet": ("attention/rows.cuh", "polynomial_limit = -1.f", "polynomial_limit = 3e38f"),
    "f16 overflows": ("attention/rows.cuh", "lowest + decltype(softmax)::kOverflowThreshold", "lowest + 1e6f"),
    "not small beside the cap": ("attention/rows.cuh", "fminf(p.softcap_limit, ", "fminf(3e38f, "),
}
SERIES_CASES = [
    Case(values=Values.RISING, softcap=cap, seqlen_q=130, seqlen_k=500, left=300, right=60, softmax_scale=scale)
    for cap, scale in ((1e3, None), (5.0, 0.01), (50.0, None))
] + [Case(softcap=50.0, seqlen_q=130, seqlen_k=512)]


def is_wrong(case: Case) -> bool:
    """Whether a kernel gets the case wrong, in f16 on 64 keys a tile."""
    try:
        check_case(case, emulate)
    except AssertionError:
        return True
    return False


def test_softcap_is_right_where_its_series_may_not_be_taken():
    assert not any(map(is_wrong, SERIES_CASES))


@pytest.mark.parametrize("guard", SERIES_GUARDS)
def test_cases_see_where_the_series_of_softcap_may_not_be_taken(guard: str, edit_headers: Callable[..., None]):
    name, text, flawed = SERIES_GUARDS[guard]

    def take_away(folder: Path) -> None:
        source = (folder / name).read_text()
        assert source.count(text) == 1
        (folder / name).write_text(source.replace(text, flawed))

    edit_headers(take_away)
    assert any(map(is_wrong, SERIES_CASES))


READ = "      read_there(r, warpgroup);\n"
TURN = "      ping_pong.sync(warpgroup);\n      multiply_qk(r, warpgroup);\n      pipe_v.consumer_wait();\n"
LATE_READ = "      r.there = ptx::load_shared_4(shared + kThere + 4 * pipe_k.stage);\n"


def test_holes_are_read_before_a_barrier_as_a_wait_for_wgmma_is_none(edit_headers: Callable[..., None]):
    """The producer overwrites which keys of a stage there are once one thread has released it for 128."""
    inputs = build(Case(dtype=DType.BF16, heads=2, heads_kv=2, seqlen_q=64, seqlen_k=1024))
    tile = Tile(block_m=64, block_n=32, warps=8, stages=2)

    def bits(seed: int) -> bytes:
        return Cached(family=Family.FA3, tile=tile, holes=tuple(range(1, 64, 3)), seed=seed)(inputs).out.view(np.uint16).tobytes()

    expected = bits(0)
    assert all(bits(seed) == expected for seed in range(1, 4))

    def read_late(folder: Path) -> None:
        path = folder / "kernels/fa3_fwd.cuh"
        source = path.read_text()
        assert source.count(READ + TURN) == 1
        path.write_text(source.replace(READ + TURN, TURN + LATE_READ))

    edit_headers(read_late)
    assert any(bits(seed) != expected for seed in range(12))
