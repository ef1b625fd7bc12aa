"""Calls over a KV cache whose cost on the CPU is put beside that of a dense call, with one launch to three."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..functional import flash_attn_func
from ..requests.step_plan import StepPlan
from ..with_kvcache import flash_attn_with_kvcache
from .cache_cells import CacheCell
from .cache_inputs import make_cache_inputs

if TYPE_CHECKING:
    import torch

__all__ = ["DENSE_CALL", "HostCall", "beyond_dense_us", "host_calls"]

DENSE_CALL: Final = "dense"
_SPLITS: Final = 4
_CELL: Final = CacheCell(group="host", batch=2, length=512, heads=2, heads_kv=1, head_dim=64, layout="page16", appends=True)


@dataclass(frozen=True, slots=True)
class HostCall:
    """A decode step of one layer; ``launches``: kernels that it enqueues, a fill of lengths among them."""

    call: Callable[[], object]
    launches: int


def host_calls(device: torch.device) -> dict[str, HostCall]:
    """By name: a dense call on as many tokens of q, and calls over caches of 2 sequences, contiguous or in pages of 16."""
    (x,) = make_cache_inputs(_CELL, device, reuse_bytes=0)
    pages_k, pages_v = x.cache(_CELL.page)
    rows = (x.q, x.k, x.v)
    pages: dict[str, Any] = {"q": x.q, "k_cache": pages_k, "v_cache": pages_v, "block_table": x.table, "cache_seqlens": x.lengths}
    new: dict[str, Any] = {"k": x.new_k, "v": x.new_v}
    turned = new | {"rotary_cos": x.cos, "rotary_sin": x.sin, "rotary_interleaved": False}
    plan = StepPlan(
        x.q, batch=_CELL.batch, heads=_CELL.heads, heads_kv=_CELL.heads_kv, head_dim=_CELL.head_dim, capacity=_CELL.pages * _CELL.page
    )
    plan.schedule(x.lengths)
    return {
        DENSE_CALL: HostCall(lambda: flash_attn_func(*rows), 1),
        "rows": HostCall(lambda: flash_attn_with_kvcache(*rows, cache_seqlens=x.lengths, num_splits=1), 1),
        "rows, a number as length": HostCall(lambda: flash_attn_with_kvcache(*rows, cache_seqlens=_CELL.length, num_splits=1), 2),
        "pages": HostCall(lambda: flash_attn_with_kvcache(**pages, num_splits=1), 1),
        "pages, splits": HostCall(lambda: flash_attn_with_kvcache(**pages, num_splits=_SPLITS), 2),
        "pages, splits, LSE": HostCall(lambda: flash_attn_with_kvcache(**pages, num_splits=_SPLITS, return_softmax_lse=True), 2),
        "pages, StepPlan": HostCall(lambda: flash_attn_with_kvcache(**pages, step_plan=plan), 2),
        "pages, append": HostCall(lambda: flash_attn_with_kvcache(**pages, **new, num_splits=1), 2),
        "pages, append, rotary, splits": HostCall(lambda: flash_attn_with_kvcache(**pages, **turned, num_splits=_SPLITS), 3),
    }


def beyond_dense_us(calls: Mapping[str, HostCall], costs: Mapping[str, float]) -> dict[str, float]:
    """Microseconds of each call beyond the dense one: of all of them where it has one launch, else for each launch behind the first."""
    dense = costs[DENSE_CALL]
    return {name: (costs[name] - dense) / max(1, each.launches - 1) for name, each in calls.items() if name != DENSE_CALL}
