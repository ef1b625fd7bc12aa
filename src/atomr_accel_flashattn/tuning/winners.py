"""From timings to winners: the fastest tile over all shapes of a kernel, or of a row of the shipped tables, and where it is kept."""

from __future__ import annotations

import datetime as dt
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from ..dispatch import forget_lookups
from ..kernels.attention import AttentionSpec
from ..kernels.spec import Tile
from ..tiles.saved import SavedTile, device_identity, headers_identity, kernel_without_tile, save_tiles
from ..tiles.tables import has_row_for_short_q, row_of
from ..torch_ops import repeat as plans
from .groups import Group
from .search import ShapeResult

__all__ = ["Winner", "keep", "table_row", "winners"]

_WORTH_IT: Final = 0.01  # a gain below this is noise, and the tile in use stays
_NOT_IN_TABLES: Final = ("persistent",)  # callers and launches decide it there


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """The fastest tile of a group of shapes.

    Attributes:
        spec: a kernel of the group, with the tile in use.
        short_q: whether the keys of the group say so (``Extras.short_q``); of a group of both, what the first shape's says.
        cache_rows: of shapes over a KV cache, what their keys say (``Extras.cache_rows``); else 0.
        tile: the winner; the tile in use where nothing was faster by one percent.
        speedup: geometric mean over the shapes, over the tile in use.
        shapes: their names.
    """

    spec: AttentionSpec
    short_q: bool
    cache_rows: int
    tile: Tile
    speedup: float
    shapes: tuple[str, ...]

    @property
    def kernel(self) -> str:
        """The name that a winner of :func:`~.groups.by_kernel` is saved under."""
        return kernel_without_tile(self.spec, short_q=self.short_q, cache_rows=self.cache_rows)


def winners(results: Sequence[ShapeResult], group: Group) -> list[Winner]:
    """The winner of each group: of the tiles that were timed in all its shapes. A shape whose tile in use was not timed does not count."""
    groups: dict[Hashable, list[ShapeResult]] = {}
    for result in results:
        if result.in_use.ms is not None:
            groups.setdefault(group(result.spec, short_q=result.short_q, cache_rows=result.cache_rows), []).append(result)
    return [_winner(members) for members in groups.values()]


def _winner(results: Sequence[ShapeResult]) -> Winner:
    times = [_relative_times(result) for result in results]
    finalists = {trial.tile for result in results for trial in result.trials if trial.finalist}
    scores = {tile: statistics.geometric_mean([each[tile] for each in times]) for tile in finalists if all(tile in each for each in times)}
    spec = results[0].spec
    best = min(scores, key=scores.__getitem__, default=spec.tile)
    if scores.get(best, 1.0) > 1 - _WORTH_IT:
        best = spec.tile
    return Winner(
        spec=spec,
        short_q=results[0].short_q,
        cache_rows=results[0].cache_rows,
        tile=best,
        speedup=1 / scores.get(best, 1.0),
        shapes=tuple(str(result.cell) for result in results),
    )


def _relative_times(result: ShapeResult) -> dict[Tile, float]:
    """Time over that of the tile in use, by tile."""
    base = result.in_use.ms
    assert base is not None  # noqa: S101 - winners() leaves such shapes out
    times = {trial.tile: trial.ms / base for trial in result.trials if trial.ms is not None}
    return times | {trial.tile: times[trial.same_as] for trial in result.trials if trial.same_as in times}


def keep(found: Sequence[Winner], folder: Path, device_index: int) -> Path:
    """Save winners of :func:`~.groups.by_kernel` for later calls, of this process too; returns the path of the file.

    Raises:
        CacheError: the folder cannot be written.
    """
    name, capability = device_identity(device_index)
    now = dt.datetime.now(dt.UTC).replace(microsecond=0).isoformat()
    entries = [
        SavedTile(
            device=name,
            compute_capability=capability,
            headers=headers_identity(winner.kernel),
            kernel=winner.kernel,
            tile=winner.tile,
            shapes=winner.shapes,
            speedup=winner.speedup,
            when=now,
        )
        for winner in found
    ]
    path = save_tiles(entries, folder)
    forget_lookups()
    plans.clear()
    return path


def table_row(winner: Winner) -> str:
    """A winner of :func:`~.groups.by_table_row` as a row of its table in tiles/tables.py.

    Its comment names short q, or rows of a cache.
    """
    spec, tile, short_q = winner.spec, winner.tile, winner.short_q and has_row_for_short_q(winner.spec)
    row = row_of(spec)
    rows = f", {winner.cache_rows} rows" if winner.cache_rows else ""
    table = f"{spec.HEADER} {spec.arch.value}{', short q' if short_q else rows}"
    told = [
        f"{f.name}={getattr(tile, f.name)}" for f in fields(Tile) if f.name not in _NOT_IN_TABLES and getattr(tile, f.name) != f.default
    ]
    return f"{row}: Tile({', '.join(told)}),  # {table}, {winner.speedup:.3f}x over {len(winner.shapes)} shapes"
