"""Benchmarks: speed against the peers that torch carries, host cost per call, start-up and memory. Nothing here runs inside tests."""

from __future__ import annotations

from .backward import run_backward
from .cells import Cell, all_cells, backward_cells, select
from .decode import main_decode
from .entry import main, main_backward, main_host, main_layer
from .forward import run_forward
from .host import HostOptions, run_host
from .layer import LayerOptions, run_layer
from .measure import Options, Report, Result, Row

__all__ = [
    "Cell",
    "HostOptions",
    "LayerOptions",
    "Options",
    "Report",
    "Result",
    "Row",
    "all_cells",
    "backward_cells",
    "main",
    "main_backward",
    "main_decode",
    "main_host",
    "main_layer",
    "run_backward",
    "run_forward",
    "run_host",
    "run_layer",
    "select",
]
