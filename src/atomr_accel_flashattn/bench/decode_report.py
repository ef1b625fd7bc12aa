"""Lines of text of a decode benchmark, from its JSON record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

__all__ = ["decode_header", "decode_summary", "format_decode_row"]

OURS: Final = "ours"
FLOOR: Final = 0.95  # of the best peer, that no cell should be below


def decode_header(peers: Sequence[str]) -> str:
    """The line above the rows of :func:`format_decode_row`."""
    columns = [f"{'cell':32}", f"{'us':>9}", f"{'GB/s':>6}", f"{'TFLOP/s':>8}", f"{'of read':>8}", f"{'error':>8}"]
    return " ".join(columns) + " " + " ".join(f"{'/ ' + name:>14}" for name in peers if name != OURS)


def format_decode_row(row: Mapping[str, Any]) -> str:
    """One cell as a line: our time, rates, share of the measured reading, error, and per peer our ratio and its rate."""
    ours = row["results"].get(OURS)
    if ours is None or ours["ms"] is None:
        line = f"{row['cell']:32} {'-' if ours is None else ours['refused']} "
    else:
        rates = f"{ours['gbs']:6.0f} {ours['tflops']:8.1f} {ours['read_share']:8.1%} {ours['error']:8.1e}"
        line = f"{row['cell']:32} {ours['ms'] * 1e3:9.2f} {rates} "
    return line + " ".join(f"{_versus(row, name):>14}" for name in row["results"] if name != OURS)


def _versus(row: Mapping[str, Any], name: str) -> str:
    result = row["results"][name]
    if result["ms"] is None:
        return "-"
    ratio = f"{row['ratios'][name]:.3f} " if name in row["ratios"] else ""
    return f"{ratio}({result['gbs']:.0f})"


def decode_summary(report: Mapping[str, Any]) -> Iterator[str]:
    """Means, cells below the floor, cells beside others, ceilings, what peers did not do and why, what failed."""
    for name, mean in report["geometric_means"].items():
        count = sum(name in row["ratios"] for row in report["rows"])
        yield f"against {name}: geometric mean {mean:.3f} over {count} cells"
    yield from _below_the_floor(report["rows"])
    yield from _beside(report["rows"])
    for when, found in zip(("before", "after"), report["ceilings"], strict=False):
        yield f"ceilings {when}: " + ", ".join(f"{name} {value:.0f}" for name, value in found.items())
    reasons = Counter(
        (name, result["refused"]) for row in report["rows"] for name, result in row["results"].items() if name != OURS and result["refused"]
    )
    for (name, reason), count in sorted(reasons.items()):
        yield f"{name} has no time in {count} of {len(report['rows'])} cells: {reason}"
    if report["skipped"]:
        yield f"not begun: {', '.join(report['skipped'])}"
    for lost in report["lost"]:
        yield f"LOST {lost}"
    for failure in report["failures"]:
        yield f"FAILED {failure}"


def _below_the_floor(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    best = {row["cell"]: min(((ratio, name) for name, ratio in row["ratios"].items()), default=None) for row in rows}
    known = {cell: found for cell, found in best.items() if found is not None}
    below = [f"{cell} {ratio:.3f} of {name}" for cell, (ratio, name) in known.items() if ratio < FLOOR]
    if known:
        yield f"below {FLOOR} of the best peer in {len(below)} of {len(known)} cells" + (f": {', '.join(below)}" if below else "")


def _beside(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Our time in a cell over that in the cell that it stands beside, or the rates the other way round."""
    by_name = {row["cell"]: row for row in rows}
    for row in rows:
        other = by_name.get(row["beside"])
        ours, base = (None if each is None else each["results"].get(OURS) for each in (row, other))
        if other is None or not ours or not base or not ours["ms"] or not base["ms"]:
            continue
        rate = row["by_rate"]
        ratio = base["tflops"] / ours["tflops"] if rate else ours["ms"] / base["ms"]
        kept = "" if not row["limit"] else f" (limit {row['limit']:.2f}: {'kept' if ratio <= row['limit'] else 'EXCEEDED'})"
        what = f"has a rate {ratio:.3f} times lower than" if rate else f"takes {ratio:.3f} of the time of"
        yield f"{row['cell']} {what} {other['cell']}{kept}"
