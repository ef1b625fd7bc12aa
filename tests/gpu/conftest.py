"""Each test with each kernel family of the card. A record: device, versions, commit, and for each cell its outcome and share of the bound.

``ATOMR_FLASHATTN_TEST_RECORD=path.json`` writes it at the end of the
session; ``ATOMR_FLASHATTN_COMMIT`` names the code where there is no git.
"""

from __future__ import annotations

import json
import os
from collections import Counter
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
        self.path = path
        self.cells: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "tests/gpu" not in report.nodeid:
            return
        if report.when == "call" or report.outcome in {"skipped", "failed"}:
            name = report.nodeid.removeprefix("tests/gpu/")
            cell: dict[str, Any] = {
                "test": name,
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                **dict(report.user_properties),
            }
            if report.outcome == "failed":
                cell["message"] = str(report.longrepr)[-1500:]
            self.cells.append(cell)

    def pytest_sessionfinish(self) -> None:
        from atomr_accel_flashattn.bench.record import make_record

        body = {
            "outcomes": dict(Counter(cell["outcome"] for cell in self.cells)),
            "worst_ratio": max((cell["ratio"] for cell in self.cells if "ratio" in cell), default=None),
            "worst_share": max((cell["share"] for cell in self.cells if "share" in cell), default=None),
        }
        record = make_record("gpu_tests", body)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(record, indent=1).removesuffix("\n}")
        lines = ",\n  ".join(json.dumps(cell) for cell in sorted(self.cells, key=lambda cell: cell["test"]))
        self.path.write_text(f'{head},\n "cells": [\n  {lines}\n ]\n}}\n')


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
