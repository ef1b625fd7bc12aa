"""200 Ctrl-Cs at random moments: after each the actor goes on within 10 seconds, and no lock or place is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_no_ctrl_c_loses_a_lock_or_a_place():
    done = subprocess.run([sys.executable, "-m", "tests.actor.ctrl_c", "0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "200 times interrupted\n"
