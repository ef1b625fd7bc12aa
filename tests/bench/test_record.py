from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from atomr_accel_flashattn.bench import record as record_module
from atomr_accel_flashattn.bench.record import commit_id, make_record
from atomr_accel_flashattn.env import settings

if TYPE_CHECKING:
    import pytest


def test_a_record_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/somebody/tools/gpu_bench.py", "host", "--out", "/home/somebody/out", "--cells", "grid_*"])
    record = make_record("host", {"found": 1}, commit="abc")
    assert record["command"] == "gpu_bench.py host --out out --cells 'grid_*'"
    assert (record["kind"], record["commit"], record["found"]) == ("host", "abc", 1)


def test_the_commit_is_the_argument_else_that_of_the_environment_else_gits(monkeypatch: pytest.MonkeyPatch) -> None:
    named = replace(settings(), commit="1234abc")
    monkeypatch.setattr(record_module, "settings", lambda: named)
    assert commit_id() == "1234abc"
    assert commit_id("abc") == "abc"
    named = replace(named, commit="")
    monkeypatch.setattr(record_module, "_git", lambda _, command, *__: {"rev-parse": "cafe", "status": " M file"}[command])
    assert commit_id() == "cafe-dirty"
