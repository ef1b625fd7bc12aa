"""The picture of a decode benchmark, from its JSON record: a panel for each layout of the cache, and one for each other kind of cell."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .cells import short_length
from .figure import STYLES, Style

__all__ = ["draw_decode"]

_STYLES: Final = {
    "fi": Style("FlashInfer", "#56b4e9"),
    "fi_cc": Style("FlashInfer, CUDA cores", "#56b4e9", "...."),
    "xqa": Style("XQA (FlashInfer)", "#56b4e9", "////"),
} | STYLES
_WIDTH, _LINE, _DPI = 10.0, 2.35, 160
_BAR_SHARE: Final = 0.86
_RATES: Final = {"chunk", "prefill", "few"}  # groups whose arithmetic counts, not their reading
_MOST_CELLS: Final = 10  # of a panel
_Row = Mapping[str, Any]


def draw_decode(record: Mapping[str, Any], path: Path) -> Path:
    """Draw the record; PNG or SVG by the suffix of ``path``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the record has no rows.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = _panels(record["rows"])
    if not panels:
        raise ValueError("the record has no rows to draw")
    timed = {name for row in record["rows"] for name, result in row["results"].items() if result["ms"]}
    names = [name for name in _STYLES if name in timed]
    figure, axes = plt.subplots(len(panels), 1, figsize=(_WIDTH, 1.3 + _LINE * len(panels)), layout="constrained", squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        _panel(axis, title, rows, names)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    day = dt.datetime.fromisoformat(record["timestamp"]).date()
    title = f"Attention over a KV cache, bf16, head_dim 128 · {record['device']['name']} · {day}"
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=max(1, min(4, len(names))),
        frameon=False,
        fontsize=9,
        title=title,
        title_fontsize=12,
    )
    read = record["ceilings"][0]["read_gbs"]
    figure.supxlabel(f"sequences x keys · reading alone in the same run: {read:.0f} GB/s · commit {record['commit']}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path


def _panels(rows: Sequence[_Row]) -> dict[str, list[_Row]]:
    """By title: decoding by layout, the rest by group, in lines that stay readable."""
    found: dict[str, list[_Row]] = {}
    for row in rows:
        title = f"{row['group']}, {row['layout']}" if row["group"] in {"decode", "tokens"} else row["group"]
        found.setdefault(title, []).append(row)
    cut: dict[str, list[_Row]] = {}
    for title, members in found.items():
        for n in range(0, len(members), _MOST_CELLS):
            cut[title + ("" if n == 0 else f" ({n // _MOST_CELLS + 1})")] = members[n : n + _MOST_CELLS]
    return cut


def _panel(axis: Any, title: str, rows: Sequence[_Row], names: Sequence[str]) -> None:
    unit, label = ("tflops", "TFLOP/s") if rows[0]["group"] in _RATES else ("gbs", "GB/s of K and V")
    width = _BAR_SHARE / max(1, len(names))
    for n, name in enumerate(names):
        rates = [(row["results"].get(name) or {}).get(unit) for row in rows]
        places = [i + (n - (len(names) - 1) / 2) * width for i in range(len(rows))]
        style = _STYLES[name]
        bars = axis.bar(places, [rate or 0.0 for rate in rates], width, color=style.colour, label=style.label, hatch=style.hatch)
        for bar in bars:
            bar.set(edgecolor="white", linewidth=0.4)
        texts = [f"{rate:.0f}" if rate else "n/a" for rate in rates]
        axis.bar_label(bars, texts, rotation=90, padding=2, fontsize=6, fontweight="bold" if name == "ours" else "normal")
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(label, fontsize=8)
    axis.set_xticks(range(len(rows)), [_tick(row) for row in rows], fontsize=7)
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(y=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)


def _tick(row: _Row) -> str:
    lines = [f"{row['batch']} x {short_length(row['length'])}"]
    if row["queries"] > 1:
        lines.append(f"{short_length(row['queries'])} queries")
    if row["group"] not in {"decode", "tokens"}:
        lines.append(f"{row['heads']}/{row['heads_kv']}, {row['layout']}" + (f", {row['empty']} empty" if row["empty"] else ""))
    return "\n".join(lines)
