"""The functional calls of the ``flash_attn`` package (2.8), name for name, position for position, default for default.

On top of those signatures every call takes, by keyword only, ``out`` (an array to be written), ``learned_sink``, ``sink_tokens``, and the
descales of fp8 arrays, which FlashAttention-3 has. An
argument that is not supported raises; none is ignored. ``deterministic`` asks for gradients that are bitwise equal from run to run, which
the forward always is. What differs from flash-attn is in docs/flash-attn-differences.md, argument by argument. Autograd of torch records
the calls: q, k, v and the learned sink get gradients, through o and through the LSE.

A call returns arrays of the library of q: torch, NumPy, CuPy, JAX, DeviceArray; for others, a NumPy array in host memory and a DeviceArray
on a GPU; or the caller's ``out``. Half of this file is overloads that say so to type checkers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol, SupportsIndex, TypeAlias, TypeVar, overload

from .arrays.new import check_can_copy, copy_into, in_library_of, pad_last, row_major, unbind
from .arrays.read import jax_array_of, read_array
from .arrays.torch_hooks import hooks, keep_out_of_graphs
from .errors import ShapeError
from .limits import HEAD_DIM_STEP, not_built
from .paged import PagedAttentionRequest
from .problem import ArrayInfo
from .requests.arguments import flag, mask_of, needs_padding, plain_length, softcap_of, step_up
from .requests.checks import check_out, refuse_fp8_gradients
from .requests.dense import DenseFwdRequest
from .requests.fp8 import Scales, fp8_of, is_fp8
from .requests.options import AttentionOptions, PositionBias
from .runtime.execute import execute
from .runtime.plan import Key
from .torch_ops.autograd import attend, is_recorded, without_history
from .torch_ops.repeat import Numbers, Others, Packing, remember, repeat
from .torch_ops.repeat_cache import CacheCall, remember_on_cache, repeat_on_cache
from .torch_ops.repeat_recorded import remember_recorded
from .torch_ops.traced import autocast, is_traced
from .varlen import CumulativeSeqlens, VarlenFwdRequest, forward_request

ArrayT = TypeVar("ArrayT")
# o, the LSE and the dropout pattern or None. The LSE is float32 whatever o is, so of an array type with elements it is another one.
Probs: TypeAlias = tuple[ArrayT, Any, Any]


class _Listed(Protocol):
    """A tensor or an array."""

    def tolist(self) -> Any: ...


Window: TypeAlias = Sequence[SupportsIndex] | _Listed
_NOTHING_NEW: Final = (None,) * 6  # neither rows, padding nor tokens that are written to pages

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


# fmt: off
@overload
def flash_attn_func(
    q: ArrayT, k: Any, v: Any, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ...,
    return_attn_probs: Literal[False] = ..., *, out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT: ...
@overload
def flash_attn_func(
    q: ArrayT, k: Any, v: Any, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ...,
    return_attn_probs: Literal[True] = ..., *, out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> Probs[ArrayT]: ...
@overload
def flash_attn_func(
    q: ArrayT, k: Any, v: Any, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: Window = ..., softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: bool = ...,
    *, out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT | Probs[ArrayT]: ...
# fmt: on
def flash_attn_func(
    q: ArrayT,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    out: ArrayT | None = None,
    learned_sink: Any = None,
    sink_tokens: int = 0,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> Any:
    """Attention of q over k and v (docs/semantics.md; FlashAttention-2, arXiv 2307.08691).

    Args:
        q: (B, Sq, Hq, D), float16 or bfloat16; on the CPU float32 and float64 too. D up to 256; no multiple of 8 is padded, with a copy.
            q, k and v whose last stride is another than 1 are copied too; other strides are free. fp8 in k and v, with fp8 or 16 bits in q
            and multiples of 16 as head dims: o has the type of ``out``, else that of q, or bfloat16 where q is fp8.
        k: (B, Sk, Hkv, D), Hq a multiple of Hkv: query head h reads KV head h // (Hq / Hkv).
        v: (B, Sk, Hkv, Dv).
        dropout_p: probability in [0, 1) that an attention weight is dropped.
        softmax_scale: factor on q.k, None is 1 / sqrt(D).
        causal: hide keys after the query's own position, aligned to the last key.
        window_size: (left, right) keys around the query's position, negative is unbounded. May be a tensor, or of tensors without
            dimensions; those on a GPU are waited for.
        softcap: c of c * tanh(s / c); 0 or less is none.
        alibi_slopes: float32 (Hq,) or (B, Hq).
        deterministic: True or False, whether gradients are to be bitwise equal from run to run; the forward always is.
        return_attn_probs: also return the LSE and the dropout pattern.
        out: (B, Sq, Hq, Dv) to be written.
        learned_sink: float32 (Hq,), exp(sink[h]) joins the denominator.
        sink_tokens: first keys that stay visible when the window has passed them.
        q_descale: float32 factor of fp8 elements of q: () for all, (B, Hkv), or (B, Hkv, ceil(Sq / 128)) for blocks of 128 tokens; any
            strides; None is 1.
        k_descale: the same of k, with Sk.
        v_descale: the same of v.

    Returns:
        o (B, Sq, Hq, Dv); with ``return_attn_probs`` (o, lse (B, Hq, Sq) float32, keep pattern (B, Hq, Sq, Sk) bool or None).

    Raises:
        ConstructionError: the subclass and the message say which argument is wrong.
        FeatureNotBuiltError: torch tensors that want second gradients, or those of slopes, or with fp8 any.
        ArchUnsupportedError: fp8 on a GPU before sm_89.
        RuntimeFlashAttnError: the GPU, the driver or the compiler failed.
    """
    numbers = (dropout_p, softmax_scale, causal, window_size, softcap, sink_tokens, return_attn_probs)
    if q_descale is not None or k_descale is not None or v_descale is not None:
        descales = (q_descale, k_descale, v_descale)
        return _attend_fp8(q, k, v, None, numbers, (alibi_slopes, learned_sink, out), deterministic, descales)
    return _attention(q, k, v, None, numbers, (alibi_slopes, learned_sink, out), deterministic)


# fmt: off
@overload
def flash_attn_qkvpacked_func(
    qkv: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ...,
    softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ...,
    softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: Literal[True] = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> Probs[ArrayT]: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ...,
    softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: bool = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT | Probs[ArrayT]: ...
# fmt: on
def flash_attn_qkvpacked_func(
    qkv: ArrayT,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    out: ArrayT | None = None,
    learned_sink: Any = None,
    sink_tokens: int = 0,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> ArrayT | Probs[ArrayT]:
    """:func:`flash_attn_func` on qkv (B, S, 3, H, D), read in place."""
    q, k, v = _unpack(qkv, "qkv", axis=2, parts=3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        out=out,
        learned_sink=learned_sink,
        sink_tokens=sink_tokens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


# fmt: off
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Any, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ...,
    softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT: ...
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Any, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ...,
    softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: Literal[True] = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> Probs[ArrayT]: ...
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Any, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ...,
    softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: bool = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT | Probs[ArrayT]: ...
# fmt: on
def flash_attn_kvpacked_func(
    q: ArrayT,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    out: ArrayT | None = None,
    learned_sink: Any = None,
    sink_tokens: int = 0,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> ArrayT | Probs[ArrayT]:
    """:func:`flash_attn_func` on q (B, Sq, Hq, D) and kv (B, Sk, 2, Hkv, D), read in place."""
    k, v = _unpack(kv, "kv", axis=2, parts=2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        out=out,
        learned_sink=learned_sink,
        sink_tokens=sink_tokens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


# fmt: off
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: SupportsIndex, max_seqlen_k: SupportsIndex,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ..., block_table: Any = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT: ...
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: SupportsIndex, max_seqlen_k: SupportsIndex,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: Literal[True] = ..., block_table: Any = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> Probs[ArrayT]: ...
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: SupportsIndex, max_seqlen_k: SupportsIndex,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: bool = ..., block_table: Any = ..., *,
    out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT | Probs[ArrayT]: ...
# fmt: on
def flash_attn_varlen_func(
    q: ArrayT,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: SupportsIndex,
    max_seqlen_k: SupportsIndex,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    *,
    out: ArrayT | None = None,
    learned_sink: Any = None,
    sink_tokens: int = 0,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> Any:
    """Attention over packed sequences; each query sees keys of its own sequence only.

    Args:
        q: (total_q, Hq, D).
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: int32 (B + 1,), where the sequences of q begin; starts at 0, ends at or before total_q. Rows of q past the end get
            o = 0 and an LSE of -inf. Values on a GPU are not looked at, except with ATOMR_FLASHATTN_DEBUG set.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: length of the longest sequence of q, or an upper bound; may be a tensor without dimensions, and is waited for when
            that is on a GPU.
        max_seqlen_k: the same for k and v.
        dropout_p: as in :func:`flash_attn_func`, and so are the ones that follow.
        softmax_scale: factor on q.k.
        causal: hide later keys, aligned to each sequence's last key.
        window_size: (left, right).
        softcap: c of c * tanh(s / c).
        alibi_slopes: float32 (Hq,) or (B, Hq).
        deterministic: as in :func:`flash_attn_func`.
        return_attn_probs: also return LSE and dropout pattern.
        block_table: int32 (B, entries): k and v are pages, (blocks, block size, Hkv, D) and (blocks, block size, Hkv, Dv), of any block
            size, and these are the pages of each sequence, whose length ``cu_seqlens_k`` says. Not with dropout, nor with gradients.
        out: (total_q, Hq, Dv) to be written.
        learned_sink: float32 (Hq,).
        sink_tokens: first keys of each sequence that stay visible.
        q_descale: as in :func:`flash_attn_func`; blocks of 128 tokens are counted inside each sequence, and there may be more than the
            longest one has. With ``block_table`` those of k and v may be (blocks, block size, Hkv), too.
        k_descale: the same of k.
        v_descale: the same of v.

    Returns:
        o (total_q, Hq, Dv); with ``return_attn_probs`` (o, lse (Hq, total_q) float32, keep pattern (B, Hq, max_seqlen_q, max_seqlen_k)
        bool or None).

    Raises:
        FeatureNotBuiltError: ``block_table`` with gradients, and all of :func:`flash_attn_func`.
    """
    numbers = (dropout_p, softmax_scale, causal, window_size, softcap, sink_tokens, return_attn_probs)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    descales = (q_descale, k_descale, v_descale)
    if block_table is not None:
        return _attend_pages(q, k, v, block_table, packing, numbers, (alibi_slopes, learned_sink, out), deterministic, descales)
    if q_descale is not None or k_descale is not None or v_descale is not None:
        return _attend_fp8(q, k, v, packing, numbers, (alibi_slopes, learned_sink, out), deterministic, descales)
    return _attention(q, k, v, packing, numbers, (alibi_slopes, learned_sink, out), deterministic)


# fmt: off
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayT, cu_seqlens: Any, max_seqlen: SupportsIndex, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ...,
    return_attn_probs: Literal[False] = ..., *, out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayT, cu_seqlens: Any, max_seqlen: SupportsIndex, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ...,
    return_attn_probs: Literal[True] = ..., *, out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> Probs[ArrayT]: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayT, cu_seqlens: Any, max_seqlen: SupportsIndex, dropout_p: float = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: Window = ..., softcap: float = ..., alibi_slopes: Any = ..., deterministic: bool = ...,
    return_attn_probs: bool = ..., *, out: ArrayT | None = ..., learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT | Probs[ArrayT]: ...
# fmt: on
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayT,
    cu_seqlens: Any,
    max_seqlen: SupportsIndex,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    out: ArrayT | None = None,
    learned_sink: Any = None,
    sink_tokens: int = 0,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> ArrayT | Probs[ArrayT]:
    """:func:`flash_attn_varlen_func` on qkv (total, 3, H, D), read in place."""
    q, k, v = _unpack(qkv, "qkv", axis=1, parts=3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        out=out,
        learned_sink=learned_sink,
        sink_tokens=sink_tokens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


# fmt: off
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: SupportsIndex, max_seqlen_k: SupportsIndex,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, out: ArrayT | None = ...,
    learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT: ...
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: SupportsIndex, max_seqlen_k: SupportsIndex,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: Literal[True] = ..., *, out: ArrayT | None = ...,
    learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> Probs[ArrayT]: ...
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: SupportsIndex, max_seqlen_k: SupportsIndex,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    alibi_slopes: Any = ..., deterministic: bool = ..., return_attn_probs: bool = ..., *, out: ArrayT | None = ...,
    learned_sink: Any = ..., sink_tokens: int = ...,
    q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ...
) -> ArrayT | Probs[ArrayT]: ...
# fmt: on
def flash_attn_varlen_kvpacked_func(
    q: ArrayT,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: SupportsIndex,
    max_seqlen_k: SupportsIndex,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    out: ArrayT | None = None,
    learned_sink: Any = None,
    sink_tokens: int = 0,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> ArrayT | Probs[ArrayT]:
    """:func:`flash_attn_varlen_func` on q (total_q, Hq, D) and kv (total_k, 2, Hkv, D), read in place."""
    k, v = _unpack(kv, "kv", axis=1, parts=2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        out=out,
        learned_sink=learned_sink,
        sink_tokens=sink_tokens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


def _attend_pages(
    q: Any,
    k: Any,
    v: Any,
    block_table: Any,
    packing: Packing,
    numbers: Numbers,
    others: Others,
    deterministic: bool,
    descales: Scales,
) -> Any:
    """Packed sequences of q, whose keys are pages."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packing
    dropout_p, softmax_scale, causal, window_size, softcap, sink_tokens, return_attn_probs = numbers
    slopes, learned_sink, out = others
    flag(deterministic, "deterministic")
    longest = plain_length(max_seqlen_q), plain_length(max_seqlen_k)
    beside = (None, block_table, *_NOTHING_NEW, cu_seqlens_q, cu_seqlens_k, slopes, learned_sink, *descales, out)
    call: CacheCall = (q, k, v), numbers, (None, *longest, None, *beside), None
    key, again = repeat_on_cache(call)
    if again is not None:
        return (*again, None) if return_attn_probs else again[0]
    lengths = CumulativeSeqlens(cu_seqlens_k, longest[1], name="cu_seqlens_k")
    if is_recorded(q, k, v, others):
        raise not_built("paged_backward", "got a block_table with a tensor that requires grad while gradients are enabled")
    request = PagedAttentionRequest(
        q,
        k,
        v,
        block_table,
        lengths,
        cu_seqlens_q=CumulativeSeqlens(cu_seqlens_q, longest[0], name="cu_seqlens_q"),
        mask=mask_of(window_size, causal=flag(causal, "causal")),
        bias=PositionBias(slopes),
        sink_tokens=sink_tokens,
        options=AttentionOptions(softmax_scale=softmax_scale, softcap=softcap_of(softcap), learned_sink=learned_sink, dropout_p=dropout_p),
        max_seqlen_k=lengths.longest,
        fp8=fp8_of(v, descales, out),
        out=out,
    )
    output, plan = execute(request, lse=flag(return_attn_probs, "return_attn_probs"))
    if key is not None:
        remember_on_cache(key, call, request, output, plan)
    return (output.out, output.lse, None) if return_attn_probs else output.out


def _attend_fp8(
    q: Any, k: Any, v: Any, packing: Packing | None, numbers: Numbers, others: Others, deterministic: bool, descales: Scales
) -> Any:
    """A call on fp8 arrays. It goes through a request every time: shortcuts have no descales, and operators of torch neither."""
    q, k, v = autocast(q, k, v) or (q, k, v)
    if packing is not None:
        packing = (*packing[:2], *map(plain_length, packing[2:]))
    return _first(_Call(q, k, v, numbers, others, flag(deterministic, "deterministic"), descales), packing, None)


keep_out_of_graphs((_attend_pages, _attend_fp8))


def _attention(q: Any, k: Any, v: Any, packing: Packing | None, numbers: Numbers, others: Others, deterministic: bool) -> Any:
    """Every functional call: traced by torch, or as one like it was answered before, or through a request."""
    if hooks.is_compiling():
        return _by_operator(q, k, v, packing, numbers, others, deterministic)
    if deterministic is not False:
        deterministic = flag(deterministic, "deterministic")
    if packing is not None and not type(packing[2]) is type(packing[3]) is int:
        packing = (*packing[:2], *map(_length, packing[2:]))
    key, result = repeat(q, k, v, packing, numbers, others, deterministic=deterministic)
    if result is not None:
        return result
    if is_traced(q, k, v, *others):
        return _by_operator(q, k, v, packing, numbers, others, deterministic)
    cast = autocast(q, k, v)
    if cast is not None:
        return _attention(*cast, packing, numbers, others, deterministic)
    return _first(_Call(q, k, v, numbers, others, deterministic), packing, key)


def _length(length: Any) -> Any:
    """As an int, except of a tensor that is traced, whose value is not known."""
    return length if is_traced(length) else plain_length(length)


def _by_operator(q: Any, k: Any, v: Any, packing: Packing | None, numbers: Numbers, others: Others, deterministic: bool) -> Any:
    from .torch_ops.traced import attend, is_fp8

    if is_fp8(q, k, v):
        return _attend_fp8(q, k, v, packing, numbers, others, deterministic, (None, None, None))
    return attend(q, k, v, packing, numbers, others, deterministic)


def _first(call: _Call, packing: Packing | None, key: Key | None) -> Any:
    """The way of a call that nothing is known of; ``key`` is for the shortcut that it leaves."""
    request = forward_request(
        call.arrays,
        packing,
        mask=call.mask,
        bias=call.bias,
        sink_tokens=call.sink_tokens,
        options=call.options,
        fp8=call.fp8,
        out=call.out,
    )
    return call.finish(request, key)


keep_out_of_graphs((_first,))  # Dynamo gave way to it; in frames below, arrays of NumPy would be its tensors, and no memory


class _Call:
    """A functional call on its way to a request: arguments in our terms, and the copies of arrays that flash-attn makes too.

    Those are of arrays whose last stride is another than 1, and, padded with zeros, of head dims that are no multiple of 8.
    """

    def __init__(
        self, q: Any, k: Any, v: Any, numbers: Numbers, others: Others, deterministic: bool, descales: Scales = (None, None, None)
    ) -> None:
        dropout_p, softmax_scale, causal, window_size, softcap, self.sink_tokens, return_attn_probs = numbers
        self.others = others
        slopes, learned_sink, self.out = others
        self.return_attn_probs = flag(return_attn_probs, "return_attn_probs")
        self.mask = mask_of(window_size, causal=flag(causal, "causal"))
        self.bias = PositionBias(slopes)
        infos = read_array(q, "q"), read_array(k, "k"), read_array(v, "v")
        self.arrays: tuple[Any, ...] = (q, k, v)
        self.q = infos[0]
        refuse_fp8_gradients(infos)
        self.fp8 = fp8_of(infos[2], descales, self.out)
        self.recorded = is_recorded(q, k, v, others)
        self.deterministic = deterministic
        self.copied = False
        self.copy_to: ArrayInfo | None = None
        self.v_head_dim = 0
        if all(info.shape for info in infos):
            pads = not is_fp8(infos[2]) and needs_padding(*(info.shape[-1] for info in infos))
            if pads and softmax_scale is None:
                softmax_scale = self.q.shape[-1] ** -0.5
            if pads or any(info.shape[-1] > 1 and info.strides[-1] != 1 for info in infos):
                self._copy(infos, pads=pads)
        self.inputs = (*self.arrays, learned_sink)
        if self.recorded:
            *arrays, learned_sink = without_history(self.inputs)
            self.arrays = tuple(arrays)
        self.options = AttentionOptions(
            softmax_scale=softmax_scale, softcap=softcap_of(softcap), learned_sink=learned_sink, dropout_p=dropout_p
        )

    def _copy(self, infos: tuple[ArrayInfo, ArrayInfo, ArrayInfo], *, pads: bool) -> None:
        """Zero columns change no product; those of v make columns of o that are cut off again."""
        self.copied = True
        q, v_head_dim = self.q, infos[2].shape[-1]
        if pads and v_head_dim % HEAD_DIM_STEP:
            self.v_head_dim = v_head_dim
            if self.out is not None:
                self.copy_to = check_out(self.out, (*q.shape[:-1], v_head_dim), infos)
                self.out = None
        if self.copy_to is not None:
            check_can_copy(self.copy_to, q)
        arrays: list[Any] = []
        for info, name in zip(infos, "qkv", strict=True):
            padded = pad_last(info, step_up(info.shape[-1]), name) if pads else info
            arrays.append(row_major(read_array(padded, name), name))
        self.arrays = tuple(arrays)

    def finish(self, request: DenseFwdRequest | VarlenFwdRequest, key: Key | None) -> Any:
        """Run the request, leave a shortcut for calls like it, and give the results the form that flash-attn gives them."""
        plan = None
        asked = None
        if self.recorded:
            output, plan, asked = attend(request, self.inputs, probs=self.return_attn_probs, deterministic=self.deterministic)
        else:
            output, plan = execute(request, lse=self.return_attn_probs, dropout_mask=self.return_attn_probs)
        if key is not None and plan is not None and not self.copied and request.problem.descales is None:
            if asked is None:
                remember(key, plan, output, brings_out=self.others[2] is not None)
            else:
                remember_recorded(key, plan, output, asked, gives_lse=self.return_attn_probs)
        results: tuple[Any, ...] = (output.out, output.lse, output.dropout_mask)
        if self.v_head_dim:
            out = output.out[..., : self.v_head_dim]
            results = (out if self.copy_to is None else copy_into(self.copy_to, out, self.others[2]), *results[1:])
        if self.copied and self.others[2] is None and jax_array_of(self.q) is not None:  # copies of its arrays are NumPy's
            results = tuple(each if each is None else in_library_of(self.q, read_array(each, "out")) for each in results)
        return results if self.return_attn_probs else results[0]


def _unpack(x: Any, name: str, *, axis: int, parts: int) -> tuple[Any, ...]:
    """Views of the parts of a packed array."""
    traced = hooks.is_compiling() or is_traced(x)
    info = x if traced else read_array(x, name)
    shape = tuple(info.shape)
    if len(shape) != axis + 3 or shape[axis] != parts:
        allowed = "(batch, length, " if axis == 2 else "(total, "
        raise ShapeError(f"{name}: got shape {shape}; allowed is {allowed}{parts}, heads, head dim)")
    return tuple(x.unbind(axis)) if traced else unbind(info, axis)
