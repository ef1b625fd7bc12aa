"""PagedAttentionRequest: one forward call over pages that hold all tokens already, new ones among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import BlockTableError
from ..problem import AttentionProblem
from ..requests.forward import ForwardRequest
from ..requests.kv_cache import CacheArguments, cached_problem
from ..requests.seqlens import CumulativeSeqlens
from ..requests.step_plan import StepPlan
from ..types import KvLayout

__all__ = ["PagedAttentionRequest"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PagedAttentionRequest(ForwardRequest):
    """Attention of q over a paged KV cache: one query a sequence to decode, more to verify a speculation or to prefill a chunk.

    Meaning: docs/semantics.md, KV caches. The queries of a sequence are aligned to its last keys, so their own K and V are in the cache.

    Attributes:
        q: (B, Sq, Hq, D), or packed (total_q, Hq, D) with ``cu_seqlens_q``.
        k_cache: (blocks, block size, Hkv, D), or (blocks, Hkv, block size, D) with ``layout`` HND; of q's type, or of fp8.
        v_cache: the same with Dv.
        block_table: int32 (B, entries), the pages of each sequence. Entries past the length are not read; those outside of
            0..blocks - 1 are no keys.
        seq_lens: int32 (B,), tokens of each sequence, new ones counted; or a CumulativeSeqlens, whose differences they are.
        cu_seqlens_q: where the sequences of a packed q begin.
        layout: order of dimensions of the pages.
        num_splits: parts that the keys of a row are cut into, 0 for as many as suit; at most 128.
        max_seqlen_k: upper bound of the lengths; None is what the table has room for.
        plan: a StepPlan, which cuts the keys by the lengths on the device; without ``num_splits``.
        mask, bias, sink_tokens, options, fp8, out, problem, out_array, plan_key: as in ForwardRequest; dropout is refused.

    Raises:
        SeqLensError: lengths (those in host memory are looked at) that are negative, or more than the table has slots.
        StepPlanError: a plan for other calls.
        BlockTableError: a table or a layout that does not fit.
        ConstructionError: another subclass says which argument is wrong; nothing has been written.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and out

    q: Any
    k_cache: Any
    v_cache: Any
    block_table: Any
    seq_lens: Any
    cu_seqlens_q: CumulativeSeqlens | None = field(default=None, kw_only=True)
    layout: KvLayout = field(default=KvLayout.NHD, kw_only=True)
    num_splits: int = field(default=0, kw_only=True)
    max_seqlen_k: int | None = field(default=None, kw_only=True)
    plan: StepPlan | None = field(default=None, kw_only=True)

    def _lowered(self) -> AttentionProblem:
        if self.block_table is None:
            raise BlockTableError("block_table: got None; allowed is int32 (batch, entries), the pages of each sequence")
        given = CacheArguments(
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            lengths=self.seq_lens,
            layout=self.layout,
            block_table=self.block_table,
            max_seqlen_k=self.max_seqlen_k,
            num_splits=self.num_splits,
            plan=self.plan,
        )
        return cached_problem(self, given, self.q, self.cu_seqlens_q)
