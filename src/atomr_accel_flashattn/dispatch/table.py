"""``lookup`` seen as a mapping of keys to kernels, and the cells of the support matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from ..errors import DispatchError
from ..kernels.spec import KernelSpec
from ..limits import HEAD_DIM_WIDTHS
from ..types import DType, SmArch
from .features import FEATURES, with_features
from .key import DispatchKey
from .resolve import CpuSpec, lookup

__all__ = ["DISPATCH_TABLE", "Cell", "DispatchTable", "cells"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What ``lookup`` says of a key: a spec, or the refusal."""

    key: DispatchKey
    spec: KernelSpec | CpuSpec | None
    refusal: DispatchError | None

    @property
    def built(self) -> bool:
        """Whether there is a kernel."""
        return self.spec is not None

    @classmethod
    def of(cls, key: DispatchKey) -> Cell:
        """The cell of any key."""
        try:
            return cls(key, lookup(key), None)
        except DispatchError as refusal:
            return cls(key, None, refusal)


class DispatchTable(Mapping[DispatchKey, "KernelSpec | CpuSpec"]):
    """``lookup`` as a mapping: a key is in it if and only if ``lookup`` succeeds.

    There are more keys than can be listed. Iteration gives representatives: those of arch x type x head dim x feature, one feature at a
    time, that have a kernel. ``table[key]`` raises a KeyError whose cause is the refusal.
    """

    def __getitem__(self, key: DispatchKey) -> KernelSpec | CpuSpec:
        try:
            return lookup(key)
        except DispatchError as refusal:
            raise KeyError(key) from refusal

    def __iter__(self) -> Iterator[DispatchKey]:
        return (cell.key for cell in cells() if cell.built)

    def __len__(self) -> int:
        return sum(cell.built for cell in cells())

    def cell(self, arch: SmArch, dtype: DType, head_dim: int, features: Iterable[str] = ()) -> Cell:
        """The cell of a plain key with some features of :data:`FEATURES`."""
        return Cell.of(with_features(DispatchKey(arch, dtype, head_dim), features))


@cache
def cells() -> tuple[Cell, ...]:
    """Every arch x type x head dim x feature, one feature at a time, with its kernel or its refusal."""
    keys = (
        change(DispatchKey(arch, dtype, width))
        for arch in SmArch
        for dtype in DType
        for width in HEAD_DIM_WIDTHS
        for change in FEATURES.values()
    )
    return tuple(map(Cell.of, dict.fromkeys(keys)))


DISPATCH_TABLE: Final = DispatchTable()
