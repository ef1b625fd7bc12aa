"""``flash_attn_with_kvcache`` of the ``flash_attn`` package (2.8), name for name, position for position, default for default.

On top come ``out``, ``learned_sink``, ``sink_tokens``, ``batch_invariant``, ``step_plan`` and descales, by keyword only. What differs from
flash-attn is in docs/flash-attn-differences.md, argument by argument.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

from .arrays.new import filled_int32
from .arrays.read import read_array
from .arrays.torch_hooks import keep_out_of_graphs
from .cached import CachedFwdRequest
from .errors import SeqLensError, ShapeError
from .functional import ArrayT, Window
from .limits import as_integer
from .requests.arguments import flag, mask_of, softcap_of
from .requests.fp8 import fp8_of
from .requests.options import AttentionOptions, PositionBias
from .requests.step_plan import StepPlan
from .runtime.execute import execute
from .torch_ops.repeat_cache import CacheCall, remember_on_cache, repeat_on_cache

__all__ = ["flash_attn_with_kvcache"]


# fmt: off
@overload
def flash_attn_with_kvcache(
    q: ArrayT, k_cache: Any, v_cache: Any, k: Any = ..., v: Any = ..., rotary_cos: Any = ..., rotary_sin: Any = ...,
    cache_seqlens: Any = ..., cache_batch_idx: Any = ..., cache_leftpad: Any = ..., block_table: Any = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: Any = ..., num_splits: int = ..., return_softmax_lse: Literal[False] = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ..., batch_invariant: bool = ...,
    step_plan: StepPlan | None = ..., q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT: ...
@overload
def flash_attn_with_kvcache(
    q: ArrayT, k_cache: Any, v_cache: Any, k: Any = ..., v: Any = ..., rotary_cos: Any = ..., rotary_sin: Any = ...,
    cache_seqlens: Any = ..., cache_batch_idx: Any = ..., cache_leftpad: Any = ..., block_table: Any = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: Any = ..., num_splits: int = ..., return_softmax_lse: bool = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ..., batch_invariant: bool = ...,
    step_plan: StepPlan | None = ..., q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT | tuple[ArrayT, Any]: ...
# fmt: on
def flash_attn_with_kvcache(
    q: ArrayT,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    out: ArrayT | None = None,
    learned_sink: Any = None,
    sink_tokens: int = 0,
    batch_invariant: bool = False,
    step_plan: StepPlan | None = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> Any:
    """Attention of q over a KV cache, contiguous or paged; new keys and values are written to it first (docs/semantics.md, KV caches).

    Args:
        q: (B, Sq, Hq, D), float16 or bfloat16; on the CPU float32 and float64 too. On a cache of fp8 it is fp8 or of 16 bits, and o
            has the type of ``out``, else that of q, or bfloat16 where q is fp8.
        k_cache: (rows, slots, Hkv, D); with ``block_table`` pages (blocks, block size, Hkv, D), of any block size. Written in place where
            there is a ``k``.
        v_cache: the same with Dv.
        k: (B, new, Hkv, D), new keys, which go to the slots from ``cache_seqlens`` on; None for none.
        v: (B, new, Hkv, Dv).
        rotary_cos: (positions, rotary dim / 2), of q's type or float32, with any even rotary dim up to D. Turns k by its slots, padding
            counted, and q from slot ``cache_seqlens`` on; without causal or a window all of q by slot ``cache_seqlens``. Needs ``k``.
        rotary_sin: the same.
        cache_seqlens: slots in use before new tokens, left padding counted: an integer, or int32 (B,). None is all slots, without ``k``.
            On a GPU values are not looked at: what does not fit is not written, and ``check`` tells (docs/semantics.md, KV caches).
        cache_batch_idx: int32 (B,), the row of the cache that each sequence has. Not with ``block_table``.
        cache_leftpad: int32 (B,), slots before the first key. Not with ``block_table``.
        block_table: int32 (B, entries), the pages of each sequence; entries past its length are not read, those outside of
            0..blocks - 1 are no keys.
        softmax_scale: factor on q.k, None is 1 / sqrt(D).
        causal: hide keys after the query's own position, aligned to the last key.
        window_size: (left, right) keys around the query's position, negative is unbounded.
        softcap: c of c * tanh(s / c); 0 or less is none.
        rotary_interleaved: whether element 2 i turns with 2 i + 1, or i with i + rotary dim / 2.
        alibi_slopes: float32 (Hq,) or (B, Hq).
        num_splits: parts that the keys of a row are cut into, 0 for as many as suit; at most 128.
        return_softmax_lse: also return the LSE.
        out: (B, Sq, Hq, Dv) to be written.
        learned_sink: float32 (Hq,), exp(sink[h]) joins the denominator.
        sink_tokens: first keys that stay visible when the window has passed them.
        batch_invariant: whether a row's bits may not depend on batch, length of q, pages or chunks.
        step_plan: a StepPlan, which cuts the keys by the lengths on the device; without ``num_splits``.
        q_descale: float32 factor of fp8 elements of q: () for all, (B, Hkv), or (B, Hkv, blocks) for blocks of 128 tokens; any strides;
            None is 1.
        k_descale: the same of ``k_cache``, whose blocks are counted from the first key of each sequence; with ``block_table`` it may be
            (blocks, block size, Hkv), too. A 16-bit ``k`` is quantised by it; one by slots is made on the way, and written.
        v_descale: the same of ``v_cache``.

    Returns:
        o (B, Sq, Hq, Dv); with ``return_softmax_lse`` (o, lse (B, Hq, Sq) float32).

    Raises:
        ConstructionError: the subclass and the message say which argument is wrong; the cache is as it was.
        FeatureNotBuiltError: torch tensors that want gradients; fp8 on a GPU without a kernel.
    """
    alone = cache_seqlens is None or type(cache_seqlens) is int
    call: CacheCall = (
        (q, k_cache, v_cache),
        (0.0, softmax_scale, causal, window_size, softcap, sink_tokens, return_softmax_lse),
        (
            *(cache_seqlens if alone else None, num_splits, rotary_interleaved, batch_invariant),
            *(None if alone else cache_seqlens, block_table, cache_batch_idx, cache_leftpad, k, v, rotary_cos, rotary_sin, None, None),
            *(alibi_slopes, learned_sink, q_descale, k_descale, v_descale, out),
        ),
        step_plan,
    )
    key, again = repeat_on_cache(call)
    if again is not None:
        return again if return_softmax_lse else again[0]
    queries = read_array(q, "q")
    if len(queries.shape) != 4:
        raise ShapeError(f"q: got shape {queries.shape}; allowed is (batch, length, heads, head dim)")
    request = CachedFwdRequest(
        q,
        k_cache,
        v_cache,
        _lengths(cache_seqlens, q, k_cache, block_table, appends=k is not None),
        k,
        v,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=flag(rotary_interleaved, "rotary_interleaved"),
        num_splits=num_splits,
        mask=mask_of(window_size, causal=flag(causal, "causal")),
        bias=PositionBias(alibi_slopes),
        sink_tokens=sink_tokens,
        options=AttentionOptions(
            softmax_scale=softmax_scale,
            softcap=softcap_of(softcap),
            learned_sink=learned_sink,
            batch_invariant=flag(batch_invariant, "batch_invariant"),
        ),
        fp8=fp8_of(v_cache, (q_descale, k_descale, v_descale), out),
        out=out,
        plan=step_plan,
    )
    output, plan = execute(request, lse=flag(return_softmax_lse, "return_softmax_lse"))
    if key is not None:
        remember_on_cache(key, call, request, output, plan)
    return (output.out, output.lse) if return_softmax_lse else output.out


def _lengths(cache_seqlens: Any, q: Any, k_cache: Any, block_table: Any, *, appends: bool) -> Any:
    """Lengths as an array: one number is that of every sequence, None all slots."""
    alone = as_integer(cache_seqlens)
    if cache_seqlens is not None and alone is None:
        return cache_seqlens
    cache, queries = read_array(k_cache, "k_cache"), read_array(q, "q")
    table = None if block_table is None else read_array(block_table, "block_table")
    if len(cache.shape) != 4 or (table is not None and len(table.shape) != 2):
        raise ShapeError(
            f"k_cache, block_table: got shapes {cache.shape} and {table and table.shape}; allowed are (rows or blocks, slots, KV heads, "
            "head dim), and (batch, blocks) or None"
        )
    slots = cache.shape[1] * (1 if table is None else table.shape[1])
    if alone is None:
        if appends:
            raise SeqLensError(
                "cache_seqlens: got None with k, which goes behind the slots in use; allowed is their number, an integer or int32 (batch,)"
            )
        alone = slots
    if not 0 <= alone <= slots:
        raise SeqLensError(f"cache_seqlens: got {alone}; allowed are 0..{slots}, the slots of a sequence")
    if queries.device.kind == "cpu":
        return np.full(queries.shape[0], alone, np.int32)
    return filled_int32(queries.shape[0], alone, q)


keep_out_of_graphs((flash_attn_with_kvcache,))
