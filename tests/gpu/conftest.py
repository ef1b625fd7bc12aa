"""Each test with each kernel family of the card, and the record of a run.

``ATOMR_FLASHATTN_TEST_RECORD=path.json`` writes a summary at the end of the session (``cli/gpu_record.py``), and beside it, as
``path.jsonl``, a line for each test as it ends: its outcome, seconds, and share of the allowed error. ``ATOMR_FLASHATTN_COMMIT`` names the
code where there is no git.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atomr_accel_flashattn.kernels.spec import Family
from tests.gpu.families import FAMILIES, blocks_for, use_family

RECORD_VARIABLE = "ATOMR_FLASHATTN_TEST_RECORD"


class Recorder:
    """Gathers reports, those of xdist workers too, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        from atomr_accel_flashattn.cli import gpu_record  # now: what is missing should not cost a run its record

        self.format = gpu_record
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.load_before = os.getloadavg()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jsonl").write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "tests/gpu" not in report.nodeid:
            return
        if report.when == "call" or report.outcome in {"skipped", "failed"}:
            row: dict[str, Any] = {
                "test": report.nodeid.removeprefix("tests/gpu/"),
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                **dict(report.user_properties),
            }
            if report.outcome == "failed":
                row["message"] = str(report.longrepr)[-1500:]
            if report.outcome == "skipped":
                row["reason"] = _reason(report.longrepr)
            self.rows.append(row)
            with self.path.with_suffix(".jsonl").open("a") as lines:  # at once: a run that is killed keeps what it has seen
                lines.write(json.dumps(row) + "\n")

    def pytest_sessionfinish(self) -> None:
        from atomr_accel_flashattn.bench.record import make_record

        load = {"load_average": {"before": self.load_before, "after": os.getloadavg()}}
        record = make_record("gpu_tests", load | self.format.summarised(self.rows))
        self.path.write_text(self.format.record_text(record))


def _reason(skipped: Any) -> str:
    """Why a test was skipped: the last of (file, line, "Skipped: why")."""
    return str(skipped[-1] if isinstance(skipped, (tuple, list)) else skipped).removeprefix("Skipped: ")


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get(RECORD_VARIABLE)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(path)), "atomr-gpu-recorder")


@pytest.fixture(params=FAMILIES, ids=lambda family: family.value, autouse=True)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> Iterator[Family]:
    """The kernel family of this test; modules that are about one of them have a fixture of this name of their own."""
    record_property("family", request.param.value)
    with use_family(request.param, monkeypatch, blocks_for(request.node.nodeid)):
        yield request.param
