"""Random inputs for one cell, more of them than the L2 cache holds, and the float32 rows that outputs are checked against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..types import DType

if TYPE_CHECKING:
    import torch

    from .cells import Cell

__all__ = ["Inputs", "check_rows", "make_inputs"]

CHECKED_ROWS = 64
# The relative error (Frobenius) of a right 16-bit attention against float32 is 1.4e-3 to 4e-3; a wrong mask or index is above 1e-1.
ERROR_LIMIT = {DType.F16: 5e-3, DType.BF16: 2e-2}


@dataclass(frozen=True, slots=True)
class Inputs:
    """q, k, v: (B, S, H, D), or (total, H, D) when packed, normal, q times ``score_std``.

    ``offsets`` int32 (B + 1,), ``slopes`` float32 (H,).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    offsets: torch.Tensor | None
    slopes: torch.Tensor | None
    max_length: int


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch element type of a 16-bit DType."""
    import torch

    return {DType.F16: torch.float16, DType.BF16: torch.bfloat16}[dtype]


def make_inputs(cell: Cell, device: torch.device, *, l2_bytes: int, seed: int = 0) -> list[Inputs]:
    """Two input sets or more, together over three times the L2 cache, so that no timed call finds its inputs there."""
    sets = max(2, math.ceil(3 * l2_bytes / cell.min_bytes))
    return [_one_set(cell, device, seed + i) for i in range(sets)]


def _one_set(cell: Cell, device: torch.device, seed: int) -> Inputs:
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    rows = (cell.tokens,) if cell.packed else (cell.batch, cell.lengths[0])
    rows_k = rows if cell.length_k is None else (cell.batch, cell.length_k)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch_dtype(cell.dtype))

    offsets = slopes = None
    if cell.packed:
        sums = [0]
        for length in cell.lengths:
            sums.append(sums[-1] + length)
        offsets = torch.tensor(sums, dtype=torch.int32, device=device)
    if cell.alibi:
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / cell.heads) for h in range(cell.heads)], dtype=torch.float32, device=device)
    q, k, v = (normal(*rows, cell.heads, cell.head_dim), *(normal(*rows_k, cell.heads_kv, dim) for dim in (cell.head_dim, cell.value_dim)))
    return Inputs(q * cell.score_std, k, v, offsets, slopes, max(cell.lengths))


def check_rows(cell: Cell, inputs: Inputs, out: torch.Tensor) -> float:
    """Relative error (Frobenius) of the last 64 rows of the first and the last sequence against float32 attention; NaN never passes.

    Args:
        cell: what was computed, which of a peer that has not every feature is not the cell it was asked for (``Peer.computed``).
        inputs: from what.
        out: (B, S, H, D of v), or (total, H, D of v) when packed.
    """
    errors = []
    for b in {0, cell.batch - 1}:
        start = sum(cell.lengths[:b])
        n = cell.lengths[b]
        rows = slice(start, start + n)
        q, k, v, o = (x[rows] if cell.packed else x[b] for x in (inputs.q, inputs.k, inputs.v, out))
        count = min(CHECKED_ROWS, n)
        expected = _float32_rows(cell, q[n - count :], k, v, inputs.slopes if cell.alibi else None)
        got = o[n - count :].float()
        errors.append(float((got - expected).norm() / expected.norm()))
    return math.inf if any(math.isnan(e) for e in errors) else max(errors)


def _float32_rows(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor | None) -> torch.Tensor:
    """Attention of the last ``len(q)`` rows, all in float32: q (n, H, D), k (S, Hkv, D), v (S, Hkv, Dv) -> (n, H, Dv)."""
    import torch

    group = cell.heads // cell.heads_kv
    keys = k.float().repeat_interleave(group, 1).transpose(0, 1)
    values = v.float().repeat_interleave(group, 1).transpose(0, 1)
    scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * cell.head_dim**-0.5
    n = k.shape[0]
    i = torch.arange(n - q.shape[0], n, device=q.device)[:, None]
    j = torch.arange(n, device=q.device)[None, :]
    if cell.softcap:
        scores = cell.softcap * (scores / cell.softcap).tanh()
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (i - j).abs()
    left, right = cell.bounds
    hidden = torch.zeros_like(j > i) if right < 0 else j > i + right
    if left >= 0:
        hidden = hidden | ((j < i - left) & (j >= cell.sink_tokens))
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0)  # a row that sees nothing is zero
    return (weights @ values).transpose(0, 1)
