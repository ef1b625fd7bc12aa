"""The benchmark of the mailbox runs, writes its record and draws it; its figures are not looked at here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from atomr_accel_flashattn.bench.actor import ActorOptions, _main, main_actor


@pytest.mark.torch
def test_every_part_is_measured_recorded_and_drawn(tmp_path: Path) -> None:
    said: list[str] = []
    options = ActorOptions(device="cpu", requests=8, repeats=1)
    record, path = main_actor(options, out=tmp_path, commit="none", say=said.append)
    assert json.loads(path.read_text())["kind"] == "actor"
    assert path.with_suffix(".png").stat().st_size > 1000
    assert record["round_trip_us"]["actor"] > 0
    pipelined = record["pipelined_us"]
    assert all(0 < pipelined[f"{name}_least"] <= pipelined[name] for name in ("direct", "actor"))
    assert [row["ratio"] > 0 for row in record["throughput"]] == [True] * 3
    assert any("round trip" in line for line in said)


def test_a_device_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["actor", "--device", "cuda:99"])
    with pytest.raises(SystemExit) as ended:
        _main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
