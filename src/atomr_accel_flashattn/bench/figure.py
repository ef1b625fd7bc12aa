"""The picture of a forward or backward benchmark, in the style of the FlashAttention papers, from its JSON record.

One panel per head dim and mask of the grid, per sequence length one bar for each peer with its TFLOP/s above. The colours are those of
Okabe and Ito (Color Universal Design, 2008), which colour-blind readers tell apart; ours alone is dark, bars of the same maker differ by
hatching too.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from .cells import FEATURES

__all__ = ["STYLES", "Style", "draw"]


class Style(NamedTuple):
    """How a peer's bars look, and what the legend calls it."""

    label: str
    colour: str
    hatch: str = ""


# In the order of the bars: what is older first, ours last.
STYLES: Final = {
    "fa2": Style("FlashAttention-2 (torch)", "#56b4e9"),
    "flex": Style("FlexAttention (torch)", "#f0e442"),
    "cudnn": Style("cuDNN (torch)", "#009e73"),
    "cudnn_fe": Style("cuDNN (its frontend)", "#009e73", "////"),
    "fa3": Style("FlashAttention-3", "#e69f00"),
    "fa4": Style("FlashAttention-4", "#cc79a7"),
    "ours_fa2": Style("this package, FA2 family", "#8a8a8a"),
    "ours_fa3": Style("this package, FA3 family", "#8a8a8a", "////"),
    "ours_bf16": Style("this package, bf16", "#8a8a8a", "...."),
    "ours_single_level": Style("this package, one level", "#8a8a8a", "xxxx"),
    "ours": Style("this package", "#1a1a1a"),
}

_WIDTH = 10.0  # inches
_DPI = 160  # 1600 pixels: twice what a README shows, so that its text stays sharp
_LABEL_POINTS = {False: 7.0, True: 6.0}  # by whether there are more than six peers, whose bars are as narrow as that
_LEAST_LENGTHS = 3  # room of a panel: fewer lengths would make bars as wide as blocks
_BAR_SHARE = 0.86  # of the room of one sequence length
_Row = Mapping[str, Any]
_USUAL_DIM = 128  # of the cells outside the grid
_OTHERS = "grouped queries, packed sequences, window (head_dim 128)"
_SAME_BITS = "deterministic"
_FEATURES = "ALiBi, softcap, sink tokens (head_dim 128 where no other is named)"


def draw(record: Mapping[str, Any], path: Path) -> Path:
    """Draw the record: a panel per head dim and mask of the grid, and two for the other cells; PNG or SVG by the suffix of ``path``.

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
    names = _drawn(record["rows"])
    mosaic = _mosaic(list(panels))
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(_WIDTH, 1.3 + 2.35 * len(mosaic)), layout="constrained")
    for title, rows in panels.items():
        _panel(axes[title], title, rows, names)
    for line in mosaic:
        axes[line[0]].set_ylabel("TFLOP/s", fontsize=9)
    handles, labels = axes[mosaic[0][0]].get_legend_handles_labels()
    columns = min(4, len(names))  # the title is the legend's: the layout keeps room for one thing above the panels
    figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9, title=_title(record), title_fontsize=12
    )
    figure.supxlabel(_footer(record), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path


def _title(record: Mapping[str, Any]) -> str:
    day = dt.datetime.fromisoformat(record["timestamp"]).date()
    return f"Attention {record.get('direction', 'forward')} speed, bf16 · {record['device']['name']} · {day}"


def _footer(record: Mapping[str, Any]) -> str:
    ceiling, torch = record["ceilings"][0]["matmul_bf16_tflops"], record["versions"].get("torch", "-")
    shapes = "sequence length (16k tokens in all, heads x head_dim = 2048)"
    return f"{shapes} · bf16 matmul in the same run: {ceiling:.0f} TFLOP/s · torch {torch} · commit {record['commit']}"


def _drawn(rows: Sequence[_Row]) -> list[str]:
    """The peers that have a time in some cell, in the order of their bars."""
    timed = {name for row in rows for name, result in row["results"].items() if result["tflops"]}
    return [name for name in STYLES if name in timed]


def _panels(rows: Sequence[_Row]) -> dict[str, list[tuple[str, _Row]]]:
    """By title, (tick label, row): the grid by head dim and mask, the rest at the end, cells with a feature apart."""
    grid: dict[str, list[tuple[str, _Row]]] = {}
    rest: dict[str, list[tuple[str, _Row]]] = {_OTHERS: [], _FEATURES: [], _SAME_BITS: []}
    for row in rows:
        if row["group"] == "grid":
            grid.setdefault(f"head_dim {row['head_dim']}, {row['mask']}", []).append((row["length"], row))
        else:
            title = _SAME_BITS if row.get("deterministic") else _FEATURES if any(row.get(name) for name in FEATURES) else _OTHERS
            rest[title].append((_tick(row), row))
    for title, found in rest.items():
        marked = " · * a peer is timed without it" if any("*" in label for label, _ in found) else ""
        if found:
            grid[title + marked] = found
    return grid


def _tick(row: _Row) -> str:
    """Group, mask and length of a cell outside the grid; marked where a peer does not do all of it."""
    mark = "*" if any(result["note"] for result in row["results"].values()) else ""
    dim = "" if row["head_dim"] == _USUAL_DIM else f" d{row['head_dim']}"
    return f"{row['group']}{mark}{dim}\n{row['mask'].removeprefix(row['group'])}\n{row['length']}"


def _mosaic(titles: Sequence[str]) -> list[list[str]]:
    """Two panels of the grid a line; those of the other cells, or one that is left over, have a line to themselves."""
    rest = [title for title in titles if title.startswith((_OTHERS, _FEATURES, _SAME_BITS))]
    grid = [title for title in titles if title not in rest]
    lines = [grid[n : n + 2] * (2 if n + 1 == len(grid) else 1) for n in range(0, len(grid), 2)]
    return lines + [[title, title] for title in rest]


def _panel(axis: Any, title: str, rows: Sequence[tuple[str, _Row]], names: Sequence[str]) -> None:
    width, points = _BAR_SHARE / len(names), _LABEL_POINTS[len(names) > 6]
    for n, name in enumerate(names):
        rates = [(row["results"].get(name) or {}).get("tflops") for _, row in rows]
        places = [i + (n - (len(names) - 1) / 2) * width for i in range(len(rows))]
        style = STYLES[name]
        drawn = axis.bar(places, [rate or 0.0 for rate in rates], width, color=style.colour, label=style.label, hatch=style.hatch)
        for bar in drawn:
            bar.set(edgecolor="white", linewidth=0.4)
        # A bar that is missing says so: its place would read as a speed of zero.
        labels = [f"{rate:.0f}" if rate else "n/a" for rate in rates]
        axis.bar_label(drawn, labels, rotation=90, padding=2, fontsize=points, fontweight="bold" if name == "ours" else "normal")
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    spare = max(0, _LEAST_LENGTHS - len(rows)) / 2
    axis.set_xlim(-0.5 - spare, len(rows) - 0.5 + spare)
    axis.margins(y=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)
