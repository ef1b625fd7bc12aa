"""Which tile is the fastest for a shape on the card at hand: candidates, checked against float32 before they are timed; winners kept."""

from __future__ import annotations

from .groups import by_kernel, by_table_row
from .search import Options, ShapeResult, tune_shapes
from .trial import Trial
from .winners import Winner, keep, table_row, winners

__all__ = [
    "Options",
    "ShapeResult",
    "Trial",
    "Winner",
    "by_kernel",
    "by_table_row",
    "keep",
    "table_row",
    "tune_shapes",
    "winners",
]
