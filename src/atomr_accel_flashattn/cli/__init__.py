"""The command line: ``atomr-flashattn``, and ``python -m atomr_accel_flashattn``. One module per command."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
