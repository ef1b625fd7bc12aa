"""The lines of a report, from rows with times that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from atomr_accel_flashattn.bench.cells import FEATURES, Cell, all_cells
from atomr_accel_flashattn.bench.report import summary

SIZES: dict[str, Any] = {"head_dim": 128, "heads": 16, "heads_kv": 16, "lengths": (2048,) * 8, "causal": True}
PLAIN = Cell(group="grid", **SIZES)
CAPPED = Cell(group="softcap", softcap=5.0, **SIZES)
WINDOW = replace(PLAIN, group="window", window=1024)
SINKS = replace(WINDOW, group="sink4", sink_tokens=4)


def row_of(cell: Cell, ms: float | None, **fields: Any) -> dict[str, Any]:
    shape = {name: getattr(cell, name) for name in ("group", "head_dim", "heads", "heads_kv", "mask", "length", "batch", *FEATURES)}
    ours = {"peer": "ours", "ms": ms, "tflops": None if ms is None else 500.0, "refused": None, "note": ""}
    return {"cell": str(cell), "results": {"ours": ours}, "ratios": {}} | shape | fields


def costs_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    report = {"rows": rows, "geometric_means": {}, "worst": {}, "ceilings": [], "skipped": [], "failures": []}
    return [line for line in summary(report) if line.startswith("cost of")]


def test_a_feature_costs_its_time_over_that_of_the_plain_cell_of_its_shape() -> None:
    rows = [row_of(SINKS, 1.2), row_of(PLAIN, 2.0), row_of(WINDOW, 1.0), row_of(CAPPED, 2.2)]
    assert costs_of(rows) == [
        "cost of sink tokens: sink4_d128_h16_window1024_2k takes 1.200 of the time of window_d128_h16_window1024_2k (limit 1.10: EXCEEDED)",
        "cost of softcap: softcap_d128_h16_causal_2k takes 1.100 of the time of grid_d128_h16_causal_2k (limit 1.10: kept)",
    ]


def test_every_cell_with_a_feature_has_its_line_in_a_full_run() -> None:
    lines = costs_of([row_of(cell, 1.0) for cell in all_cells()])
    assert len(lines) == sum(bool(cell.features) for cell in all_cells()) == 9


@pytest.mark.parametrize(
    "rows",
    [
        [row_of(CAPPED, 2.2)],
        [row_of(CAPPED, 2.2), row_of(PLAIN, None)],
        [row_of(CAPPED, None), row_of(PLAIN, 2.0)],
        [row_of(CAPPED, 2.2), row_of(WINDOW, 1.0)],
        [row_of(CAPPED, 2.2), row_of(replace(PLAIN, lengths=(2048,)), 1.0)],
        [row_of(CAPPED, 2.2), row_of(PLAIN, 2.0, results={})],
    ],
    ids=["alone", "plain not timed", "not timed", "another mask", "another batch", "ours not asked for"],
)
def test_there_is_no_cost_without_both_times(rows: list[dict[str, Any]]) -> None:
    assert costs_of(rows) == []


def test_records_from_before_a_feature_was_measured_still_have_their_lines() -> None:
    rows = [row_of(PLAIN, 2.0), row_of(replace(PLAIN, group="alibi", alibi=True), 2.1)]
    for row in rows:
        del row["softcap"], row["sink_tokens"]
    assert [line.split(":")[0] for line in costs_of(rows)] == ["cost of ALiBi"]


@pytest.mark.parametrize(("gains", "said"), [((1.4, 0.97), "narrow"), ((1.4, 1.0), "no cell")])
def test_where_fp8_does_not_pay_is_said(gains: tuple[float, float], said: str) -> None:
    rows = [
        row_of(PLAIN, 1.0) | {"cell": name, "ratios": {"ours_bf16": gain}} for name, gain in zip(("wide", "narrow"), gains, strict=True)
    ]
    report = {"rows": [*rows, row_of(WINDOW, 1.0)], "geometric_means": {}, "worst": {}, "ceilings": [], "skipped": [], "failures": []}
    assert list(summary(report)) == [f"fp8 does not pay in {said} of 2"]
