"""The tool that measures errors of fp8: its points, its record and what it says of a limit, on the CPU backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tools import fp8_accuracy  # noqa: E402 - after the skip

pytestmark = pytest.mark.torch


def test_a_record_has_every_point_and_says_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fp8_accuracy, "LENGTHS", (64, 128))
    monkeypatch.setattr("sys.argv", ["fp8_accuracy.py", "--device", "cpu", "--longest", "128", "--out", str(tmp_path)])
    fp8_accuracy.main()
    (file,) = tmp_path.glob("fp8_accuracy_*.json")
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * (3 + 2 + 10 + 4)
    assert {row["axis"] for row in rows} == {"normal", "length", "spread", "rising", "ones"}
    for row in rows:
        assert row["errors"]["ours"] < (0.06 if row["type"] == "e5m2" else 0.03), row
        assert row["lse_errors"]["ours"] < 1e-5, row
    assert "spread, e4m3: ours 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(("ours", "verdict"), [(0.0257, "kept"), (0.0259, "EXCEEDED")])
def test_the_limit_is_that_of_normal_input(ours: float, verdict: str) -> None:
    row = {"axis": "normal", "type": "e4m3", "width": 64, "keys": 4096, "spread": 1.0, "lse_errors": {}}
    row["errors"] = {"ours": ours, "FlashAttention-3": 0.025}
    others = {**row, "axis": "rising", "errors": {"ours": 0.02, "FlashAttention-3": 0.01}}
    (line,) = (line for line in fp8_accuracy.table([row, others]) if line.startswith("normal input"))
    assert line.endswith(f"(limit 1.03: {verdict})")


def test_a_refusal_is_told_and_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setattr(fp8_accuracy, "ours", refuse)
    rows, refused = fp8_accuracy.measured("cpu", 64)
    assert len(refused) == len(rows) > 0
    assert all(line.startswith("ours: Point(") and line.endswith("RuntimeError: no kernel") for line in refused)
