"""The page about the actor says what is so."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "actor.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_its_examples_run(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for said in re.findall(r"print\(.*\)  # (.*)", block):
        assert said in done.stdout


def test_the_example_runs_without_ray(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "actor_pool.py"))["one_actor"]()
    assert "16 answers to a thread, 8 to an event loop" in capsys.readouterr().out


def test_its_errors_exist() -> None:
    named = set(re.findall(r"`(\w+Error)`", PAGE))
    assert len(named) > 8
    assert {name for name in named if not hasattr(errors, name)} == set()


def test_its_properties_and_defaults_are_those_of_the_props() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE))
    props = fa.FlashAttnProps()
    assert list(rows) == list(props.__dataclass_fields__)
    assert rows["max_in_flight"] == str(props.max_in_flight)
    assert rows["mailbox_limit"] == str(props.mailbox_limit)
    assert rows["overflow"] == f"`{props.overflow}`"


def test_its_links_lead_somewhere() -> None:
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert [link for link in local if not (ROOT / "docs" / link).exists()] == []
