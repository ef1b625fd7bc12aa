"""Random inputs for one cell, more than the L2 cache holds, and checks against float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..types import DType

if TYPE_CHECKING:
    import torch

    from .cells import Cell

__all__ = ["ERROR_LIMIT", "GRADIENT_ERROR_LIMIT", "Inputs", "check_gradients", "check_rows", "make_inputs", "out_dtype", "random_normal"]

CHECKED_ROWS = 64
# The relative error (Frobenius) of a right 16-bit attention against float32 is 1.4e-3 to 4e-3; a wrong mask or index is above 1e-1.
# P in fp8 alone has 2.7e-2 (e4m3) and 5.4e-2 (e5m2); inputs are compared as they are, after they were rounded.
ERROR_LIMIT = {DType.F16: 5e-3, DType.BF16: 2e-2, DType.F8E4M3: 5e-2, DType.F8E5M2: 1e-1}
# Of gradients, which meet two matrices of 16 bits on their way, P and dS, and an o that is rounded.
GRADIENT_ERROR_LIMIT = {dtype: 2 * limit for dtype, limit in ERROR_LIMIT.items()}
_ROWS_AT_ONCE = 1024  # of float32 scores, for gradients


@dataclass(frozen=True, slots=True)
class Inputs:
    """q, k, v: (B, S, H, D), or (total, H, D) when packed, normal, q times ``score_std``.

    ``offsets`` int32 (B + 1,), ``slopes`` float32 (H,), ``dout`` like o: the gradient that a backward begins with.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    offsets: torch.Tensor | None
    slopes: torch.Tensor | None
    max_length: int
    dout: torch.Tensor | None = None


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch element type of a DType of at most 16 bits."""
    import torch

    wide, narrow = (
        {DType.F16: torch.float16, DType.BF16: torch.bfloat16},
        {DType.F8E4M3: torch.float8_e4m3fn, DType.F8E5M2: torch.float8_e5m2},
    )
    return (wide | narrow)[dtype]


def out_dtype(dtype: DType) -> torch.dtype:
    """That of o where q has this type."""
    return torch_dtype(DType.BF16 if dtype.is_fp8 else dtype)


def random_normal(shape: tuple[int, ...], dtype: DType, generator: torch.Generator, *, std: float = 1.0) -> torch.Tensor:
    """Normal numbers on the device of the generator; those of fp8 are rounded from bfloat16."""
    import torch

    made = torch.randn(*shape, generator=generator, device=generator.device, dtype=out_dtype(dtype))
    return (made if std == 1 else made * std).to(torch_dtype(dtype))


def make_inputs(cell: Cell, device: torch.device, *, l2_bytes: int, seed: int = 0, dout: bool = False) -> list[Inputs]:
    """Two input sets or more, together over three times the L2 cache, so that no timed call finds its inputs there.

    ``dout``: whether a gradient of o is among them.
    """
    sets = max(2, math.ceil(3 * l2_bytes / cell.min_bytes))
    return [_one_set(cell, device, seed + i, dout=dout) for i in range(sets)]


def _one_set(cell: Cell, device: torch.device, seed: int, *, dout: bool) -> Inputs:
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    rows = (cell.tokens,) if cell.packed else (cell.batch, cell.lengths[0])
    rows_k = rows if cell.length_k is None else (cell.batch, cell.length_k)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return random_normal(shape, cell.dtype, generator, std=std)

    offsets = slopes = None
    if cell.packed:
        sums = [0]
        for length in cell.lengths:
            sums.append(sums[-1] + length)
        offsets = torch.tensor(sums, dtype=torch.int32, device=device)
    if cell.alibi:
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / cell.heads) for h in range(cell.heads)], dtype=torch.float32, device=device)
    q = normal(*rows, cell.heads, cell.head_dim, std=cell.score_std)
    k, v = (normal(*rows_k, cell.heads_kv, dim) for dim in (cell.head_dim, cell.value_dim))
    gradient = normal(*rows, cell.heads, cell.value_dim) if dout else None
    return Inputs(q, k, v, offsets, slopes, max(cell.lengths), gradient)


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


def check_gradients(cell: Cell, inputs: Inputs, gradients: Sequence[torch.Tensor]) -> float:
    """Relative error (Frobenius) of gradients against those of float32 attention; NaN never passes.

    Looked at are one KV head and the query heads that read it: the first of the first sequence, and
    the last of the last.

    Args:
        cell: what was computed.
        inputs: from what, with ``dout``.
        gradients: of q, k and v, in their shapes.
    """
    assert inputs.dout is not None  # noqa: S101 - for the type checker
    group, errors = cell.heads // cell.heads_kv, []
    for b, head in {(0, 0), (cell.batch - 1, cell.heads_kv - 1)}:
        start = sum(cell.lengths[:b])
        where = slice(start, start + cell.lengths[b]) if cell.packed else b
        heads, head_kv = slice(head * group, (head + 1) * group), slice(head, head + 1)
        q, dout, dq = (x[where][:, heads] for x in (inputs.q, inputs.dout, gradients[0]))
        k, v, dk, dv = (x[where][:, head_kv] for x in (inputs.k, inputs.v, *gradients[1:]))
        expected = _float32_gradients(cell, q, k, v, dout, inputs.slopes[heads] if cell.alibi and inputs.slopes is not None else None)
        errors += [float((got.float() - right).norm() / right.norm()) for got, right in zip((dq, dk, dv), expected, strict=True)]
    return math.inf if any(math.isnan(e) for e in errors) else max(errors)


def _float32_gradients(
    cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, slopes: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Of a sequence: q (n, H, D), k (S, Hkv, D), v (S, Hkv, Dv), dout (n, H, Dv)."""
    import torch

    leaves = tuple(x.detach().float().requires_grad_() for x in (q, k, v))
    n = len(q)
    with torch.enable_grad():
        for begin in range(0, n, _ROWS_AT_ONCE):
            rows = slice(begin, begin + _ROWS_AT_ONCE)
            out = _float32_rows(cell, leaves[0][rows], leaves[1], leaves[2], slopes, first=len(k) - n + begin)
            torch.autograd.backward([out], [dout[rows].float()], inputs=leaves)
    return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)


def _float32_rows(
    cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor | None, *, first: int | None = None
) -> torch.Tensor:
    """Attention of rows, all in float32: q (n, H, D), k (S, Hkv, D), v (S, Hkv, Dv) -> (n, H, Dv).

    ``first``: the position of the first row among the keys; None where the rows are the last ones.
    """
    import torch

    group = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(group, 1).transpose(0, 1)
    values = v.float().repeat_interleave(group, 1).transpose(0, 1)
    scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * cell.head_dim**-0.5
    n = k.shape[0]
    first = n - q.shape[0] if first is None else first
    i = torch.arange(first, first + q.shape[0], device=q.device)[:, None]
    j = torch.arange(n, device=q.device)[None, :]
    if cell.softcap:
        scores = cell.softcap * (scores / cell.softcap).tanh()
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (i - j).abs()
    left, right = cell.bounds
    hidden = torch.zeros_like(j > i) if right < 0 else j > i + right
    if left >= 0:
        hidden = hidden | ((j < i - left) & (j >= cell.sink_tokens))
    blind = hidden.all(-1, keepdim=True)  # rows that see nothing are zero
    weights = scores.masked_fill(hidden & ~blind, -math.inf).softmax(-1).masked_fill(blind, 0)
    return (weights @ values).transpose(0, 1)
