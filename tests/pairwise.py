"""A pairwise covering array: few rows in which every value of every axis meets every value of every other axis."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["covering_rows"]


def covering_rows(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows that cover all pairs, greedily and always the same.

    Each row starts from the first pair that is not covered yet; every further axis takes the value that covers most new pairs with what
    is already chosen, and among equals the one used least. All combinations have to be allowed.
    """
    names = list(axes)
    missing = {
        (a, x, b, y): None
        for a, b in combinations(range(len(names)), 2)
        for x in range(len(axes[names[a]]))
        for y in range(len(axes[names[b]]))
    }  # a dict, because it keeps its order
    used = {(a, x): 0 for a, name in enumerate(names) for x in range(len(axes[name]))}
    rows = []
    while missing:
        a, x, b, y = next(iter(missing))
        chosen = {a: x, b: y}
        for axis in (axis for axis in range(len(names)) if axis not in chosen):
            ranked = [(-_gain(missing, chosen, axis, value), used[axis, value], value) for value in range(len(axes[names[axis]]))]
            chosen[axis] = min(ranked)[2]
        for pair in combinations(sorted(chosen), 2):
            missing.pop((pair[0], chosen[pair[0]], pair[1], chosen[pair[1]]), None)
        for axis, value in chosen.items():
            used[axis, value] += 1
        rows.append({name: axes[name][chosen[axis]] for axis, name in enumerate(names)})
    return rows


def _gain(missing: Mapping[tuple[int, int, int, int], None], chosen: Mapping[int, int], axis: int, value: int) -> int:
    """How many missing pairs a value would cover."""
    return sum(((axis, value, b, y) if axis < b else (b, y, axis, value)) in missing for b, y in chosen.items())
