"""How tests wait: for what has to happen, which they name."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["PATIENCE", "until"]

PATIENCE = 60.0  # seconds that a test waits for what has to happen


def until(fact: Callable[[], object], what: str = "what the test waits for") -> None:
    """Wait until ``fact`` holds; ``what`` says in words what that is."""
    deadline = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE:g} s"
        time.sleep(0.001)
