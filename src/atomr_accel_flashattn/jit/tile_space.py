"""Which tiles there can be: the axes of a search, what a kernel demands of its tile, and what surely does not fit its registers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import product
from typing import Any, Final

from .spec import WARPGROUP_ROWS, Family, KernelSpec, Tile

__all__ = ["AXES", "SCHEDULES", "misfit", "tiles_that_fit"]

# The fields of Tile that each family reads, with the values that are tried. A field that a family does not read keeps its default.
AXES: Final[Mapping[Family, Mapping[str, tuple[Any, ...]]]] = {
    Family.FA2: {
        "block_m": (64, 128, 192, 256),
        "block_n": (16, 32, 48, 64, 80, 96, 128),
        "warps": (4, 8),
        "stages": (1, 2, 3),
        "min_blocks": (1, 2, 3),
        "persistent": (False, True),
    },
    Family.FA3: {
        "block_m": (64, 128, 192, 256),
        "block_n": tuple(range(16, 257, 16)),
        "warps": (8, 12, 16, 20),
        "stages": (2, 3, 4),
        "ping_pong": (False, True),
        "persistent": (True, False),  # persistent first: with few tiles the launch makes it one block each, so both are one kernel
    },
}
# Axes that cut nothing differently: who does what when. They are tried on the fastest tiles only.
SCHEDULES: Final = ("ping_pong", "persistent")

_REGISTER_FILE: Final = 65536
_OTHER_REGISTERS: Final = {Family.FA2: 31, Family.FA3: 24}  # beside accumulators and scores; ptxas has the last word
_MOST_REGISTERS: Final = 255
_CONSUMER_REGISTERS: Final = {1: 255, 2: 240, 3: 160, 4: 112}  # per thread, by warpgroups that multiply (cuda/kernels/fa3_fwd.cuh)
_PHILOX_KEYS: Final = 32
_LONGEST_WGMMA: Final = 256
_MOST_STAGES: Final = 11


def misfit(spec: KernelSpec) -> str:
    """Why there can be no kernel with the tile of ``spec``; empty when there can. The headers assert the same (cuda/kernels/)."""
    tile, read = spec.tile, AXES[spec.family]
    sizes = (tile.block_m, tile.block_n, tile.warps, tile.stages, tile.min_blocks)
    if any(type(size) is not int or size < 1 for size in sizes):
        return "sizes are integers of at least 1"
    unread = [f.name for f in fields(Tile) if f.name not in read and getattr(tile, f.name) != f.default]
    if unread:
        return f"the {spec.family.value} family has no {', '.join(unread)}"
    keys = _PHILOX_KEYS if spec.dropout else 16
    if tile.block_n % keys:
        return f"block_n: got {tile.block_n}; allowed are multiples of {keys}{' with dropout' if spec.dropout else ''}"
    reason = _misfit_fa3(tile) if spec.family is Family.FA3 else _misfit_fa2(tile)
    if not reason and spec.shared_memory > spec.arch.shared_memory_per_block:
        reason = (
            f"it needs {spec.shared_memory} bytes of shared memory; allowed are {spec.arch.shared_memory_per_block} on {spec.arch.value}"
        )
    return reason


def _misfit_fa2(tile: Tile) -> str:
    if tile.block_m % (16 * tile.warps):
        return f"block_m: got {tile.block_m}; allowed with {tile.warps} warps are multiples of {16 * tile.warps}"
    return ""


def _misfit_fa3(tile: Tile) -> str:
    groups = tile.warps // 4 - 1
    if tile.warps % 4 or groups not in _CONSUMER_REGISTERS:
        return f"warps: got {tile.warps}; allowed are 8, 12, 16 and 20: a warpgroup that loads, and one to four that multiply"
    if tile.block_m != groups * WARPGROUP_ROWS:
        return f"block_m: got {tile.block_m}; allowed with {tile.warps} warps is {groups * WARPGROUP_ROWS}"
    if tile.block_n > _LONGEST_WGMMA:
        return f"block_n: got {tile.block_n}; allowed is at most {_LONGEST_WGMMA}"
    if tile.stages > _MOST_STAGES:
        return f"stages: got {tile.stages}; allowed are at most {_MOST_STAGES}, whose barriers have room"
    if tile.ping_pong and groups == 1:
        return "ping_pong: allowed with two to four warpgroups that multiply"
    return ""


def tiles_that_fit(spec: KernelSpec) -> Iterator[Tile]:
    """Every tile of :data:`AXES` that ``spec`` could have, and whose accumulators, scores and blocks fit registers and shared memory."""
    axes = AXES[spec.family]
    for values in product(*axes.values()):
        tile = Tile(**dict(zip(axes, values, strict=True)))
        candidate = replace(spec, tile=tile)
        if not misfit(candidate) and _registers_suffice(candidate) and _blocks_fit(candidate):
            yield tile


def _registers_suffice(spec: KernelSpec) -> bool:
    """Whether what a thread holds for certain leaves room for the rest."""
    tile = spec.tile
    if spec.family is Family.FA3:
        held = spec.v_head_dim // 2 + tile.block_n // 2 + tile.block_n // 4  # O, S, and P in 16 bits
        allowed = _CONSUMER_REGISTERS[tile.warps // 4 - 1]
    else:
        held = tile.block_m * (spec.v_head_dim + tile.block_n) // tile.threads  # O and S
        allowed = min(_MOST_REGISTERS, _REGISTER_FILE // (tile.threads * tile.min_blocks))
    return held + _OTHER_REGISTERS[spec.family] <= allowed


def _blocks_fit(spec: KernelSpec) -> bool:
    """Whether a multiprocessor has shared memory for as many blocks as the tile asks for; each takes 1 KB more for the system."""
    return spec.tile.min_blocks * (spec.shared_memory + 1024) <= spec.arch.shared_memory_per_sm
