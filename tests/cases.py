"""Attention cases: one frozen record that names a call, makes its inputs, and is a test id and a benchmark row at once.

A test is ``@pytest.mark.parametrize("case", hazard_cases(...), ids=str)`` and :func:`tests.check.check_case`. The lists take the element
types to use, because a GPU has two of them and the CPU backend four.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.types import DType

from .inputs import NUMPY_DTYPE, Inputs, Layout, place

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ALL_DTYPES", "GPU_DTYPES", "Alibi", "Case", "Values", "build"]

GPU_DTYPES = (DType.F16, DType.BF16)
ALL_DTYPES = (DType.F16, DType.BF16, DType.F32, DType.F64)


class Alibi(Enum):
    """Shape of the slopes."""

    NONE = ""
    HEADS = "alibi"  # (Hq,)
    BATCH = "alibi_bh"  # (B, Hq)


class Values(Enum):
    """What q, k and v hold."""

    NORMAL = "normal"  # standard normal
    HUGE = "huge"  # scores of several hundreds, whose exp overflows in any type
    RISING = "rising"  # scores of 1 at the last key to 30 at the first, which kernels visit last: maxima grow from tile to tile
    NAN_UNSEEN = "nan_unseen"  # NaN in K and V wherever no query of the sequence looks
    NAN_NEIGHBOUR = "nan_neighbour"  # everything of the first sequence is NaN
    TIES = "ties"  # all keys equal: a uniform softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call. ``lengths_q`` and ``lengths_k`` make it packed; `batch`, `seqlen_q` and `seqlen_k` then follow from them."""

    label: str = ""
    dtype: DType = DType.F16
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 64
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    head_dim: int = 64
    v_head_dim: int = 64
    left: int | None = None
    right: int | None = None
    sink_tokens: int = 0
    learned_sink: bool = False
    alibi: Alibi = Alibi.NONE
    softcap: float = 0.0
    dropout_p: float = 0.0
    softmax_scale: float | None = None
    layout: Layout = Layout.CONTIGUOUS
    values: Values = Values.NORMAL

    @property
    def is_varlen(self) -> bool:
        """Whether sequences are packed."""
        return self.lengths_q is not None

    @property
    def score_count(self) -> int:
        """Elements of the score matrices, masked ones included."""
        if self.lengths_q is not None and self.lengths_k is not None:
            return self.heads * sum(q * k for q, k in zip(self.lengths_q, self.lengths_k, strict=True))
        return self.heads * self.batch * self.seqlen_q * self.seqlen_k

    @property
    def mask_name(self) -> str:
        """The mask in a word: full, causal, or its band, with the sink tokens."""
        if self.left is None and self.right is None:
            return "full"
        if self.left is None and self.right == 0:
            return "causal"
        band = ",".join("inf" if bound is None else str(bound) for bound in (self.left, self.right))
        return f"band({band})" + (f"+{self.sink_tokens}sink" if self.sink_tokens else "")

    def __str__(self) -> str:
        """Test id and benchmark row: sizes always, features only where present."""
        if self.lengths_q is None or self.lengths_k is None:
            sizes = f"b{self.batch}-q{self.seqlen_q}-k{self.seqlen_k}"
        else:
            sizes = f"varlen-q{_lengths(self.lengths_q)}-k{_lengths(self.lengths_k)}"
        width = str(self.head_dim) if self.head_dim == self.v_head_dim else f"{self.head_dim}v{self.v_head_dim}"
        features = (
            self.label,
            self.dtype.value,
            sizes,
            f"h{self.heads}" if self.heads == self.heads_kv else f"h{self.heads}kv{self.heads_kv}",
            f"d{width}",
            self.mask_name,
            "learned_sink" if self.learned_sink else "",
            self.alibi.value,
            f"softcap{self.softcap:g}" if self.softcap else "",
            f"dropout{self.dropout_p:g}" if self.dropout_p else "",
            "" if self.softmax_scale is None else f"scale{self.softmax_scale:g}",
            "" if self.layout is Layout.CONTIGUOUS else self.layout.value,
            "" if self.values is Values.NORMAL else self.values.value,
        )
        return "-".join(feature for feature in features if feature)

    def with_dtype(self, dtype: DType) -> Case:
        """The same case in another element type."""
        return replace(self, dtype=dtype)


def _lengths(lengths: tuple[int, ...]) -> str:
    return "_".join(map(str, lengths)) if len(lengths) <= 8 else f"{len(lengths)}x{min(lengths)}..{max(lengths)}"


def build(case: Case) -> Inputs:
    """Inputs of a case, the same on every machine: the seed is a checksum of its name."""
    random = np.random.Generator(np.random.Philox(zlib.crc32(str(case).encode())))
    packed = case.lengths_q is not None and case.lengths_k is not None
    lead_q = (sum(case.lengths_q or ()),) if packed else (case.batch, case.seqlen_q)
    lead_k = (sum(case.lengths_k or ()),) if packed else (case.batch, case.seqlen_k)
    q = _normal(random, (*lead_q, case.heads, case.head_dim))
    k = _normal(random, (*lead_k, case.heads_kv, case.head_dim))
    v = _normal(random, (*lead_k, case.heads_kv, case.v_head_dim))
    if case.values is Values.HUGE:
        q, k = 20 * q, 20 * k
    if case.values is Values.RISING:
        k *= np.linspace(30, 1, lead_k[-1], dtype=np.float32)[:, None, None]
    if case.values is Values.TIES:
        k[...] = 1
    batch = len(case.lengths_q) if case.lengths_q is not None else case.batch
    slopes = {Alibi.NONE: None, Alibi.HEADS: (case.heads,), Alibi.BATCH: (batch, case.heads)}[case.alibi]
    kind = NUMPY_DTYPE[case.dtype]
    inputs = Inputs(
        dtype=case.dtype,
        q=q.astype(kind),
        k=k.astype(kind),
        v=v.astype(kind),
        softmax_scale=case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale,
        left=case.left,
        right=case.right,
        sink_tokens=case.sink_tokens,
        softcap=case.softcap,
        alibi_slopes=None if slopes is None else random.uniform(0.01, 0.5, slopes).astype(np.float32),
        learned_sink=random.uniform(-2, 4, case.heads).astype(np.float32) if case.learned_sink else None,
        cu_seqlens_q=_offsets(case.lengths_q),
        cu_seqlens_k=_offsets(case.lengths_k),
        dropout_p=case.dropout_p,
        rng=random.integers(-(2**63), 2**63 - 1, 2, dtype=np.int64) if case.dropout_p else None,
    )
    _poison(inputs, case.values)
    q_layout = Layout.CONTIGUOUS if case.layout is Layout.SHARED_KV else case.layout
    return replace(inputs, q=place(inputs.q, q_layout), k=place(inputs.k, case.layout), v=place(inputs.v, case.layout))


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return random.standard_normal(shape, dtype=np.float32)


def _offsets(lengths: tuple[int, ...] | None) -> NDArray[np.int32] | None:
    return None if lengths is None else np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _poison(inputs: Inputs, values: Values) -> None:
    """Put NaN where the values of the case ask for it."""
    if values is Values.NAN_NEIGHBOUR:
        first = inputs.sequence(0)
        for array in (first.q, first.k, first.v):
            array[...] = np.nan
    if values is Values.NAN_UNSEEN:
        for sequence in inputs.sequences():
            unseen = np.array([not _somebody_sees(inputs, len(sequence.q), len(sequence.k), j) for j in range(len(sequence.k))], dtype=bool)
            for array in (sequence.k, sequence.v):
                array[unseen] = np.nan


def _somebody_sees(inputs: Inputs, seqlen_q: int, seqlen_k: int, j: int) -> bool:
    """Ask every query in turn."""
    left, right = (np.inf if bound is None else bound for bound in (inputs.left, inputs.right))
    positions: Any = range(seqlen_k - seqlen_q, seqlen_k)
    return any(j <= p + right and (j >= p - left or j < inputs.sink_tokens) for p in positions)
