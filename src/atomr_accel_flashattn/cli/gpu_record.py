"""The record of a GPU test run: who passed on which card, counted by kernel family and feature; a row a test only where it says most.

tests/gpu writes it, ``matrix`` reads it, and both name features here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final

from ..dispatch import FEATURES
from ..types import DType

__all__ = ["MATRIX_HEAD_DIM", "record_text", "summarised", "wgmma_or_mma"]

MATRIX_HEAD_DIM: Final = 128  # of the kernels that the support matrix asks about
_SLOWEST, _NEAREST = 20, 5  # rows that are kept: of the slowest tests, and of those nearest to the allowed error
# How the ids of the GPU tests name what they exercise, where that is not the feature's own name.
_MARKS = {
    "f16": r"(?<!b)f16",
    "full": r"-full\b",
    "causal": r"-causal\b",
    "sliding_causal": r"band\(\d+,0\)",
    "sliding_full": r"band\(\d+,[1-9]",
    "sink_tokens": r"\dsink",
    "gqa": r"h\d+kv\d",
    "dropout_mask": "dropout",
    "unaligned": "odd",
    "scale_first": r"scale(-|0(?!\.))",
    "paged": r"-page\d",
    "kv_layout": "HND",
    "kv_cache": "-contiguous",
    "left_pad": "leftpad",
    "split": r"splits([2-9]|\d\d)",
    "plain_split": "plain_split",
    "scheduled": "-planned",
    "e4m3": r"test_(fa3_fp8|fp8_plain)\b.*\be4m3-e\dm\d-e",
    "e5m2": r"test_(fa3_fp8|fp8_plain)\b.*\be5m2-e\dm\d-e",
    "fp8_kv": r"test_fp8_plain\b.*\bb?f16-e\dm\d-e",
    "fp8_block_descales": r"test_(fa3_fp8|fp8_plain)\b.*-block\b",
    "fp8_cache": "test_fp8_kv_cache",
    "batch_invariant": "-invariant",
    "short_q": rf"\bq\d{{1,3}}-.*d{MATRIX_HEAD_DIM}\b",
}


def wgmma_or_mma(*, wgmma: bool) -> str:
    """The group of a test in the counts: tests that name the wgmma family, and all others."""
    return "fa3" if wgmma else "fa2"


def summarised(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a record keeps of one row a test.

    A row has ``test`` (its id), ``outcome`` and ``seconds``; ``ratio`` and ``share``, its error over that of a plain evaluation and over
    the allowed one, where it has them; ``reason`` where it was skipped. Rows of failed tests are kept whole.
    """
    rows = sorted(rows, key=lambda row: str(row["test"]))
    shares = sorted((row for row in rows if "share" in row), key=lambda row: float(row["share"]), reverse=True)
    functions: dict[str, Counter[str]] = {}
    skipped: dict[str, list[str]] = {}
    passed: dict[str, Counter[str]] = {wgmma_or_mma(wgmma=wgmma): Counter() for wgmma in (False, True)}
    for row in rows:
        test, outcome = str(row["test"]), str(row["outcome"])
        functions.setdefault(test.partition("[")[0], Counter())[outcome] += 1
        if outcome == "skipped":
            skipped.setdefault(str(row.get("reason", "")), []).append(test)
        if outcome == "passed":
            passed[wgmma_or_mma(wgmma="fa3" in test)].update(_named(test))
    return {
        "outcomes": dict(sorted(Counter(str(row["outcome"]) for row in rows).items())),
        "seconds": round(sum(row.get("seconds", 0.0) for row in rows), 1),
        "worst_ratio": max((row["ratio"] for row in rows if "ratio" in row), default=None),
        "worst_share": shares[0]["share"] if shares else None,
        "passed": {group: {name: counts[name] for name in _marks() if counts[name]} for group, counts in passed.items()},
        "functions": {name: dict(counts) for name, counts in functions.items()},
        "skipped": skipped,
        "failed": [dict(row) for row in rows if row["outcome"] == "failed"],
        "nearest": [dict(row) for row in shares[:_NEAREST]],
        "slowest": [dict(row) for row in sorted(rows, key=lambda row: row.get("seconds", 0.0), reverse=True)[:_SLOWEST]],
    }


def record_text(record: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of what has entries."""
    entries = (f" {json.dumps(key)}: {_lines(value)}" for key, value in record.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, dict) and any(isinstance(entry, (dict, list)) for entry in value.values()):
        return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()) + "\n }"
    if isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value):
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
    return json.dumps(value)


def _named(test: str) -> list[str]:
    """The element types and features that the id of a test names."""
    return [name for name, mark in _marks().items() if mark.search(test)]


@cache
def _marks() -> dict[str, re.Pattern[str]]:
    return {name: re.compile(_MARKS.get(name, name)) for name in (*(dtype.value for dtype in DType), *FEATURES)}
