"""A pairwise covering array: few rows in which every value of every axis meets every value of every other axis."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

__all__ = ["covering_rows", "covering_rows_of_few_kinds", "uncovered"]

_Pair = tuple[int, int, int, int]  # an axis, the number of its value, another axis, the number of its value


def covering_rows(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows that cover all pairs, greedily and always the same.

    Each row starts from the first pair that is not covered yet; every further axis takes the value that covers most new pairs with what
    is already chosen, and among equals the one used least. All combinations have to be allowed.
    """
    cover = _Cover(axes)
    rows = []
    while cover.missing:
        a, x, b, y = next(iter(cover.missing))
        chosen = cover.filled({a: x, b: y}, [range(len(values)) for values in axes.values()])
        rows.append(cover.take(chosen))
    return rows


def covering_rows_of_few_kinds(axes: Mapping[str, Sequence[Any]], kind: Callable[[str, Any], Hashable]) -> list[dict[str, Any]]:
    """The same where rows are cheap and combinations of kinds are not, as numbers that a compiled kernel takes beside the kernel itself.

    ``kind(axis, value)`` is what a value makes of the kernel. The kinds have a covering array of their own, and the rows take no other
    combination of kinds than those in it.
    """
    kinds = {name: [kind(name, value) for value in values] for name, values in axes.items()}
    made = covering_rows({name: list(dict.fromkeys(of_axis)) for name, of_axis in kinds.items()})
    allowed = [[[x for x, each in enumerate(kinds[name]) if each == row[name]] for name in axes] for row in made]
    cover = _Cover(axes)
    rows = []
    while cover.missing:
        a, x, b, y = next(iter(cover.missing))
        fitting = [values for values in allowed if x in values[a] and y in values[b]]
        rows.append(cover.take(max((cover.filled({a: x, b: y}, values) for values in fitting), key=cover.worth)))
    return rows


def uncovered(axes: Mapping[str, Sequence[Any]], rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, Any, str, Any]]:
    """Pairs (axis, value, axis, value) that meet in no row."""
    missing = {(a, x, b, y) for a, b in combinations(axes, 2) for x in range(len(axes[a])) for y in range(len(axes[b]))}
    for row in rows:
        at = {name: list(values).index(row[name]) for name, values in axes.items()}
        missing -= {(a, at[a], b, at[b]) for a, b in combinations(axes, 2)}
    return [(a, axes[a][x], b, axes[b][y]) for a, x, b, y in sorted(missing)]


class _Cover:
    """The pairs that no row has yet, and how often each value was used."""

    def __init__(self, axes: Mapping[str, Sequence[Any]]) -> None:
        self.axes = axes
        sizes = [len(values) for values in axes.values()]
        self.missing: dict[_Pair, None] = {
            (a, x, b, y): None for a, b in combinations(range(len(sizes)), 2) for x in range(sizes[a]) for y in range(sizes[b])
        }  # a dict, because it keeps its order
        self.used = {(a, x): 0 for a, size in enumerate(sizes) for x in range(size)}

    def filled(self, start: Mapping[int, int], allowed: Sequence[Iterable[int]]) -> dict[int, int]:
        """``start`` with a value for every other axis, of those allowed there."""
        chosen = dict(start)
        for axis in (axis for axis in range(len(self.axes)) if axis not in chosen):
            chosen[axis] = min((-self._gain(chosen, axis, value), self.used[axis, value], value) for value in allowed[axis])[2]
        return chosen

    def worth(self, chosen: Mapping[int, int]) -> int:
        """How many missing pairs a row covers."""
        return sum(pair in self.missing for pair in _pairs(chosen))

    def take(self, chosen: Mapping[int, int]) -> dict[str, Any]:
        """Count a row as made; its values."""
        for pair in _pairs(chosen):
            self.missing.pop(pair, None)
        for axis, value in chosen.items():
            self.used[axis, value] += 1
        return {name: self.axes[name][chosen[axis]] for axis, name in enumerate(self.axes)}

    def _gain(self, chosen: Mapping[int, int], axis: int, value: int) -> int:
        return sum(((axis, value, b, y) if axis < b else (b, y, axis, value)) in self.missing for b, y in chosen.items())


def _pairs(chosen: Mapping[int, int]) -> Iterable[_Pair]:
    return ((a, chosen[a], b, chosen[b]) for a, b in combinations(sorted(chosen), 2))
