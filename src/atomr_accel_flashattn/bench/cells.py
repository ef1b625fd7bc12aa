"""The shapes that are measured, and their arithmetic.

The forward grid keeps 16,384 tokens and heads * head_dim = 2048 in every cell, as the FlashAttention papers do (arXiv 2307.08691,
section 4.1).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..types import DType

__all__ = ["Cell", "all_cells", "select"]

TOKENS = 16384
MODEL_WIDTH = 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the benchmark. ``lengths`` has one entry per sequence; ``packed`` lays them out one after the other (varlen)."""

    group: str
    head_dim: int
    heads: int
    heads_kv: int
    lengths: tuple[int, ...]
    causal: bool
    window: int | None = None  # sliding causal: keys seen by each query, itself among them
    alibi: bool = False
    packed: bool = False
    dtype: DType = DType.BF16

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def mask(self) -> str:
        """``full``, ``causal`` or ``window<w>``."""
        if self.window is not None:
            return f"window{self.window}"
        return "causal" if self.causal else "full"

    @property
    def length(self) -> str:
        """The sequence length as the tables write it: ``512``, ``2k``, or ``32seqs`` for packed sequences of different lengths."""
        return f"{self.batch}seqs" if self.packed else _short(self.lengths[0])

    @property
    def tokens(self) -> int:
        """Query tokens in all."""
        return sum(self.lengths)

    @property
    def flops(self) -> float:
        """Floating-point operations of the two products: 4 * heads * head_dim * pairs; a causal mask counts as half, a window exactly."""
        return 4.0 * self.heads * self.head_dim * sum(self._pairs(n) for n in self.lengths)

    @property
    def min_bytes(self) -> int:
        """Bytes of q, k, v and o, each once."""
        return self.tokens * self.head_dim * (2 * self.heads + 2 * self.heads_kv) * self.dtype.itemsize

    def _pairs(self, n: int) -> float:
        if self.window is not None:
            w = min(self.window, n)
            return w * (w + 1) / 2 + (n - w) * w
        return n * n / 2 if self.causal else float(n * n)

    def __str__(self) -> str:
        heads = f"h{self.heads}" if self.heads == self.heads_kv else f"h{self.heads}x{self.heads_kv}"
        return f"{self.group}_d{self.head_dim}_{heads}_{self.mask}_{self.length}"


def _short(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _grid() -> list[Cell]:
    return [
        Cell(
            group="grid",
            head_dim=d,
            heads=MODEL_WIDTH // d,
            heads_kv=MODEL_WIDTH // d,
            lengths=(s,) * (TOKENS // s),
            causal=causal,
        )
        for d in HEAD_DIMS
        for causal in (False, True)
        for s in LENGTHS
    ]


def _d128(group: str, s: int, *, heads: int = 16, heads_kv: int = 16, window: int | None = None, alibi: bool = False) -> Cell:
    return Cell(
        group=group,
        head_dim=128,
        heads=heads,
        heads_kv=heads_kv,
        lengths=(s,) * (TOKENS // s),
        causal=True,
        window=window,
        alibi=alibi,
    )


def _varlen(*, causal: bool) -> Cell:
    """32 sequences of 128..4096 tokens (76,576 in all), the same draw as in the peer tables."""
    draw = random.Random(0)  # noqa: S311 - shapes, not secrets
    lengths = tuple(draw.randint(128, 4096) for _ in range(32))
    return Cell(group="varlen", head_dim=128, heads=16, heads_kv=16, lengths=lengths, causal=causal, packed=True)


def all_cells() -> list[Cell]:
    """Every cell, the forward grid first."""
    others = [
        *(_d128("gqa", s, heads=32, heads_kv=8) for s in (2048, 8192)),
        *(_varlen(causal=causal) for causal in (False, True)),
        *(_d128("window", s, window=1024) for s in (8192, 16384)),
        *(_d128("alibi", s, alibi=True) for s in (2048, 8192)),
    ]
    return [*_grid(), *others]


def select(patterns: str | None) -> list[Cell]:
    """Cells whose name matches one of the comma-separated patterns (``*`` and ``?``; a bare word matches anywhere). None is every cell.

    Raises:
        ValueError: no cell matches; the message lists the names.
    """
    cells = all_cells()
    if not patterns:
        return cells
    wanted = [p.strip() for p in patterns.split(",") if p.strip()]
    wanted = [p if any(c in p for c in "*?[") else f"*{p}*" for p in wanted]
    chosen = [cell for cell in cells if any(fnmatchcase(str(cell), p) for p in wanted)]
    if not chosen:
        names = "\n  ".join(map(str, cells))
        raise ValueError(f"no benchmark cell matches {patterns!r}; the cells are:\n  {names}")
    return chosen
