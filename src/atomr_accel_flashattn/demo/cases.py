"""What the demo computes: one layer of a real model with its recorded output, and a long causal context made from a formula."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Case", "load_cases", "long_context", "minilm"]

Array = NDArray[Any]

_SAMPLED_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One attention call and what it has to give.

    Attributes:
        name: for tables and programs.
        title: for people.
        q: float16 (1, Sq, Hq, D).
        k: float16 (1, Sk, Hkv, D).
        v: float16 (1, Sk, Hkv, D).
        causal: whether queries see only keys up to their own position.
        rows: the query rows whose output is known, ascending.
        expected: their output, (1, len(rows), Hq, D), float32 or float64.
        origin: where ``expected`` comes from.
        tokens: the text, one string per row; empty for made-up inputs.
    """

    name: str
    title: str
    q: Array = field(repr=False)
    k: Array = field(repr=False)
    v: Array = field(repr=False)
    causal: bool
    rows: Array = field(repr=False)
    expected: Array = field(repr=False)
    origin: str
    tokens: tuple[str, ...] = field(default=(), repr=False)

    @property
    def shape(self) -> str:
        """The sizes in words."""
        _, length, heads, head_dim = self.q.shape
        shared = f" on {self.k.shape[2]}" if self.k.shape[2] != heads else ""
        return f"{length} tokens, {heads}{shared} heads, d {head_dim}, {'causal' if self.causal else 'full'}"

    def error(self, out: Array) -> float:
        """Largest distance between ``out`` (1, Sq, Hq, D) and the known rows. NaN when any of them is NaN."""
        return float(np.abs(out[:, self.rows].astype(np.float64) - self.expected).max())

    def allowed_error(self) -> float:
        """The tolerance of docs/semantics.md: twice the error of a plain float16 evaluation, plus a rounding floor."""
        plain = dense_rows(self.q, self.k, self.v, self.rows, causal=self.causal, rounded=True)
        expected = self.expected.astype(np.float16)
        floor = 2 * np.abs((expected + np.float16(0.3) - np.float16(0.3)).astype(np.float64) - expected).max()
        return 2 * self.error_of_rows(plain) + float(floor)

    def error_of_rows(self, rows: Array) -> float:
        """Largest distance between an evaluation of just the known rows and their output."""
        return float(np.abs(rows.astype(np.float64) - self.expected).max())


def load_cases(length: int = 4096) -> tuple[Case, Case]:
    """The real case, and the long one with ``length`` tokens."""
    return minilm(), long_context(length)


def minilm() -> Case:
    """Layer 4 of all-MiniLM-L6-v2 on a paragraph, 12 heads of 32, with the output that the model computed (tools/capture_fixture.py)."""
    with (files(__package__) / "minilm_layer.npz").open("rb") as file, np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return Case(
        name="minilm",
        title=f"all-MiniLM-L6-v2, layer {int(arrays['layer']) + 1}",
        q=arrays["q"],
        k=arrays["k"],
        v=arrays["v"],
        causal=False,
        rows=np.arange(arrays["q"].shape[1]),
        expected=arrays["context"],
        origin="recorded from the model",
        tokens=tuple(arrays["tokens"].tolist()),
    )


def long_context(length: int = 4096, *, seed: int = 7) -> Case:
    """A long causal context: 8 query heads on 2 KV heads of 64, with the features that trained heads show.

    Neighbours attract (rotary phases), passages on the same topic attract wherever they are, and the first tokens draw what is left. The
    expected output is a float64 evaluation of 64 sampled rows.
    """
    rng = np.random.default_rng(seed)
    topics = _topics(length, rng)
    phase = np.arange(length)[:, None] * 0.7 ** np.arange(12)
    position = np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
    first = np.zeros((length, 8))
    first[:4] = 1.0
    near = np.linspace(1.6, 0.2, 8)[:, None]
    about = np.linspace(0.6, 2.0, 8)[:, None]
    q: Array = np.concatenate([2.0 * near * position[:, None], 2.0 * about * topics[:, None], np.full((length, 8, 8), 1.2)], axis=-1)
    k: Array = np.concatenate([2.0 * position, 2.0 * topics, 7.0 * first], axis=-1)[:, None].repeat(2, axis=1)
    q, k = ((x + 0.4 * rng.standard_normal(x.shape)).astype(np.float16)[None] for x in (q, k))
    v = rng.standard_normal((1, length, 2, 64)).astype(np.float16)
    rows = np.unique(np.linspace(0, length - 1, _SAMPLED_ROWS).astype(np.int64))
    return Case(
        name="long-context",
        title="a long causal context",
        q=q,
        k=k,
        v=v,
        causal=True,
        rows=rows,
        expected=dense_rows(q, k, v, rows, causal=True),
        origin=f"float64 on {len(rows)} rows",
    )


def _topics(length: int, rng: np.random.Generator) -> Array:
    """(length, 32): the topic vector of each position; passages of 3 to 12 percent of the text share one, and topics come back."""
    vectors = rng.standard_normal((5, 32)) / np.sqrt(32)
    parts: list[Array] = []
    topic = 0
    while sum(len(part) for part in parts) < length:
        topic = (topic + int(rng.integers(1, len(vectors)))) % len(vectors)
        size = max(1, int(length * rng.uniform(0.03, 0.12)))
        parts.append(np.broadcast_to(3.0 * vectors[topic], (size, 32)))
    return np.concatenate(parts)[:length]


def dense_rows(q: Array, k: Array, v: Array, rows: Array, *, causal: bool, rounded: bool = False) -> Array:
    """Attention of some query rows, straight from the definition: O(rows * Sk) memory.

    Args:
        q: (1, Sq, Hq, D).
        k: (1, Sk, Hkv, D).
        v: (1, Sk, Hkv, Dv).
        rows: indices into Sq.
        causal: bottom-right aligned.
        rounded: evaluate as a plain float16 program does: float32 scores, probabilities and output rounded to float16.

    Returns:
        (1, len(rows), Hq, Dv), float64, or float16 when ``rounded``.
    """
    work = np.float32 if rounded else np.float64
    repeat = q.shape[2] // k.shape[2]
    queries = q[0, rows].astype(work).transpose(1, 0, 2)
    keys, values = (x[0].astype(work).transpose(1, 0, 2).repeat(repeat, axis=0) for x in (k, v))
    scores = queries @ keys.transpose(0, 2, 1) * work(q.shape[-1] ** -0.5)
    if causal:
        position = rows + k.shape[1] - q.shape[1]
        scores[:, np.arange(k.shape[1]) > position[:, None]] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if rounded:
        p = p.astype(np.float16).astype(work)
    out: Array = (p @ values).transpose(1, 0, 2)[None]
    return out.astype(np.float16) if rounded else out
