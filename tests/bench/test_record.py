from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from atomr_accel_flashattn.bench import record as record_module
from atomr_accel_flashattn.bench.host import import_seconds
from atomr_accel_flashattn.bench.record import PEERS, commit_id, make_record, versions
from atomr_accel_flashattn.env import settings

if TYPE_CHECKING:
    from pathlib import Path

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


def test_a_record_holds_the_load_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.123, 4.0, 15.678), raising=False)
    assert make_record("host", {}, commit="abc")["load_average"] == [0.12, 4.0, 15.68]

    def uncounted() -> None:
        raise OSError

    monkeypatch.setattr("os.getloadavg", uncounted, raising=False)
    assert make_record("host", {}, commit="abc")["load_average"] is None


def test_a_record_holds_the_version_of_a_peer_that_is_only_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record_module, "_installed_version", lambda _package: "")
    monkeypatch.setattr(record_module, "PEERS", {"peer": "peer_of_a_test", "bare": "bare_peer_of_a_test", "absent": "no_such.peer"})
    for module, file, text in (
        ("peer_of_a_test", "version.py", "# generated\n__version__ = '0.0.35+git'\n"),
        ("bare_peer_of_a_test", "__init__.py", ""),
    ):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").touch()
        (tmp_path / module / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = versions()
    assert (found["peer"], found["bare"]) == ("0.0.35+git", "unknown")
    assert "absent" not in found


def test_every_peer_has_its_version_in_a_record() -> None:
    assert {"nvidia-cudnn-frontend", "flash-attn-3", "flash-attn-4", "xformers"} <= set(PEERS)


def test_the_time_of_an_import_is_not_negative() -> None:
    assert import_seconds("pass") >= 0
    assert import_seconds() > 0
