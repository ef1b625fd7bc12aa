"""The covering arrays that the lists of cases and of compiled kernels are made of."""

from __future__ import annotations

from typing import Any

import pytest

from tests.case_lists import FEATURE_AXES
from tests.compile.kernels import AXES, WGMMA_AXES
from tests.pairwise import covering_rows, covering_rows_of_few_kinds, uncovered

SMALL = {"letter": "abcde", "number": range(4), "sign": "+-", "colour": ("red", "green", "blue")}
ALL_AXES = {"small": SMALL, "features": FEATURE_AXES, "fa2": AXES, "fa3": WGMMA_AXES}


@pytest.mark.parametrize("axes", ALL_AXES.values(), ids=ALL_AXES)
def test_all_pairs_meet_in_few_rows_always_the_same(axes: dict[str, Any]) -> None:
    rows = covering_rows(axes)
    assert uncovered(axes, rows) == []
    first, second, *_ = sorted(map(len, axes.values()), reverse=True)
    assert first * second <= len(rows) <= 1.5 * first * second
    assert covering_rows(axes) == rows


def test_a_pair_that_never_meets_is_found() -> None:
    rows = covering_rows(SMALL)
    lonely = [row for row in rows if (row["letter"], row["number"]) == ("c", 2)]
    assert ("letter", "c", "number", 2) in uncovered(SMALL, [row for row in rows if row not in lonely])
    assert len(uncovered(SMALL, [])) == 5 * 4 + 5 * 2 + 5 * 3 + 4 * 2 + 4 * 3 + 2 * 3


def test_all_pairs_meet_in_few_kinds() -> None:
    def kind(axis: str, value: Any) -> Any:
        return value in "aeiou" if axis == "letter" else value % 2 if axis == "number" else value

    rows = covering_rows_of_few_kinds(SMALL, kind)
    assert uncovered(SMALL, rows) == []
    kinds = {tuple(kind(axis, value) for axis, value in row.items()) for row in rows}
    assert len(kinds) <= 3 * 2 + 1  # colours times letters, numbers or signs; of the values there are 120 combinations
    assert len(rows) <= 5 * 4 * 1.5
