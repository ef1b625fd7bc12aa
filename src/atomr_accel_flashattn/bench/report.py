"""Tables (plain text and Markdown) and the picture of a forward benchmark, all from its JSON record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "format_row", "header", "markdown", "summary"]

OURS = "ours"
COLOURS = {
    OURS: "#0b6e4f",
    "ours_fa2": "#5fa98c",
    "ours_fa3": "#5fa98c",
    "fa2": "#b0b7c3",
    "cudnn": "#6c8ebf",
    "fa3": "#d6a35c",
    "fa4": "#b5654a",
    "flex": "#9a86b8",
}
LABELS = {
    OURS: "this package",
    "ours_fa2": "this package, FA2 family",
    "ours_fa3": "this package, FA3 family",
    "fa2": "FlashAttention-2 (torch)",
    "cudnn": "cuDNN (torch)",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
    "flex": "FlexAttention (torch)",
}


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
    """Lines after the table: geometric means, worst cells, ceilings, what was skipped or failed."""
    for name, mean in report["geometric_means"].items():
        cell, ratio = report["worst"][name]
        count = sum(name in row["ratios"] for row in report["rows"])
        yield f"against {name}: geometric mean {mean:.3f} over {count} cells, worst {ratio:.3f} in {cell}"
    for when, found in zip(("before", "after"), report["ceilings"], strict=False):
        yield f"ceiling {when}: bf16 matmul {found['matmul_bf16_tflops']:.0f} TFLOP/s, copy {found['copy_gbs']:.0f} GB/s"
    if any(result["note"] for row in report["rows"] for result in row["results"].values()):
        yield "* this peer has no ALiBi and is timed without the bias"
    if report["skipped"]:
        yield f"not begun, the budget was spent: {', '.join(report['skipped'])}"
    for failure in report["failures"]:
        yield f"FAILED {failure}"


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
    return "\n".join([*lines, "", *(f"- {line}" for line in summary(record))]) + "\n"


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


def draw(record: Mapping[str, Any], path: Path) -> Path:
    """Draw one panel per head dim and mask of the forward grid and one for the other cells, bars per peer, TFLOP/s; PNG or SVG by suffix.

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
    names = _names(record["rows"])
    # Two panels a row; the last one has the row to itself when it is alone there.
    mosaic = [[n, min(n + 1, len(panels) - 1)] for n in range(0, len(panels), 2)]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(12, 2.9 * len(mosaic)), layout="constrained")
    for n, (title, rows) in enumerate(panels):
        _bars(axes[n], title, rows, names)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False)
    ceiling = record["ceilings"][0]["matmul_bf16_tflops"]
    figure.supxlabel(
        f"TFLOP/s, bf16, 16k tokens, heads x head_dim = 2048 · {record['device']['name']} · bf16 matmul in the same run {ceiling:.0f} · "
        f"commit {record['commit']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """(title, [(tick label, row)]): the grid by head dim and mask, the rest together."""
    panels: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for row in rows:
        if row["group"] == "grid":
            panels.setdefault(f"head_dim {row['head_dim']}, {row['mask']}", []).append((row["length"], row))
        else:
            mark = "*" if any(result["note"] for result in row["results"].values()) else ""
            label = f"{row['group']}{mark}\n{row['mask'].removeprefix(row['group'])}\n{row['length']}"
            panels.setdefault("other cells, head_dim 128 (* a peer without the bias)", []).append((label, row))
    return list(panels.items())


def _bars(axis: Any, title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], names: Sequence[str]) -> None:
    width = 0.8 / len(names)
    for n, name in enumerate(names):
        rates = [(row["results"].get(name) or {}).get("tflops") or 0.0 for _, row in rows]
        places = [i + (n - (len(names) - 1) / 2) * width for i in range(len(rows))]
        axis.bar(places, rates, width, color=COLOURS[name], label=LABELS[name])
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)
