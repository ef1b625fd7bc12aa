"""Which shapes share a winner."""

from __future__ import annotations

from collections.abc import Hashable

from ..jit.saved_tiles import kernel_without_tile
from ..jit.spec import KernelSpec

__all__ = ["by_kernel", "by_table_row"]


def by_kernel(spec: KernelSpec) -> Hashable:
    """Those that one kernel serves: what is saved in the user's cache."""
    return kernel_without_tile(spec)


def by_table_row(spec: KernelSpec) -> Hashable:
    """Those that share a row of the tables in jit/tiles.py."""
    return (spec.family, spec.arch, spec.head_dim, spec.v_head_dim)
