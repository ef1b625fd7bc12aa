"""Which shapes share a winner."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from ..kernels.attention import AttentionSpec
from ..tiles.saved import kernel_without_tile
from ..tiles.tables import has_row_for_short_q

__all__ = ["Group", "by_kernel", "by_table_row"]


class Group(Protocol):
    """What a group of shapes has in common."""

    def __call__(self, spec: AttentionSpec, *, short_q: bool, cache_rows: int = 0) -> Hashable:
        """Equal for shapes that share a winner.

        Args:
            spec: the kernel of a shape.
            short_q: whether the key of the shape says so (``Extras.short_q``).
            cache_rows: of a shape over a KV cache, what its key says (``Extras.cache_rows``); else 0.
        """
        ...


def by_kernel(spec: AttentionSpec, *, short_q: bool, cache_rows: int = 0) -> Hashable:
    """Those that one kernel serves with one tile: what is saved in the user's cache."""
    return kernel_without_tile(spec, short_q=short_q, cache_rows=cache_rows)


def by_table_row(spec: AttentionSpec, *, short_q: bool, cache_rows: int = 0) -> Hashable:
    """Those that share a row of the tables in tiles/tables.py, of which there is another for short q at some widths."""
    return (spec.HEADER, spec.arch, spec.head_dim, spec.v_head_dim, short_q and has_row_for_short_q(spec), cache_rows)
