"""Benchmarks: speed against the peers that torch carries, host cost per call, start-up and memory. Nothing here runs inside tests."""

from __future__ import annotations

from .cells import Cell, all_cells, select
from .entry import main, main_host
from .forward import Options, Report, Result, Row, run_forward
from .host import HostOptions, run_host

__all__ = [
    "Cell",
    "HostOptions",
    "Options",
    "Report",
    "Result",
    "Row",
    "all_cells",
    "main",
    "main_host",
    "run_forward",
    "run_host",
    "select",
]
