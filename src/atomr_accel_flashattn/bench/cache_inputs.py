"""Random inputs for one cell of the cache benchmark, more than the L2 cache holds, and their check against float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .inputs import random_normal, torch_dtype

if TYPE_CHECKING:
    import torch

    from .cache_cells import CacheCell

__all__ = ["REUSE_BYTES", "CacheInputs", "check_cache_rows", "make_cache_inputs"]

REUSE_BYTES: Final = 256 << 20  # of k and v that are read between two uses of the same ones: five times the L2 cache of an H200
CHECKED_ROWS: Final = 64
ROTARY_BASE: Final = 10000.0


@dataclass(frozen=True, slots=True)
class CacheInputs:
    """One set of inputs of a cell.

    Attributes:
        q: (sequences, queries, H, D), normal.
        k: (batch, slots, Hkv, D), normal, as rows; the pages of a paged cell are parts of it in any order.
        v: the same.
        lengths: int32 (sequences,), keys of each; those that the call appends are not counted.
        table: int32 (sequences, pages), the pages of each; None without pages.
        new_k: (sequences, 1, Hkv, D), what the call appends; None without.
        new_v: the same.
        cos: (slots, D / 2), of q's type, for the rotation of new keys and q in halves.
        sin: the same.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor | None = None
    new_k: torch.Tensor | None = None
    new_v: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None

    def cache(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and v as a call takes them: rows, or (pages, page, Hkv, D)."""
        if not page:
            return self.k, self.v
        k, v = (x.view(-1, page, *x.shape[2:]) for x in (self.k, self.v))
        return k, v


def make_cache_inputs(cell: CacheCell, device: torch.device, *, reuse_bytes: int = REUSE_BYTES, seed: int = 0) -> list[CacheInputs]:
    """So many sets that ``reuse_bytes`` of k and v are read between two uses of one; they share lengths and table."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return random_normal(shape, cell.dtype, generator)

    spread = torch.randperm(cell.sequences, generator=torch.Generator().manual_seed(seed))[: cell.batch].sort().values
    lengths = torch.zeros(cell.sequences, dtype=torch.int32)
    lengths[spread] = cell.length - cell.appends
    table = None
    if cell.page:
        table = torch.zeros(cell.sequences, cell.pages, dtype=torch.int32)
        order = torch.randperm(cell.batch * cell.pages, generator=torch.Generator().manual_seed(seed))
        table[spread] = order.view(cell.batch, cell.pages).int()
        table = table.to(device)
    cos = sin = None
    if cell.appends:
        angles = torch.arange(cell.slots)[:, None] * ROTARY_BASE ** (-2 * torch.arange(cell.head_dim // 2) / cell.head_dim)
        cos, sin = (x.to(device, torch_dtype(cell.type_of_q)) for x in (angles.cos(), angles.sin()))
    made = []
    for _ in range(max(1, math.ceil(reuse_bytes / cell.kv_bytes))):
        q = random_normal((cell.sequences, cell.queries, cell.heads, cell.head_dim), cell.type_of_q, generator)
        k, v = (normal(cell.batch, cell.slots, cell.heads_kv, cell.head_dim) for _ in range(2))
        new_k, new_v = ((normal(cell.sequences, 1, cell.heads_kv, cell.head_dim) if cell.appends else None) for _ in range(2))
        made.append(CacheInputs(q, k, v, lengths.to(device), table, new_k, new_v, cos, sin))
    return made


def check_cache_rows(cell: CacheCell, inputs: CacheInputs, out: torch.Tensor) -> float:
    """Relative error (Frobenius) of the last rows of the first and the last sequence against float32 attention; NaN never passes.

    Sequences without keys have to be zero. ``out``: (sequences, queries, H, D).
    """
    total = inputs.lengths + (1 if cell.appends else 0)
    with_keys = [int(b) for b in (inputs.lengths > 0).nonzero().flatten()]
    empty = (inputs.lengths == 0).nonzero().flatten()
    errors = [math.inf] if len(empty) and bool((out[empty] != 0).any()) else []
    for b in {with_keys[0], with_keys[-1]}:
        count = min(CHECKED_ROWS, cell.queries)
        expected = _float32_rows(cell, inputs, b, with_keys.index(b), int(total[b]), count)
        got = out[b, -count:].float()
        errors.append(float((got - expected).norm() / expected.norm()))
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def _float32_rows(cell: CacheCell, inputs: CacheInputs, b: int, row: int, length: int, count: int) -> torch.Tensor:
    """The last ``count`` rows of sequence ``b``, which is the ``row``-th of the cache: (count, H, D)."""
    import torch

    if inputs.table is None:
        k, v = inputs.k[row], inputs.v[row]
    else:
        pages = inputs.table[b].long()
        k, v = (x[pages].flatten(0, 1) for x in inputs.cache(cell.page))
    q, k, v = inputs.q[b, -count:].float(), k[:length].float(), v[:length].float()
    if inputs.new_k is not None and inputs.new_v is not None:
        k, v = k.clone(), v.clone()
        k[-1], v[-1] = _rotated(inputs, inputs.new_k[b], length - 1)[0], inputs.new_v[b, 0]
        q = _rotated(inputs, q, length - 1)
    q = q.unflatten(1, (cell.heads_kv, -1))
    scores = torch.einsum("nhgd,khd->hgnk", q, k) * cell.head_dim**-0.5
    positions = torch.arange(length - count, length, device=q.device)[:, None]
    scores = scores.masked_fill(torch.arange(length, device=q.device)[None] > positions, -math.inf)
    return torch.einsum("hgnk,khd->nhgd", scores.softmax(-1), v).flatten(1, 2)


def _rotated(inputs: CacheInputs, x: torch.Tensor, position: int) -> torch.Tensor:
    """X (n, H, D) turned in halves, in float32."""
    import torch

    assert inputs.cos is not None  # noqa: S101 - for the type checker
    assert inputs.sin is not None  # noqa: S101 - for the type checker
    cos, sin, (a, b) = inputs.cos[position].float(), inputs.sin[position].float(), x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
