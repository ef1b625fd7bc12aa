"""Tables, plain text and Markdown, of a forward or backward benchmark, from its JSON record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from .cells import FEATURES

__all__ = ["format_row", "header", "markdown", "memory_lines", "summary"]

OURS, BF16 = "ours", "ours_bf16"
COST_LIMIT: Final = 1.10  # of the time of the plain cell: what ALiBi, softcap and sink tokens may take
_SHAPE: Final = ("head_dim", "heads", "heads_kv", "mask", "length", "batch")


def header(peers: Sequence[str]) -> str:
    """The line above the rows of :func:`format_row`; ``peers``: names, ours among them or not."""
    columns = [f"{'cell':34}", f"{'ms':>9}", f"{'TFLOP/s':>8}", f"{'ceiling':>8}", f"{'error':>8}"]
    return " ".join(columns) + " " + " ".join(f"{'/ ' + name:>16}" for name in peers if name != OURS)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ours, then every peer of these rows in its order."""
    return list(dict.fromkeys([OURS, *(name for row in rows for name in row["results"])]))


def format_row(row: Mapping[str, Any]) -> str:
    """One cell as a line: our time, rate, share of the measured ceiling, error, and per peer our ratio and its rate."""
    ours = row["results"].get("ours")
    if ours is None or ours["ms"] is None:
        text = f"{row['cell']:34} {'-' if ours is None else ours['refused']}"
        rates = [f"{name} {r['tflops']:.0f} TFLOP/s" for name, r in row["results"].items() if r["tflops"]]
        return f"{text}  [{', '.join(rates)}]"
    line = f"{row['cell']:34} {ours['ms']:9.4f} {ours['tflops']:8.1f} {ours['ceiling_share']:8.1%} {ours['error']:8.1e}"
    return line + " " + " ".join(f"{_versus(row, name):>16}" for name in row["results"] if name != OURS)


def _versus(row: Mapping[str, Any], name: str) -> str:
    result = row["results"].get(name)
    if result is None or result["ms"] is None:
        return "-"
    ratio = f"{row['ratios'][name]:.3f} " if name in row["ratios"] else ""
    mark = "*" if result["note"] else ""
    return f"{ratio}({result['tflops']:.0f}{mark})"


def summary(report: Mapping[str, Any]) -> Iterator[str]:
    """Lines after the table: geometric means, worst cells, costs of features, ceilings, what peers did not do and why, what failed."""
    for name, mean in report["geometric_means"].items():
        cell, ratio = report["worst"][name]
        count = sum(name in row["ratios"] for row in report["rows"])
        yield f"against {name}: geometric mean {mean:.3f} over {count} cells, worst {ratio:.3f} in {cell}"
    gains = {row["cell"]: row["ratios"][BF16] for row in report["rows"] if BF16 in row["ratios"]}
    if gains:
        yield f"fp8 does not pay in {', '.join(cell for cell, gain in gains.items() if gain < 1) or 'no cell'} of {len(gains)}"
    yield from _costs(report["rows"])
    for when, found in zip(("before", "after"), report["ceilings"], strict=False):
        yield f"ceiling {when}: bf16 matmul {found['matmul_bf16_tflops']:.0f} TFLOP/s, copy {found['copy_gbs']:.0f} GB/s"
    yield from _refusals(report["rows"])
    notes = {(name, result["note"]) for row in report["rows"] for name, result in row["results"].items() if result["note"]}
    for name, note in sorted(notes):
        yield f"* {name} is timed {note}, which it does not have"
    for cell in report.get("not_built", ()):
        yield f"not measured, because this version refuses it: {cell}"
    if report["skipped"]:
        yield f"not begun, the budget was spent: {', '.join(report['skipped'])}"
    for failure in report["failures"]:
        yield f"FAILED {failure}"


def memory_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Lines about the memory of training steps, of a backward benchmark that measured it."""
    for row in report.get("memory", ()):
        peaks = (f"{name} {f'{peak / 2**20:.0f} MiB' if isinstance(peak, int) else peak}" for name, peak in row["peak_bytes"].items())
        yield f"peak memory of forward and backward beyond the inputs, {row['cell']}: {', '.join(peaks)}"


def _costs(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Our time in every cell with a feature over that in the cell of the same shape without, where both were timed."""
    plain = {_shape(row): row for row in rows if not _features(row)}
    for row in rows:
        base, features = plain.get(_shape(row)), _features(row)
        if base is None or not features:
            continue
        ours, without = (each["results"].get(OURS, {}).get("ms") for each in (row, base))
        if ours and without:
            verdict = "kept" if ours / without <= COST_LIMIT else "EXCEEDED"
            text = f"{row['cell']} takes {ours / without:.3f} of the time of {base['cell']}"
            yield f"cost of {' and '.join(features)}: {text} (limit {COST_LIMIT:.2f}: {verdict})"


def _shape(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _SHAPE)


def _features(row: Mapping[str, Any]) -> list[str]:
    """What a cell has beside its mask; records made before a feature was measured do not name it."""
    return [title for name, title in FEATURES.items() if row.get(name)]


def _refusals(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Per peer and reason: in how many cells it has no time. Ours are failures, which have lines of their own."""
    reasons = Counter(
        (name, result["refused"]) for row in rows for name, result in row["results"].items() if name != OURS and result["refused"]
    )
    for (name, reason), count in sorted(reasons.items()):
        yield f"{name} has no time in {count} of {len(rows)} cells: {reason}"


def markdown(record: Mapping[str, Any]) -> str:
    """The record as a Markdown page: where and when it ran, then the table."""
    device, versions, peers = record["device"], record["versions"], _names(record["rows"])[1:]
    where = f"one {device['name']} (driver {device.get('driver', '-')}), torch {versions.get('torch', '-')}"
    lines = [
        f"Measured on {where}, commit {record['commit']}, {record['timestamp']}. Ratios are our speed over the peer's in the same run.",
        "",
        "| cell | ms | TFLOP/s | of ceiling | " + " | ".join(f"{name} TFLOP/s | ratio" for name in peers) + " |",
        "|---|---|---|---|" + "---|---|" * len(peers),
    ]
    lines += [_markdown_row(row, peers) for row in record["rows"]]
    return "\n".join([*lines, "", *(f"- {line}" for line in (*summary(record), *memory_lines(record)))]) + "\n"


def _markdown_row(row: Mapping[str, Any], peers: Sequence[str]) -> str:
    ours = row["results"].get("ours", {"ms": None, "refused": "not run"})
    mine = [ours["refused"] or "-", "", ""]
    if ours["ms"] is not None:
        mine = [f"{ours['ms']:.4f}", f"{ours['tflops']:.0f}", f"{ours['ceiling_share']:.0%}"]
    cells = [row["cell"], *mine]
    for name in peers:
        result = row["results"].get(name)
        rate = "-" if result is None or result["tflops"] is None else f"{result['tflops']:.0f}" + ("*" if result["note"] else "")
        cells += [rate, f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "-"]
    return "| " + " | ".join(cells) + " |"
