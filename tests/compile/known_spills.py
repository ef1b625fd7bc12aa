"""Register spills that are known and accepted: bytes as ptxas reports them (stores and loads), and why.

A kernel that spills more than its entry, or spills without one, fails tests/compile. The key is ``KernelSpec.kernel_name``.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["KNOWN_SPILLS", "Spill"]


class Spill(NamedTuple):
    """At most ``bytes`` of spill traffic per thread, because of ``reason``."""

    bytes: int
    reason: str


KNOWN_SPILLS: dict[str, Spill] = {}
