"""Peers of the cache benchmark that end their process, hang or go wrong, in their probe and while they take turns."""

from __future__ import annotations

import itertools
import json
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.bench import decode, probe, turns  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench.apart import Died, said_apart  # noqa: E402
from atomr_accel_flashattn.bench.cache_cells import CacheCell, cache_cells  # noqa: E402
from atomr_accel_flashattn.bench.cache_inputs import CacheInputs  # noqa: E402
from atomr_accel_flashattn.bench.cache_peers import OurCalls, cache_peers  # noqa: E402
from atomr_accel_flashattn.bench.graphs import GraphClock  # noqa: E402
from atomr_accel_flashattn.bench.measure import Options  # noqa: E402
from atomr_accel_flashattn.bench.probe import probe_cell, probe_peers  # noqa: E402

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
ROWS = CacheCell(group="decode", batch=1, length=64, heads=4, heads_kv=2, head_dim=32)
PAGED = replace(ROWS, layout="page16")
CELLS = [ROWS, PAGED, replace(ROWS, batch=2), replace(PAGED, batch=2)]


def exits() -> None:
    os._exit(7)


def hangs() -> None:
    time.sleep(600)


def raises() -> None:
    raise RuntimeError("CUDA error: gone\nand more")


class Bad(OurCalls):
    """Our answers, until the ``fatal``-th call in cells of a layout and a group, which fails."""

    def __init__(self, name: str, layout: str, fails: Callable[[], None], *, group: str = "decode", fatal: int = 3) -> None:
        self.name, self.layout, self.fails, self.group = name, layout, fails, group
        self.fatal = fatal  # the first two are made before anything is timed

    def prepare(self, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Any]:
        calls = super().prepare(cell, sets)
        if (cell.layout, cell.group) != (self.layout, self.group):
            return calls
        made = itertools.count(1)

        def guarded(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                if next(made) == self.fatal:
                    self.fails()
                return call()

            return run

        return [guarded(call) for call in calls]


class Stale(OurCalls):
    """Right when it is looked at first; later calls write nothing, as a graph that captured nothing."""

    name = "fi"

    def prepare(self, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Any]:
        answers = [call() for call in super().prepare(cell, sets)]
        return [lambda answer=answer: answer for answer in answers]


def run(peers: Sequence[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[decode.DecodeReport, dict[str, Any], list[str]]:
    monkeypatch.setattr(decode, "select_cache_cells", lambda _patterns: CELLS)
    monkeypatch.setattr(decode, "cache_peers", lambda _names: [OurCalls(), *peers])
    lines: list[str] = []
    options = Options(rounds=2)
    report, path = decode.main_decode(options, out=tmp_path, commit="abc", picture=False, say=lines.append, device=CPU, reuse_bytes=1)
    return report, json.loads(path.read_text()), lines


def timed(record: dict[str, Any], name: str) -> list[str]:
    return [row["cell"] for row in record["rows"] if row["results"][name]["ms"]]


def refusals(record: dict[str, Any], name: str) -> set[str]:
    return {row["results"][name]["refused"] for row in record["rows"]} - {None}


def test_a_peer_that_dies_in_its_probe_is_left_out_of_that_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = [Bad("xqa", "page16", exits, group="probe"), Bad("fi_cc", "rows", raises, group="probe", fatal=6)]
    report, record, _ = run(peers, tmp_path, monkeypatch)
    rows, paged = [[str(cell) for cell in CELLS if cell.layout == layout] for layout in ("rows", "page16")]
    assert report.failures == report.lost == report.skipped == []
    assert timed(record, "ours") == [str(cell) for cell in CELLS]
    assert (timed(record, "xqa"), timed(record, "fi_cc")) == (rows, paged)
    assert refusals(record, "xqa") == {"left out, as its probe failed: the process ended with status 7"}
    assert refusals(record, "fi_cc") == {"left out, as its probe failed: RuntimeError: CUDA error: gone"}


def test_a_peer_that_hangs_in_its_probe_is_left_out_of_that_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_SECONDS", 3.0)
    barred = probe_peers([OurCalls(), Bad("xqa", "page16", hangs, group="probe", fatal=6)], CELLS[:2], CPU, 0)
    assert barred == {ROWS: {}, PAGED: {"xqa": "left out, as its probe failed: no answer in 3 s"}}


@pytest.fixture
def _unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "probe_peers", lambda _peers, cells, _device, _seed: {cell: {} for cell in cells})


@pytest.mark.usefixtures("_unprobed")
@pytest.mark.parametrize("fails", [exits, raises])
def test_a_peer_that_dies_in_its_turn_is_left_out_and_the_run_goes_on(
    fails: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, record, lines = run([Bad("fa3", "none", exits), Bad("xqa", "page16", fails)], tmp_path, monkeypatch)
    why = "the process ended with status 7" if fails is exits else "RuntimeError: CUDA error: gone"
    lost = f"{PAGED}: lost while ours, fa3, xqa ran: {why}"
    assert report.lost == record["lost"] == [lost]
    assert f"LOST {lost}" in lines
    assert report.failures == report.skipped == []
    assert timed(record, "ours") == timed(record, "fa3") == [str(cell) for cell in CELLS]
    assert timed(record, "xqa") == [str(ROWS)]
    assert refusals(record, "xqa") == {f"left out after {lost}"}
    assert len(record["ceilings"]) == 2


@pytest.mark.usefixtures("_unprobed")
def test_only_the_peer_that_was_prepared_is_left_out_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, record, _ = run([Bad("fa3", "page16", exits, fatal=1), Bad("xqa", "none", exits)], tmp_path, monkeypatch)
    assert report.lost == [f"{PAGED}: lost while fa3 ran: the process ended with status 7"]
    assert timed(record, "ours") == timed(record, "xqa") == [str(cell) for cell in CELLS]
    assert timed(record, "fa3") == [str(ROWS)]


def test_cells_that_ours_does_not_survive_fail_and_the_others_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.test_decode_lost.OurCalls", lambda: Bad("ours", "page16", raises))
    report, record, _ = run([], tmp_path, monkeypatch)
    reason = "lost while ours ran: RuntimeError: CUDA error: gone"
    assert report.failures == [f"{cell}: {reason}" for cell in CELLS if cell.page]
    assert timed(record, "ours") == [str(cell) for cell in CELLS if not cell.page]


def test_an_answer_that_its_turns_do_not_write_is_not_timed() -> None:
    said: list[Any] = []
    work = turns.Work(options=Options(rounds=1), cells=[ROWS], peers=[OurCalls(), Stale()], device=CPU, reuse_bytes=1, barred={})
    turns.run_cells(said.append, work)
    (row,) = [what for what in said if isinstance(what, turns.CacheRow)]
    assert row.results["ours"].ms
    assert row.results["fi"].ms is None
    assert str(row.results["fi"].refused).startswith("after its turns: wrong: relative error inf")


def test_a_lost_device_ends_the_process_also_where_the_peer_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "is_lost", lambda _device: True)
    work = turns.Work(
        options=Options(rounds=1),
        cells=[ROWS],
        peers=[OurCalls(), Bad("xqa", "rows", raises, fatal=1)],
        device=CPU,
        reuse_bytes=1,
        barred={},
    )
    said: list[Any] = []
    with pytest.raises(RuntimeError, match="CUDA error: gone"):
        turns.run_cells(said.append, work)
    assert said[-1] == ("xqa",)


def test_cells_alike_have_one_probe_which_every_peer_takes_as_it_does_the_cell() -> None:
    cells = cache_cells()
    kinds = {probe_cell(cell) for cell in cells}
    assert len(kinds) < len(cells) / 3
    for cell in cells:
        kind = probe_cell(cell)
        same = ("layout", "heads", "heads_kv", "head_dim", "appends")
        assert [getattr(kind, name) for name in same] == [getattr(cell, name) for name in same]
        assert (kind.queries > 1, kind.empty > 0) == (cell.queries > 1, cell.empty > 0)
        for peer in cache_peers()[1:]:
            assert peer.cannot(kind) == peer.cannot(cell)  # type: ignore[attr-defined]


def test_a_process_that_does_not_even_measure_the_ceilings_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "run_cells", dies)
    with pytest.raises(RuntimeError, match="lost before its first cell: the process ended with status 7"):
        decode.run_decode(Options(), CELLS, [OurCalls()], CPU)


def dies(say: Callable[[Any], None], *_arguments: Any) -> None:
    del say
    exits()


def counts(say: Callable[[Any], None], stop: int) -> None:
    for n in range(stop):
        say(n)
    raise ValueError("no more")


def test_what_a_process_said_before_it_failed_arrives() -> None:
    came: list[int] = []
    with pytest.raises(Died, match="ValueError: no more"):
        came.extend(said_apart(counts, 3, patience=lambda _came: 300.0))
    assert came == [0, 1, 2]


def test_what_the_calls_of_a_graph_hold_lives_as_long_as_the_graph_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[Any] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(workspace() is not None)))
    monkeypatch.setattr(torch.cuda, "graph", lambda _graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    held = torch.zeros(1)
    workspace = weakref.ref(held)
    contestant, count = GraphClock(CPU).ready(ROWS, [lambda held=held: held])
    del held
    assert count > 1
    for call in contestant.calls:
        call()
    assert replays == [True, True]
    del contestant, call
    assert workspace() is None
