"""What a record keeps of a GPU test run; what the support matrix reads in it is tested in test_matrix.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atomr_accel_flashattn.cli.gpu_record import record_text, summarised

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def row(test: str, outcome: str = "passed", seconds: float = 0.5, **more: Any) -> dict[str, Any]:
    return {"test": test, "outcome": outcome, "seconds": seconds, **more}


def test_passed_tests_are_counted_by_family_and_by_what_their_ids_name() -> None:
    ids = ("a.py::test[fa2-bf16-d64-causal-alibi]", "a.py::test[fa2-f16-d64-causal]", "a.py::test[fa3-f16-d64-full]", "a.py::test_alone")
    found = summarised([*map(row, ids), row("a.py::test[fa2-f16-softcap30]", "failed"), row("a.py::test[odd]", "skipped", reason="why")])
    assert found["passed"] == {"fa2": {"f16": 1, "bf16": 1, "causal": 2, "alibi": 1}, "fa3": {"f16": 1, "full": 1, "fa3": 1}}
    assert found["outcomes"] == {"failed": 1, "passed": 4, "skipped": 1}
    assert found["functions"] == {"a.py::test": {"passed": 3, "failed": 1, "skipped": 1}, "a.py::test_alone": {"passed": 1}}
    assert found["seconds"] == 3.0


def test_fp8_counts_as_the_type_of_plain_arrays_alone() -> None:
    ids = (
        "test_fp8_plain.py::test_feature[causal-64-bf16-e4m3-e5m2-bf16-head]",
        "test_fp8_plain.py::test_feature[full-64-e5m2-e4m3-e4m3-f32-block]",
        "test_fa3_fp8.py::test_feature[causal-64-e4m3-e5m2-e5m2-f16-tensor]",
        "test_fp8_kv_cache.py::test_a_cache[e4m3-e4m3-e4m3-bf16-head]",
    )
    passed = summarised(row(each) for each in ids)["passed"]
    names = ("e4m3", "e5m2", "fp8_kv", "fp8_block_descales", "fp8_cache")
    assert [passed["fa2"].get(name) for name in names] == [None, 1, 1, 1, 1]
    assert [passed["fa3"].get(name) for name in names] == [1, None, None, None, None]


def test_failures_are_kept_whole_and_skips_under_their_reason() -> None:
    failure = row("a.py::test[x]", "failed", message="worst element (0, 3)", family="fa2")
    skips = [row(f"a.py::test[{name}]", "skipped", reason="needs two GPUs") for name in "pq"]
    found = summarised([*skips, failure])
    assert found["failed"] == [failure]
    assert found["skipped"] == {"needs two GPUs": ["a.py::test[p]", "a.py::test[q]"]}


def test_of_the_other_rows_the_slowest_and_those_nearest_to_the_bound_are_kept() -> None:
    rows = [row(f"a.py::test[{i:03}]", seconds=i / 8, ratio=2 + i / 1000, share=i / 1000) for i in range(300)]
    found = summarised(rows)
    assert found["slowest"] == rows[:-21:-1]
    assert found["nearest"] == rows[:-6:-1]
    assert (found["worst_ratio"], found["worst_share"]) == (2.299, 0.299)
    assert summarised([])["worst_share"] is None


def test_the_text_is_json_of_one_line_an_entry() -> None:
    record = {"kind": "gpu_tests", "device": {"name": "x", "count": 1}, **summarised([row("a.py::test[fa2-f16]"), row("b.py::test")])}
    text = record_text(record)
    assert json.loads(text) == record
    assert ' "device": {"name": "x", "count": 1},\n' in text
    assert '  "b.py::test": {"passed": 1}\n' in text


def test_the_committed_record_is_small_and_counts_every_test_once() -> None:
    path = RESULTS / "gpu_tests.json"
    record = json.loads(path.read_text())
    assert path.stat().st_size < 40_000  # a row a test would be a megabyte
    counted = sum(count for outcomes in record["functions"].values() for count in outcomes.values())
    assert counted == sum(record["outcomes"].values())
    assert sum(map(len, record["skipped"].values())) == record["outcomes"].get("skipped", 0)
