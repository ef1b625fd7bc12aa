"""Chunked prefill: ChunkLayout says which part of a prompt a chunk is, ChunkedPrefillRequest is one call on chunks and decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .arrays.new import int32_like
from .arrays.read import read_array
from .errors import ChunkLayoutError, ShapeError, WindowError
from .limits import MAX_LENGTH, as_integer
from .problem import AttentionProblem
from .requests.forward import ForwardRequest
from .requests.kv_cache import CacheArguments, cached_problem
from .requests.options import MaskKind
from .requests.seqlens import CumulativeSeqlens
from .requests.step_plan import StepPlan

__all__ = ["ChunkLayout", "ChunkedPrefillRequest"]


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """One chunk of a prompt: ``chunk_q_tokens`` new tokens behind the ``prefix_kv_tokens`` that are in the cache already.

    A decode is ``ChunkLayout(1, tokens_in_cache)``.

    Attributes:
        chunk_q_tokens: new tokens, at least one.
        prefix_kv_tokens: tokens of the sequence in the cache before this chunk.
        total_chunks: chunks of the prompt.
        chunk_index: which of them this is, from 0.

    Raises:
        ChunkLayoutError: a number outside its range, or a later chunk without a token before it.
    """

    chunk_q_tokens: int
    prefix_kv_tokens: int = 0
    total_chunks: int = 1
    chunk_index: int = 0

    def __post_init__(self) -> None:
        for name, least in (("chunk_q_tokens", 1), ("prefix_kv_tokens", 0), ("total_chunks", 1), ("chunk_index", 0)):
            given = getattr(self, name)
            number = as_integer(given)
            if number is None or not least <= number <= MAX_LENGTH:
                raise ChunkLayoutError(f"{name}: got {given!r}; allowed is an integer in {least}..{MAX_LENGTH}")
            object.__setattr__(self, name, number)
        if self.chunk_index >= self.total_chunks:
            raise ChunkLayoutError(
                f"chunk_index: got {self.chunk_index} of {self.total_chunks} chunks; allowed are 0..{self.total_chunks - 1}"
            )
        if self.prefix_kv_tokens < self.chunk_index:
            raise ChunkLayoutError(
                f"prefix_kv_tokens: got {self.prefix_kv_tokens} before chunk {self.chunk_index}; "
                "allowed is a token at least of each chunk before it"
            )

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with this chunk, so that its last row predicts a token."""
        return self.chunk_index == self.total_chunks - 1

    @classmethod
    def cut(cls, tokens: int, chunk_tokens: int, prefix_kv_tokens: int = 0) -> tuple[ChunkLayout, ...]:
        """The chunks of a prompt of ``tokens``, each of ``chunk_tokens`` but the last, behind ``prefix_kv_tokens``.

        Raises:
            ChunkLayoutError: a number that is no integer, or too small.
        """
        for name, given, least in (("tokens", tokens, 1), ("chunk_tokens", chunk_tokens, 1), ("prefix_kv_tokens", prefix_kv_tokens, 0)):
            number = as_integer(given)
            if number is None or number < least:
                raise ChunkLayoutError(f"{name}: got {given!r}; allowed is an integer >= {least}")
        total = -(-tokens // chunk_tokens)
        return tuple(
            cls(min(chunk_tokens, tokens - start), prefix_kv_tokens + start, total, index)
            for index, start in enumerate(range(0, tokens, chunk_tokens))
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ChunkedPrefillRequest(ForwardRequest):
    """A call on packed chunks of prompts and decodes, whose K and V are written to a contiguous cache first.

    A prompt in chunks gives what it gives in one call, so the mask hides later tokens. With a paged cache a chunk is a
    PagedAttentionRequest. Meaning: docs/semantics.md, KV caches.

    Attributes:
        q: (total, Hq, D), the new tokens of all sequences, one after the other.
        k: (total, Hkv, D).
        v: (total, Hkv, Dv).
        k_cache: (rows, slots, Hkv, D), written in place; one of fp8 gets tokens of 16 bits quantised.
        v_cache: (rows, slots, Hkv, Dv).
        chunks: a ChunkLayout for each sequence, in the order of q.
        cache_batch_idx: int32 (B,), the row of the cache that each sequence has; None is row b.
        rotary_cos, rotary_sin, rotary_interleaved, num_splits, plan: as in CachedFwdRequest.
        mask: causal unless given; hides tokens after the query's own.
        bias, sink_tokens, options, fp8, out, problem, out_array, plan_key: as in ForwardRequest; dropout is refused.

    Raises:
        ChunkLayoutError: chunks that do not add up to the rows of q.
        WindowError: a mask that shows later tokens.
        SeqLensError: more tokens than the cache has slots.
        StepPlanError: a plan for other calls.
        ConstructionError: another subclass says which argument is wrong; nothing has been written.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and out

    q: Any
    k: Any
    v: Any
    k_cache: Any
    v_cache: Any
    chunks: Sequence[ChunkLayout] = field(kw_only=True)
    cache_batch_idx: Any = field(default=None, kw_only=True)
    rotary_cos: Any = field(default=None, kw_only=True)
    rotary_sin: Any = field(default=None, kw_only=True)
    rotary_interleaved: bool = field(default=True, kw_only=True)
    num_splits: int = field(default=0, kw_only=True)
    plan: StepPlan | None = field(default=None, kw_only=True)
    mask: MaskKind = field(default=MaskKind.causal(), kw_only=True)

    def _lowered(self) -> AttentionProblem:
        q = read_array(self.q, "q")
        if len(q.shape) != 3:
            raise ShapeError(f"q: got shape {q.shape} of rank {len(q.shape)}; allowed is rank 3, (total, heads, head dim)")
        given: Any = self.chunks
        if not isinstance(given, Sequence) or not all(isinstance(each, ChunkLayout) for each in given):
            raise ChunkLayoutError(f"chunks: got {given!r}; allowed is a ChunkLayout for each sequence, in a list")
        object.__setattr__(self, "chunks", tuple(given))  # the caller's list may change
        rows = sum(each.chunk_q_tokens for each in self.chunks)
        if rows != q.shape[0]:
            raise ChunkLayoutError(
                f"chunks: got {rows} tokens in {len(self.chunks)} chunks for {q.shape[0]} rows of q; allowed is a row each"
            )
        if getattr(self.mask, "right", 0) != 0:
            raise WindowError(f"mask: got {self.mask}, which shows tokens of later chunks; allowed are causal masks, as MaskKind.causal()")
        ends = CumulativeSeqlens.from_lengths([each.chunk_q_tokens for each in self.chunks], like=self._like())
        prefixes = np.array([each.prefix_kv_tokens for each in self.chunks], np.int32)
        arguments = CacheArguments(
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            lengths=int32_like(prefixes, self._like()),
            lengths_name="chunks",
            rows=self.cache_batch_idx,
            k=self.k,
            v=self.v,
            cu_seqlens_new=ends,
            rotary_cos=self.rotary_cos,
            rotary_sin=self.rotary_sin,
            rotary_interleaved=self.rotary_interleaved,
            num_splits=self.num_splits,
            plan=self.plan,
        )
        return cached_problem(self, arguments, self.q, ends)

    def _like(self) -> Any:
        """Whose library offsets are made in: any in host memory reads those of NumPy."""
        return None if read_array(self.q, "q").device.kind == "cpu" else self.q
