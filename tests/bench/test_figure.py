"""The picture of a forward benchmark, seen from the objects that it is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

plt = pytest.importorskip("matplotlib.pyplot")

from atomr_accel_flashattn.bench.cells import FEATURES, all_cells, backward_cells  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench.figure import _OTHERS as OTHERS, STYLES, draw  # noqa: E402

PEERS = ("ours", "fa2", "cudnn", "fa3", "fa4", "flex")


def record_of(cells: Sequence[Any], peers: Sequence[str] = PEERS, **refused: str) -> dict[str, Any]:
    """Peer number n does 100 * (n + 1) TFLOP/s everywhere; ``refused``: by peer, the group of cells it does not do."""
    rows = []
    for cell in cells:
        rates = {name: None if refused.get(name) == cell.group else 100.0 * (n + 1) for n, name in enumerate(peers)}
        results = {name: {"tflops": rate, "note": ""} for name, rate in rates.items()}
        shape = {name: getattr(cell, name) for name in ("group", "head_dim", "mask", "length", *FEATURES)}
        rows.append(shape | {"results": results})
    head = {"timestamp": "2026-11-24T13:17:19+00:00", "device": {"name": "Some Card"}, "versions": {"torch": "2.11.0"}, "commit": "abc"}
    return head | {"rows": rows, "ceilings": [{"matmul_bf16_tflops": 768.4}]}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draw a record and return the figure instead of closing it."""
    figures: list[Any] = []
    close = plt.close
    monkeypatch.setattr(plt, "close", figures.append)

    def make(record: dict[str, Any]) -> Any:
        path = draw(record, tmp_path / "made" / "figure.png")
        assert path.stat().st_size > 10_000
        return figures[-1]

    yield make
    for figure in figures:
        close(figure)


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_panel_for_each_head_dim_and_mask_and_a_bar_for_each_peer_and_length(drawn: Any) -> None:
    figure = drawn(record_of(all_cells()[:36]))
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert list(panels) == [f"head_dim {d}, {mask}" for d in (64, 128, 256) for mask in ("full", "causal")]
    for axis in panels.values():
        assert len(axis.patches) == 6 * len(PEERS)
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["512", "1k", "2k", "4k", "8k", "16k"]
    assert legend_of(figure) == [STYLES[name].label for name in ("fa2", "flex", "cudnn", "fa3", "fa4", "ours")]
    title = figure.legends[0].get_title().get_text()
    assert ("Some Card" in title, "2026-11-24" in title) == (True, True)
    assert "768 TFLOP/s" in figure.get_supxlabel()


def test_every_bar_has_its_rate_above_and_a_missing_one_says_so(drawn: Any) -> None:
    figure = drawn(record_of(all_cells(), fa3="alibi", fa4="grid"))
    *grid, others, features = figure.axes
    assert len(grid) == 6
    for axis in grid:
        texts = [text.get_text() for text in axis.texts]
        assert texts == [label for label in ("200", "600", "300", "400", "n/a", "100") for _ in range(6)]
    assert [[text.get_text() for text in axis.texts].count("n/a") for axis in (others, features)] == [0, 2]
    assert (others.get_title().startswith("grouped queries"), features.get_title().startswith("ALiBi, softcap")) == (True, True)
    ticks = [tick.get_text() for tick in features.get_xticklabels()]
    assert ("softcap\ncausal\n2k" in ticks, "softcap d64\ncausal\n2k" in ticks, "sink4\nwindow1024\n8k" in ticks) == (True, True, True)
    widths = [axis.get_position().width for axis in figure.axes]
    assert min(widths[-2:]) > 1.9 * widths[0]


def test_the_picture_of_a_backward_says_so_and_has_deterministic_cells_apart(drawn: Any) -> None:
    cells = backward_cells()
    record = record_of(cells) | {"direction": "backward"}
    for row, cell in zip(record["rows"], cells, strict=True):
        row["deterministic"] = cell.deterministic
    figure = drawn(record)
    assert figure.legends[0].get_title().get_text().startswith("Attention backward speed")
    *grid, others, same_bits = figure.axes
    assert (len(grid), others.get_title(), same_bits.get_title()) == (6, OTHERS, "deterministic")
    assert [tick.get_text().split("\n")[0] for tick in same_bits.get_xticklabels()] == ["deterministic"] * 2 + ["deterministic d64"]
    assert "Attention forward speed" in drawn(record_of(cells[:1])).legends[0].get_title().get_text()


def test_cells_that_a_peer_does_without_a_feature_are_marked(drawn: Any) -> None:
    record = record_of([cell for cell in all_cells() if cell.group in {"window", "softcap"}])
    record["rows"][-1]["results"]["fa2"]["note"] = "without softcap"
    others, features = drawn(record).axes
    assert ("*" in others.get_title(), features.get_title().endswith("* a peer is timed without it")) == (False, True)
    assert [tick.get_text().split("\n")[0] for tick in features.get_xticklabels()] == ["softcap", "softcap", "softcap d64", "softcap* d256"]


def test_labels_and_legend_stand_clear_of_one_another_and_inside(drawn: Any) -> None:
    figure = drawn(record_of(all_cells()[:36], peers=(*tuple(STYLES)[:-3], "ours")))
    renderer = figure.canvas.get_renderer()
    top = figure.legends[0].get_window_extent(renderer)
    for axis in figure.axes:
        frame = axis.get_window_extent(renderer)
        assert not axis.title.get_window_extent(renderer).overlaps(top)
        boxes = [text.get_window_extent(renderer) for text in axis.texts]
        assert max(box.y1 for box in boxes) <= frame.y1
        assert min(box.height / box.width for box in boxes) > 1  # upright
        boxes.sort(key=lambda box: box.x0)
        assert all(left.x1 <= right.x0 + 4 for left, right in pairwise(boxes))


def test_a_peer_without_any_time_has_no_bar(drawn: Any) -> None:
    record = record_of(all_cells()[:1], ("ours", "fa4"), fa4="grid")
    assert legend_of(drawn(record)) == ["this package"]


def test_a_panel_that_is_left_over_has_the_line_to_itself(drawn: Any) -> None:
    cells = [cell for cell in all_cells()[:36] if cell.length == "2k"][:3]
    figure = drawn(record_of(cells))
    assert [axis.get_title() for axis in figure.axes] == ["head_dim 64, full", "head_dim 64, causal", "head_dim 128, full"]
    assert figure.axes[0].get_xlim() == (-1.5, 1.5)


def test_a_record_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        draw(record_of([]), tmp_path / "figure.png")
