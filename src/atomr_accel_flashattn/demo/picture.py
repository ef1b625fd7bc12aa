"""The attention maps as one PNG, recomputed from q, k and the LSE that the library returned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cases import Case

__all__ = ["draw", "pooled_probabilities", "probabilities"]

Array = NDArray[Any]

_SIZE = (14.2, 6.4)  # inches
_TOP, _SIDE = 1.42, 4.5  # of the large maps, in inches
_INK, _FAINT = "#16203a", "#6b7690"
_READ_HEAD = 2  # of the real layer: reads clause by clause
_LONG_HEAD = 5
_WORDS = 44  # tokens that still carry a readable label
_POOLED = 256  # side of the long map in pixels
_GAMMA = 0.45  # lifts small probabilities, as the eye wants it


def probabilities(case: Case, lse: Array, head: int, rows: slice = slice(None)) -> Array:
    """P = exp(scale * q.k - lse) of one head, float32 (rows, Sk); 0 where the mask hides a key.

    Args:
        case: its q and k.
        lse: float32 (1, Hq, Sq), as ``run`` returned it.
        head: query head.
        rows: which query rows.
    """
    q = case.q[0, rows, head].astype(np.float32)
    k = case.k[0, :, head * case.k.shape[2] // case.q.shape[2]].astype(np.float32)
    scores = q @ k.T * np.float32(q.shape[-1] ** -0.5)
    if case.causal:
        position = np.arange(case.q.shape[1])[rows] + k.shape[0] - case.q.shape[1]
        scores[np.arange(k.shape[0]) > position[:, None]] = -np.inf
    weights: Array = np.exp(scores - lse[0, head, rows, None])
    return weights


def pooled_probabilities(case: Case, lse: Array, head: int, side: int = _POOLED) -> Array:
    """The map of one head, reduced to at most ``side`` x ``side``: mean over query rows, maximum over keys. O(S * S / side) memory."""
    length = case.q.shape[1]
    side = min(side, length)
    edges = np.linspace(0, length, side + 1).astype(int)
    means = (probabilities(case, lse, head, slice(a, b)).mean(axis=0) for a, b in pairwise(edges))
    return np.stack([np.maximum.reduceat(row, edges[:-1]) for row in means])


def draw(path: Path, real: Case, real_lse: Array, long: Case, long_lse: Array, *, caption: str) -> Path:
    """Draw the maps of the real layer and of the long context.

    Args:
        path: the PNG to write.
        real: the case with tokens.
        real_lse: its LSE, float32 (1, Hq, Sq).
        long: the long causal case.
        long_lse: its LSE.
        caption: one line under the picture: where the numbers were computed, and how well.

    Returns:
        ``path``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, facecolor="white")
    maps = [probabilities(real, real_lse, head) for head in range(real.q.shape[2])]
    _draw_words(figure, maps[_READ_HEAD], real)
    _draw_heads(figure, maps)
    _draw_long(figure, pooled_probabilities(long, long_lse, _LONG_HEAD), long)
    figure.text(0.5, 0.025, caption, ha="center", color=_FAINT, fontsize=8.5)
    figure.savefig(path, dpi=130)
    return path


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ink", ["#ffffff", "#dbe7f5", "#8fb4dd", "#3d74b8", "#1f3f86", "#131c4b", "#0a0c22"])


def _show(axes: Any, weights: Array) -> None:
    axes.imshow(weights**_GAMMA, cmap=_colours(), vmin=0, vmax=float(np.quantile(weights, 0.995)) ** _GAMMA, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_color("#c9d1de")
        spine.set_linewidth(0.8)


def _axes(figure: Any, left: float, side: float, top: float = _TOP) -> Any:
    """A square of ``side`` inches, ``left`` inches from the left edge and ``top`` inches from the upper one."""
    width, height = _SIZE
    return figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))


def _head(figure: Any, left: float, title: str, what: str) -> None:
    width, height = _SIZE
    figure.text(left / width, 1 - 0.42 / height, title, fontsize=10.5, color=_INK, fontweight="bold")
    figure.text(left / width, 1 - 0.63 / height, what, fontsize=8.5, color=_FAINT)


def _draw_words(figure: Any, weights: Array, case: Case) -> None:
    axes = _axes(figure, 1.05, _SIDE)
    _show(axes, weights[:_WORDS, :_WORDS])
    labels = [token.replace("[CLS]", "CLS") for token in case.tokens[:_WORDS]]
    axes.set_yticks(range(len(labels)), labels, fontsize=6.6, color=_INK)
    axes.set_xticks(range(len(labels)), labels, fontsize=6.6, color=_INK, rotation=90)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2)
    _head(figure, 1.05, f"{case.title}, head {_READ_HEAD + 1}", f"the first {_WORDS} tokens: each row is a query, dark is attended")


def _draw_heads(figure: Any, maps: Sequence[Array]) -> None:
    left, side, columns = 6.05, 0.87, 3
    _head(figure, left, f"All {len(maps)} heads", "the whole paragraph")
    pitch = (_SIDE - side) / (-(-len(maps) // columns) - 1)
    for head, weights in enumerate(maps):
        row, column = divmod(head, columns)
        axes = _axes(figure, left + column * (side + 0.1), side, _TOP + row * pitch)
        _show(axes, weights)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(str(head + 1), fontsize=7.5, color=_INK if head == _READ_HEAD else _FAINT, pad=2.5)


def _draw_long(figure: Any, weights: Array, case: Case) -> None:
    axes = _axes(figure, 9.4, _SIDE)
    _show(axes, weights)
    length, side = case.q.shape[1], weights.shape[0]
    marks = [length * part // 4 for part in range(5)]
    places = [mark * side / length - 0.5 for mark in marks]
    axes.set_xticks(places, [str(mark) for mark in marks], fontsize=7, color=_FAINT)
    axes.set_yticks(places, [str(mark) for mark in marks], fontsize=7, color=_FAINT, rotation=90, va="center")
    axes.xaxis.tick_top()
    axes.tick_params(length=2, color="#c9d1de", pad=2)
    _head(figure, 9.4, f"{case.title.capitalize()}, head {_LONG_HEAD + 1}", case.shape)
