"""CachedFwdRequest: attention over a KV cache, contiguous or paged, that new tokens are written to on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .problem import AttentionProblem
from .requests.forward import ForwardRequest
from .requests.kv_cache import CacheArguments, cached_problem
from .requests.seqlens import CumulativeSeqlens
from .requests.step_plan import StepPlan
from .types import KvLayout

__all__ = ["CachedFwdRequest"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CachedFwdRequest(ForwardRequest):
    """What ``flash_attn_with_kvcache`` asks, as an object. Meaning: docs/semantics.md, KV caches.

    Attributes:
        q: (B, Sq, Hq, D), or packed (total_q, Hq, D) with ``cu_seqlens_q``.
        k_cache: contiguous (rows, slots, Hkv, D), with at least B rows unless there is ``cache_batch_idx``; paged (blocks, block size, Hkv,
            D), or (blocks, Hkv, block size, D) with ``layout`` HND. Of q's type, or of fp8. Written in place
            where there are new tokens.
        v_cache: the same with Dv.
        cache_seqlens: int32 (B,), slots in use before new tokens, left padding counted.
        k: (B, new, Hkv, D), new keys that are written behind the others; None for none. Those of 16 bits are quantised for a cache of fp8.
        v: (B, new, Hkv, Dv).
        cu_seqlens_q: where the sequences of a packed q begin.
        block_table: int32 (B, entries), the pages of each sequence. Entries past the length are not read; those outside of
            0..blocks - 1 are no keys.
        layout: order of dimensions of a paged cache.
        cache_batch_idx: int32 (B,), the row of a contiguous cache that each sequence has; None is row b.
        cache_leftpad: int32 (B,), slots before the first key; contiguous caches only.
        rotary_cos: (positions, rotary dim / 2), of q's type or float32: turns new keys and q before they meet; None for none.
        rotary_sin: the same.
        rotary_interleaved: whether element 2 i turns with 2 i + 1, or i with i + rotary dim / 2.
        num_splits: parts that the keys of a row are cut into, 0 for as many as suit; at most 128.
        max_seqlen_k: upper bound of the lengths, new tokens counted; None is what there is room for.
        plan: a StepPlan, which cuts the keys by the lengths on the device; without ``num_splits``.
        mask, bias, sink_tokens, options, fp8, out, problem, out_array, plan_key: as in ForwardRequest; dropout is refused.

    Raises:
        SeqLensError: lengths (those in host memory are looked at) that are negative, or more than there are slots.
        BlockTableError: a table, rows or a layout that do not fit.
        StepPlanError: a plan for other calls.
        RotaryError: cos and sin that do not fit, or without new tokens.
        ConstructionError: another subclass says which argument is wrong; nothing has been written.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and out

    q: Any
    k_cache: Any
    v_cache: Any
    cache_seqlens: Any
    k: Any = None
    v: Any = None
    cu_seqlens_q: CumulativeSeqlens | None = field(default=None, kw_only=True)
    block_table: Any = field(default=None, kw_only=True)
    layout: KvLayout = field(default=KvLayout.NHD, kw_only=True)
    cache_batch_idx: Any = field(default=None, kw_only=True)
    cache_leftpad: Any = field(default=None, kw_only=True)
    rotary_cos: Any = field(default=None, kw_only=True)
    rotary_sin: Any = field(default=None, kw_only=True)
    rotary_interleaved: bool = field(default=True, kw_only=True)
    num_splits: int = field(default=0, kw_only=True)
    max_seqlen_k: int | None = field(default=None, kw_only=True)
    plan: StepPlan | None = field(default=None, kw_only=True)

    def _lowered(self) -> AttentionProblem:
        given = CacheArguments(
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            lengths=self.cache_seqlens,
            lengths_name="cache_seqlens",
            layout=self.layout,
            block_table=self.block_table,
            rows=self.cache_batch_idx,
            left_pad=self.cache_leftpad,
            k=self.k,
            v=self.v,
            rotary_cos=self.rotary_cos,
            rotary_sin=self.rotary_sin,
            rotary_interleaved=self.rotary_interleaved,
            max_seqlen_k=self.max_seqlen_k,
            num_splits=self.num_splits,
            plan=self.plan,
        )
        return cached_problem(self, given, self.q, self.cu_seqlens_q)
