"""Which tiles there can be: what a kernel demands of its tile, and what surely does not fit its registers or an SM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from typing import Final

from ..kernels.attention import AttentionSpec
from ..kernels.spec import Tile
from ..limits import PHILOX_KEYS

__all__ = ["SCHEDULES", "misfit", "tiles_that_fit"]

# Axes that cut nothing differently: who does what when. They are tried on the fastest tiles only.
SCHEDULES: Final = ("ping_pong", "persistent")


def misfit(spec: AttentionSpec) -> str:
    """Why there can be no kernel with the tile of ``spec``; empty when there can. The headers assert the same (cuda/kernels)."""
    tile = spec.tile
    sizes = (tile.block_m, tile.block_n, tile.warps, tile.stages, tile.min_blocks)
    if any(type(size) is not int or size < 1 for size in sizes):
        return "sizes are integers of at least 1"
    unread = [f.name for f in fields(Tile) if f.name not in spec.AXES and getattr(tile, f.name) != f.default]
    if unread:
        return f"{spec.HEADER} reads no {', '.join(unread)}"
    keys = PHILOX_KEYS if spec.dropout else 16
    if tile.block_n % keys:
        return f"block_n: got {tile.block_n}; allowed are multiples of {keys}{' with dropout' if spec.dropout else ''}"
    reason = spec.misfit()
    if not reason and spec.shared_memory > spec.arch.shared_memory_per_block:
        reason = (
            f"it needs {spec.shared_memory} bytes of shared memory; allowed are {spec.arch.shared_memory_per_block} on {spec.arch.value}"
        )
    return reason


def tiles_that_fit(spec: AttentionSpec) -> Iterator[Tile]:
    """Every tile of the axes of ``spec`` that it could have, and whose accumulators, scores and blocks fit registers and shared memory."""
    for values in product(*spec.AXES.values()):
        tile = Tile(**dict(zip(spec.AXES, values, strict=True)))
        candidate = replace(spec, tile=tile)
        if not misfit(candidate) and candidate.registers_suffice() and _blocks_fit(candidate):
            yield tile


def _blocks_fit(spec: AttentionSpec) -> bool:
    """Whether an SM has shared memory for as many blocks as the tile asks for; each takes 1 KB more for the system."""
    return spec.tile.min_blocks * (spec.shared_memory + 1024) <= spec.arch.shared_memory_per_sm
