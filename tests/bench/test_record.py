from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from atomr_accel_flashattn.bench.record import make_record

if TYPE_CHECKING:
    import pytest


def test_a_record_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/somebody/tools/gpu_bench.py", "host", "--out", "/home/somebody/out", "--cells", "grid_*"])
    record = make_record("host", {"found": 1}, commit="abc")
    assert record["command"] == "gpu_bench.py host --out out --cells 'grid_*'"
    assert (record["kind"], record["commit"], record["found"]) == ("host", "abc", 1)
