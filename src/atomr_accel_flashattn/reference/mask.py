"""The band mask of one sequence: which key ranges a block of queries visits, and which elements of a tile count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..problem import Band

__all__ = ["BandMask"]


@dataclass(frozen=True, slots=True)
class BandMask:
    """Key j is visible to query i when ``p - left <= j <= p + right`` or it is a sink token, p = i + seqlen_k - seqlen_q."""

    seqlen_q: int
    seqlen_k: int
    band: Band
    absent: NDArray[np.bool_] | None = None  # (seqlen_k,): keys that are nowhere, as their page is none of the cache

    def positions(self, rows: range) -> range:
        """The key positions p that the queries of ``rows`` are aligned to; may be negative when there are more queries than keys."""
        shift = self.seqlen_k - self.seqlen_q
        return range(rows.start + shift, rows.stop + shift)

    def key_ranges(self, rows: range) -> tuple[range, ...]:
        """Ranges, ascending and disjoint, of the keys that at least one query of ``rows`` sees; every other key is left unread."""
        left, right, sink_tokens = self.band
        p = self.positions(rows)
        if not rows:
            return ()
        stop = self.seqlen_k if right is None else min(self.seqlen_k, max(0, p[-1] + right + 1))
        start = 0 if left is None else min(stop, max(0, p[0] - left))
        ranges = (range(stop),) if sink_tokens >= start else (range(sink_tokens), range(start, stop))
        return tuple(keys for keys in ranges if keys)

    def rows_with_keys(self) -> range:
        """The queries that see a key: all but the first ones where a right bound meets more queries than keys."""
        right = self.band.right
        first = 0 if right is None else max(0, self.seqlen_q - self.seqlen_k - right)
        return range(min(first, self.seqlen_q) if self.seqlen_k else self.seqlen_q, self.seqlen_q)

    def hidden(self, rows: range, cols: range) -> NDArray[np.bool_] | None:
        """Elements of the tile that do not count, bool (len(rows), len(cols)), or None when every element counts.

        ``cols`` may end past the last key.
        """
        left, right, sink_tokens = self.band
        p = self.positions(rows)
        crosses_right = right is not None and cols[-1] > p[0] + right
        crosses_left = left is not None and cols[0] < p[-1] - left and cols[-1] >= sink_tokens
        ends = cols[-1] >= self.seqlen_k
        if not (crosses_left or crosses_right or ends or self.absent is not None):
            return None
        distance = np.arange(cols.start, cols.stop) - np.arange(p.start, p.stop)[:, None]
        hidden = np.zeros(distance.shape, dtype=np.bool_)
        if left is not None and crosses_left:
            hidden |= (distance < -left) & (np.arange(cols.start, cols.stop) >= sink_tokens)
        if right is not None and crosses_right:
            hidden |= distance > right
        if ends:
            hidden[:, max(self.seqlen_k - cols.start, 0) :] = True
        if self.absent is not None:
            here = self.absent[cols.start : cols.stop]
            hidden[:, : len(here)] |= here
        return hidden
