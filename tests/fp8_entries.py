"""An fp8 call of one sequence by each entry of the package, in any library of arrays."""

from __future__ import annotations

from typing import Any

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.requests.options import Fp8Options

__all__ = ["ENTRIES", "causal_by_entry"]

ENTRIES = ("dense", "packed", "kvcache", "paged", "prefill")


def causal_by_entry(entry: str, q: Any, k: Any, v: Any, descale: dict[str, Any], *, ends: Any, table: Any, empty: tuple[Any, Any]) -> Any:
    """Causal attention.

    Args:
        entry: one of :data:`ENTRIES`.
        q: (1, 64, H, D), and k and v like it.
        k: of fp8.
        v: of fp8.
        descale: keyword arguments of the functions.
        ends: int32 (2,), 0 and 64.
        table: int32 (1, 4), of pages of 16.
        empty: a cache like k and one like v, which "prefill" writes.
    """
    if entry == "dense":
        return fa.flash_attn_func(q, k, v, causal=True, **descale)
    if entry == "packed":
        return fa.flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, 64, 64, causal=True, **descale)[None]
    if entry == "kvcache":
        return fa.flash_attn_with_kvcache(q, k, v, causal=True, **descale)
    if entry == "paged":
        pages = [x.reshape(4, 16, *x.shape[2:]) for x in (k, v)]
        return fa.flash_attn_with_kvcache(q, *pages, block_table=table, causal=True, **descale)
    chunks = [fa.ChunkLayout(64)]
    return fa.run(fa.ChunkedPrefillRequest(q[0], k[0], v[0], *empty, chunks=chunks, fp8=Fp8Options(**descale))).out[None]
