"""The shapes that are measured, and their arithmetic.

The forward grid keeps 16,384 tokens and heads * head_dim = 2048 in every cell, as the FlashAttention papers do (arXiv 2307.08691,
section 4.1).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final, TypeVar

import numpy as np

from ..types import DType

__all__ = ["FEATURES", "Cell", "all_cells", "backward_cells", "fp8_cells", "select", "select_by_name", "short_length"]

CellT = TypeVar("CellT")

TOKENS = 16384
MODEL_WIDTH = 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
FEATURES: Final = {"alibi": "ALiBi", "softcap": "softcap", "sink_tokens": "sink tokens"}  # fields of a cell, and what tables call them
# As in a model: some scores reach a third of the cap, and an answer without it is off by more than the check of the outputs lets pass.
SOFTCAP, SOFTCAP_SCORE_STD = 30.0, 2.5
LOW_SOFTCAP = 5.0  # most tiles of scores with standard deviation 1 have one that is not small beside it
SINK_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the benchmark. ``lengths`` has one entry per sequence; ``packed`` lays them out one after the other (varlen).

    Attributes:
        window: sliding causal: keys seen by each query, itself among them.
        band: instead of ``causal`` and ``window``: (left, right) keys around a query, -1 unbounded.
        v_head_dim: of v and o; None is ``head_dim``.
        length_k: keys of every sequence of a dense cell; None is as many as queries. Queries are aligned to the last key.
        softcap: c of c * tanh(s / c), 0 is none.
        sink_tokens: first keys that stay visible when a window has passed them.
        score_std: standard deviation of scores, before the cap: that of q, where k has 1.
        deterministic: of a backward: whether gradients are bitwise equal from run to run.
    """

    group: str
    head_dim: int
    heads: int
    heads_kv: int
    lengths: tuple[int, ...]
    causal: bool
    window: int | None = None
    alibi: bool = False
    packed: bool = False
    dtype: DType = DType.BF16
    band: tuple[int, int] | None = None
    v_head_dim: int | None = None
    length_k: int | None = None
    softcap: float = 0.0
    sink_tokens: int = 0
    score_std: float = 1.0
    deterministic: bool = False

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def mask(self) -> str:
        """``full``, ``causal``, ``window<w>`` or ``window<left>x<right>``, with ``all`` for an unbounded side."""
        if self.band is not None:
            return "window" + "x".join("all" if side < 0 else str(side) for side in self.band)
        if self.window is not None:
            return f"window{self.window}"
        return "causal" if self.causal else "full"

    @property
    def length(self) -> str:
        """The sequence length as the tables write it: ``512``, ``2k``, or ``32seqs`` for packed sequences of different lengths."""
        if self.packed:
            return f"{self.batch}seqs"
        keys = f"x{short_length(self.length_k)}" if self.length_k is not None else ""
        return short_length(self.lengths[0]) + keys

    @property
    def value_dim(self) -> int:
        """Head dim of v and o."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def bounds(self) -> tuple[int, int]:
        """The mask as (left, right) keys around a query, -1 unbounded."""
        if self.band is not None:
            return self.band
        return (-1 if self.window is None else self.window - 1), (0 if self.causal or self.window is not None else -1)

    @property
    def features(self) -> tuple[str, ...]:
        """The values of ``FEATURES`` that the cell has."""
        return tuple(title for field, title in FEATURES.items() if getattr(self, field))

    @property
    def keys(self) -> tuple[int, ...]:
        """Number of keys of each sequence."""
        return self.lengths if self.length_k is None else (self.length_k,) * self.batch

    @property
    def tokens(self) -> int:
        """Query tokens in all."""
        return sum(self.lengths)

    @property
    def flops(self) -> float:
        """Floating-point operations of both products: 2 heads (D + Dv) pairs; a causal mask counts as half when lengths are equal."""
        return self._operations(self.head_dim + self.value_dim)

    @property
    def backward_flops(self) -> float:
        """Those of the five products of a backward: 2 heads (3 D + 2 Dv) pairs.

        2.5 times the forward's where v is as wide as q.
        """
        return self._operations(3 * self.head_dim + 2 * self.value_dim)

    def _operations(self, dims: int) -> float:
        """Of products over so many columns in all."""
        return 2.0 * self.heads * dims * sum(self._pairs(n, keys) for n, keys in zip(self.lengths, self.keys, strict=True))

    @property
    def min_bytes(self) -> int:
        """Bytes of q, k, v and o, each once; o of fp8 has 16 bits."""
        size, rows, keys = self.dtype.itemsize, self.tokens * self.heads, sum(self.keys) * self.heads_kv
        return size * (self.head_dim * rows + (self.head_dim + self.value_dim) * keys) + max(size, 2) * self.value_dim * rows

    def _pairs(self, n: int, keys: int) -> float:
        """Visible pairs of query and key in a sequence."""
        left, right = self.bounds
        if (left, right) == (-1, 0) and n == keys:
            return n * n / 2
        p = np.arange(keys - n, keys)
        first = np.maximum(0, p - left) if left >= 0 else np.zeros_like(p)
        last = np.minimum(keys, p + right + 1) if right >= 0 else np.full_like(p, keys)
        sinks = np.minimum(self.sink_tokens, first)  # those in front of the band
        return float((np.maximum(0, last - first) + sinks).sum())

    def __str__(self) -> str:
        heads = f"h{self.heads}" if self.heads == self.heads_kv else f"h{self.heads}x{self.heads_kv}"
        dims = f"d{self.head_dim}" if self.v_head_dim in {None, self.head_dim} else f"d{self.head_dim}v{self.v_head_dim}"
        other_type = "" if self.dtype is DType.BF16 else f"_{self.dtype.value}"
        return f"{self.group}_{dims}_{heads}_{self.mask}_{self.length}{other_type}"


def short_length(n: int) -> str:
    """``512``, ``2k``."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _dense(group: str, d: int, s: int, *, causal: bool = True, **changes: Any) -> Cell:
    """Sequences of ``s`` tokens, 16,384 in all, with as many heads as the width holds; ``changes``: other fields."""
    heads = MODEL_WIDTH // d
    plain = Cell(group=group, head_dim=d, heads=heads, heads_kv=heads, lengths=(s,) * (TOKENS // s), causal=causal)
    return replace(plain, **changes)


def _grid() -> list[Cell]:
    return [_dense("grid", d, s, causal=causal) for d in HEAD_DIMS for causal in (False, True) for s in LENGTHS]


def _few_queries(n: int, batch: int) -> Cell:
    """Grouped queries, a few tokens each, behind 4096 keys: speculative decoding and the last chunk of a prompt."""
    return Cell(group="gqa", head_dim=128, heads=32, heads_kv=8, lengths=(n,) * batch, length_k=4096, causal=True)


def _chunk(heads: int, heads_kv: int) -> Cell:
    """512 queries of one sequence behind 64k keys: with few heads there are fewer tiles than SMs."""
    return replace(_few_queries(512, 1), group="chunk", heads=heads, heads_kv=heads_kv, length_k=1 << 16)


def _varlen(*, causal: bool) -> Cell:
    """32 sequences of 128..4096 tokens (76,576 in all), the same draw as in the peer tables."""
    draw = random.Random(0)  # noqa: S311 - shapes, not secrets
    lengths = tuple(draw.randint(128, 4096) for _ in range(32))
    return Cell(group="varlen", head_dim=128, heads=16, heads_kv=16, lengths=lengths, causal=causal, packed=True)


def _grouped() -> list[Cell]:
    return [_dense("gqa", 128, s, heads=32, heads_kv=8) for s in (2048, 8192)]


def _one_kv_head() -> list[Cell]:
    """MQA, where a backward has few blocks: two sequences of 8k, and one of 4k."""
    return [_dense("gqa", 128, 8192, heads_kv=1), _dense("gqa", 128, 4096, heads_kv=1, lengths=(4096,))]


def _packed_and_windows() -> list[Cell]:
    return [*(_varlen(causal=causal) for causal in (False, True)), *(_dense("window", 128, s, window=1024) for s in (8192, 16384))]


def backward_cells() -> list[Cell]:
    """Every cell of the backward benchmark.

    The forward grid, grouped queries, packed sequences, windows, and some deterministic ones.
    """
    same_bits = [_dense("deterministic", d, s, deterministic=True) for d, s in ((128, 2048), (128, 8192), (64, 8192))]
    return [*_grid(), *_grouped(), *_one_kv_head(), *_packed_and_windows(), *same_bits]


def all_cells() -> list[Cell]:
    """Every cell of the forward benchmark, the grid first."""
    others = [
        *_grouped(),
        *(_few_queries(n, batch) for n, batch in ((16, 64), (128, 16))),
        *(_chunk(8 * heads, heads) for heads in (1, 8)),
        *_packed_and_windows(),
        *(_dense("alibi", 128, s, alibi=True) for s in (2048, 8192)),
        *(
            _dense("softcap", d, s, softcap=SOFTCAP, score_std=SOFTCAP_SCORE_STD)
            for d, s in ((128, 2048), (128, 8192), (64, 2048), (256, 2048))
        ),
        _dense("low_softcap", 128, 2048, softcap=LOW_SOFTCAP),
        *(_dense(f"sink{SINK_TOKENS}", 128, s, window=1024, sink_tokens=SINK_TOKENS) for s in (8192, 16384)),
    ]
    return [*_grid(), *others]


def fp8_cells() -> list[Cell]:
    """Those of the forward benchmark in fp8: they are run where they are asked for by name."""
    return [
        _dense("fp8", d, s, causal=causal, dtype=DType.F8E4M3) for d in HEAD_DIMS for causal in (False, True) for s in (2048, 8192, 16384)
    ]


def select(patterns: str | None, cells: Sequence[Cell] | None = None) -> list[Cell]:
    """Of ``cells`` those whose name matches one of the comma-separated patterns; None is every cell.

    ``cells`` None are :func:`all_cells`, and by name :func:`fp8_cells` too. In patterns ``*`` and ``?`` stand for others; a bare word
    matches anywhere.

    Raises:
        ValueError: no cell matches; the message lists the names.
    """
    known = all_cells() if cells is None else list(cells)
    return select_by_name(patterns, [*known, *fp8_cells()] if patterns and cells is None else known)


def select_by_name(patterns: str | None, cells: list[CellT]) -> list[CellT]:
    """:func:`select` of cells of any kind, by their ``str``."""
    if not patterns:
        return cells
    wanted = [p.strip() for p in patterns.split(",") if p.strip()]
    wanted = [p if any(c in p for c in "*?[") else f"*{p}*" for p in wanted]
    chosen = [cell for cell in cells if any(fnmatchcase(str(cell), p) for p in wanted)]
    if not chosen:
        names = "\n  ".join(map(str, cells))
        raise ValueError(f"no benchmark cell matches {patterns!r}; the cells are:\n  {names}")
    return chosen
