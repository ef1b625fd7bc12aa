"""What requests on a KV cache share: their arguments, the checks of these, and the normal form of a call on a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..arrays.read import dtype_name_of, read_array, share_memory, why_not_written
from ..arrays.streams import copy_to_host
from ..env import settings
from ..errors import (
    BlockTableError,
    CuSeqlensError,
    DropoutError,
    DTypeError,
    OutputError,
    RotaryError,
    SeqLensError,
    ShapeError,
    SplitError,
    StepPlanError,
    StrideError,
)
from ..limits import FP8_DTYPES, GPU_DTYPES, MAX_LENGTH, MAX_SPLITS, as_integer
from ..problem import ArrayInfo, AttentionProblem, KvCache, NewTokens, Rotary, Strides
from ..reference.cache import read_values
from ..runtime.staleness import arrays_beside
from ..types import DType, KvLayout
from .checks import check_apart, check_device, check_qkv, is_contiguous, overlaps_itself, read_int32, refuse_gradients, steps
from .seqlens import CumulativeSeqlens, check_seqlens
from .step_plan import PLAN_NAMES, StepPlan

if TYPE_CHECKING:
    from .forward import ForwardRequest

__all__ = ["CacheArguments", "cached_problem"]

_PAGED: Final = "(blocks, block size, KV heads, head dim), or (blocks, KV heads, block size, head dim) with KvLayout.HND"
_CONTIGUOUS: Final = "(rows, slots, KV heads, head dim)"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheArguments:
    """A cache and what goes into it, as a request was given them. Shapes and errors: CachedFwdRequest.

    ``cu_seqlens_new``: of new tokens that are packed.
    ``lengths``: an array, or a CumulativeSeqlens; ``lengths_name``: what messages call it.
    """

    k_cache: Any
    v_cache: Any
    lengths: Any
    lengths_name: str = "seq_lens"
    layout: Any = KvLayout.NHD
    block_table: Any = None
    rows: Any = None
    left_pad: Any = None
    k: Any = None
    v: Any = None
    cu_seqlens_new: CumulativeSeqlens | None = None
    rotary_cos: Any = None
    rotary_sin: Any = None
    rotary_interleaved: bool = True
    max_seqlen_k: Any = None
    num_splits: Any = 0
    plan: Any = None


def cached_problem(request: ForwardRequest, given: CacheArguments, q: Any, cu_seqlens_q: CumulativeSeqlens | None) -> AttentionProblem:
    """The normal form of a call of ``request`` on a cache. Values in host memory are looked at, and nothing is written.

    Raises:
        ConstructionError: the subclass says which argument is wrong.
    """
    info = _read_queries(q, cu_seqlens_q)
    k, v = (_read_cache(array, name, given) for array, name in ((given.k_cache, "k_cache"), (given.v_cache, "v_cache")))
    k_slots, v_slots = _slots_first(k, given.layout), _slots_first(v, given.layout)
    check_qkv(info, k_slots, v_slots, names=("k_cache", "v_cache"))
    if v_slots.shape[:2] != k_slots.shape[:2]:
        raise ShapeError(
            f"v_cache: got {v_slots.shape[:2]} blocks and slots with {k_slots.shape[:2]} in k_cache; allowed are equal numbers"
        )
    batch = info.shape[0] if cu_seqlens_q is None else cu_seqlens_q.batch
    cache = _cache(given, info, (k_slots, v_slots), batch)
    if cache.new is not None:
        _check_written(info, k, v, cache.new)
    longest = None if given.max_seqlen_k is None else as_integer(given.max_seqlen_k)
    if given.max_seqlen_k is not None and (longest is None or not 0 <= longest <= MAX_LENGTH):
        raise SeqLensError(f"max_seqlen_k: got {given.max_seqlen_k!r}; allowed is an integer in 0..{MAX_LENGTH}, or None")
    options = request._options_for(info, batch, on_cache=True)  # noqa: SLF001 - its base is in this room
    if options["dropout"] is not None:
        raise DropoutError(
            f"dropout_p: got {options['dropout'].p} with a KV cache; allowed is 0, because a cache serves and does not train"
        )
    problem = AttentionProblem(
        q=info,
        k=k,
        v=v,
        q_strides=Strides(*steps(info)) if cu_seqlens_q is None else Strides(0, *steps(info)),
        k_strides=Strides(*steps(k_slots)),
        v_strides=Strides(*steps(v_slots)),
        heads_kv=k_slots.shape[2],
        seqlen_q=info.shape[1] if cu_seqlens_q is None else cu_seqlens_q.longest,
        seqlen_k=cache.capacity if longest is None else longest,
        v_head_dim=v.shape[3],
        cu_seqlens_q=None if cu_seqlens_q is None else cu_seqlens_q.array,
        cu_seqlens_k=given.lengths.array if isinstance(given.lengths, CumulativeSeqlens) else None,
        cache=cache,
        num_splits=_check_splits(given.num_splits, batch_invariant=options["batch_invariant"]),
        **options,
    )
    for name, written in (("k_cache", k), ("v_cache", v)) if cache.new is not None else ():
        check_apart(written, arrays_beside(problem), name)
    if info.device.kind == "cpu" or settings().debug:
        values = read_values(problem, copy_to_host)
        if longest is not None and values.after.size and values.after.max() > longest:
            raise SeqLensError(
                f"max_seqlen_k: got {longest}, and a sequence has {values.after.max()} tokens; allowed is at least the longest"
            )
    return _with_plan(problem, given.plan)


def _with_plan(problem: AttentionProblem, plan: Any) -> AttentionProblem:
    """``problem`` in the blocks of a StepPlan.

    Raises:
        StepPlanError: no StepPlan, or one for other calls.
    """
    if plan is None:
        return problem
    if not isinstance(plan, StepPlan):
        raise StepPlanError(f"{PLAN_NAMES}: got {type(plan).__qualname__}; allowed is a StepPlan, or None")
    return plan.adopt(problem)


def _check_splits(num_splits: Any, *, batch_invariant: bool) -> int:
    """The number of splits, 0 for as many as suit.

    Raises:
        SplitError: no integer in 0..MAX_SPLITS, or more than one with ``batch_invariant``.
    """
    count = as_integer(num_splits)
    if count is None or not 0 <= count <= MAX_SPLITS:
        raise SplitError(f"num_splits: got {num_splits!r}; allowed is an integer in 0..{MAX_SPLITS}, 0 for as many as suit")
    if batch_invariant and count > 1:
        raise SplitError(
            f"num_splits: got {count} with batch_invariant=True; allowed are 0 and 1, because sums depend on where keys are cut"
        )
    return count


def _slots_first(info: ArrayInfo, layout: KvLayout) -> ArrayInfo:
    """A description of a cache in the order of NHD, to be checked and stepped through, not to be kept."""
    if layout is KvLayout.NHD:
        return info
    shape, strides = ((x[0], x[2], x[1], x[3]) for x in (info.shape, info.strides))
    return ArrayInfo(info.ptr, shape, strides, info.dtype, info.dtype_name, info.device, info.source)


def _read_queries(q: Any, cu_seqlens_q: CumulativeSeqlens | None) -> ArrayInfo:
    info = read_array(q, "q")
    rank, layout = (4, "(batch, length, heads, head dim)") if cu_seqlens_q is None else (3, "(total, heads, head dim) with cu_seqlens_q")
    if len(info.shape) != rank:
        raise ShapeError(f"q: got shape {info.shape} of rank {len(info.shape)}; allowed is rank {rank}, {layout}")
    refuse_gradients(info, "q", on_cache=True)
    if cu_seqlens_q is None:
        if info.shape[1] > MAX_LENGTH:
            raise ShapeError(f"q: got length {info.shape[1]}; allowed is at most {MAX_LENGTH} tokens")
        return info
    check_seqlens(cu_seqlens_q, "cu_seqlens_q", info, info)
    if cu_seqlens_q.batch == 0 and info.shape[0]:
        raise CuSeqlensError(f"cu_seqlens_q: got no sequences with {info.shape[0]} rows in q; allowed is one sequence at least")
    return info


def _read_cache(array: Any, name: str, given: CacheArguments) -> ArrayInfo:
    layout = given.layout
    if not isinstance(layout, KvLayout):
        raise BlockTableError(f"layout: got {layout!r}; allowed are KvLayout.NHD and KvLayout.HND")
    if layout is not KvLayout.NHD and given.block_table is None:
        raise BlockTableError(f"layout: got {layout} with a contiguous cache; allowed is KvLayout.NHD; pages may have the other")
    info = read_array(array, name)
    refuse_gradients(info, name, on_cache=True)
    if len(info.shape) != 4:
        raise ShapeError(f"{name}: got shape {info.shape}; allowed is {_CONTIGUOUS if given.block_table is None else _PAGED}")
    slots = _slots_first(info, layout).shape[1]
    if slots < 1 and given.block_table is not None:
        raise ShapeError(f"{name}: got blocks of {slots} slots; allowed is one at least")
    return info


def _cache(given: CacheArguments, q: ArrayInfo, slots: tuple[ArrayInfo, ArrayInfo], batch: int) -> KvCache:
    """Tables, lengths and new tokens; values are not looked at. ``slots``: k and v of the cache in the order of NHD."""
    k, _ = slots
    lengths: ArrayInfo | None = None
    if isinstance(given.lengths, CumulativeSeqlens):
        _check_cumulative(given.lengths, q, batch)
    else:
        lengths = read_int32(given.lengths, given.lengths_name, (batch,), q, SeqLensError)
    if given.block_table is not None:
        for name, value in (("cache_batch_idx", given.rows), ("cache_leftpad", given.left_pad)):
            if value is not None:
                raise BlockTableError(f"{name}: got an array with a block_table; allowed is None: a table has neither rows nor padding")
        blocks = read_int32(given.block_table, "block_table", (batch, None), q, BlockTableError)
    elif given.rows is not None:
        blocks = read_int32(given.rows, "cache_batch_idx", (batch,), q, BlockTableError)
    else:
        blocks = None
        if k.shape[0] < batch:
            raise ShapeError(f"k_cache: got {k.shape[0]} rows for {batch} sequences; allowed is a row for each, or cache_batch_idx")
    cache = KvCache(
        num_blocks=k.shape[0],
        block_size=k.shape[1],
        layout=given.layout,
        blocks=blocks,
        lengths=lengths,
        left_pad=None if given.left_pad is None else read_int32(given.left_pad, "cache_leftpad", (batch,), q, SeqLensError),
        new=_new_tokens(given, q, slots, batch),
        lengths_name=given.lengths_name,
    )
    if cache.new is not None and cache.new.longest > cache.capacity:
        advice = "; reserve pages for them before block_table is made" if cache.paged else ""
        raise SeqLensError(f"k: got {cache.new.longest} new tokens; allowed are at most {cache.capacity}, the slots of a sequence{advice}")
    return cache


def _check_cumulative(lengths: CumulativeSeqlens, q: ArrayInfo, batch: int) -> None:
    """Lengths of a cache as offsets: they end anywhere, because nothing is packed."""
    check_device(lengths.array, "cu_seqlens_k", q)
    if lengths.batch != batch:
        raise CuSeqlensError(f"cu_seqlens_k: got {lengths.batch} sequences with {batch} in q; allowed are equal numbers of sequences")


def _new_tokens(given: CacheArguments, q: ArrayInfo, slots: tuple[ArrayInfo, ArrayInfo], batch: int) -> NewTokens | None:
    if given.k is None and given.v is None:
        if given.rotary_cos is not None or given.rotary_sin is not None:
            raise RotaryError("rotary_cos: got cos or sin without new keys; allowed with k and v, whose slots are the positions")
        return None
    if given.k is None or given.v is None:
        raise ShapeError(f"{'k' if given.k is None else 'v'}: got None; allowed are new k and v together, or neither")
    k, v = read_array(given.k, "k"), read_array(given.v, "v")
    packed = given.cu_seqlens_new
    rank, heads_kv, width = 4 if packed is None else 3, slots[0].shape[2], slots[1].shape[3]
    for name, info in (("k", k), ("v", v)):
        refuse_gradients(info, name, on_cache=True)
        if len(info.shape) != rank:
            raise ShapeError(f"{name}: got shape {info.shape}; allowed is rank {rank}, (batch, new tokens, KV heads, head dim)")
    _check_types_of_new(q, (k, v), slots)
    check_qkv(q, k, v, dtypes=False)
    if k.shape[-2] != heads_kv or v.shape[-1] != width:
        raise ShapeError(
            f"k, v: got {k.shape[-2]} KV heads and v head dim {v.shape[-1]}; allowed are those of the cache, {heads_kv} and {width}"
        )
    if v.shape[:-1] != k.shape[:-1] or (packed is None and k.shape[0] != batch):
        raise ShapeError(f"k, v: got shapes {k.shape} and {v.shape} and a batch of {batch}; allowed are that batch and equal tokens")
    return NewTokens(
        k=k,
        v=v,
        k_strides=Strides(*steps(k)) if packed is None else Strides(0, *steps(k)),
        v_strides=Strides(*steps(v)) if packed is None else Strides(0, *steps(v)),
        longest=k.shape[1] if packed is None else packed.longest,
        cu_seqlens=None if packed is None else packed.array,
        rotary=_rotary(given, q, k),
    )


def _check_types_of_new(q: ArrayInfo, new: tuple[ArrayInfo, ArrayInfo], slots: tuple[ArrayInfo, ArrayInfo]) -> None:
    """New tokens have the types of their cache and are copied; those of an fp8 cache may share one of 16 bits, that of a 16-bit q."""
    types = tuple(info.dtype for info in new)
    own = tuple(info.dtype for info in slots)
    quantised = slots[1].dtype in FP8_DTYPES
    wide = (q.dtype,) if q.dtype in GPU_DTYPES else GPU_DTYPES
    if types == own or (quantised and types[0] is types[1] and types[0] in wide):
        return
    also = f", or {' or '.join(map(dtype_name_of, wide))} in both, which is quantised on the way" if quantised else ""
    raise DTypeError(
        f"k, v: got types {new[0].dtype_name} and {new[1].dtype_name}; allowed are those of the cache, {slots[0].dtype_name} and "
        f"{slots[1].dtype_name}{also}"
    )


def _rotary(given: CacheArguments, q: ArrayInfo, k: ArrayInfo) -> Rotary | None:
    if given.rotary_cos is None and given.rotary_sin is None:
        return None
    for name, info in (("q", q), ("k", k)):
        if info.dtype is not None and info.dtype.is_fp8:
            raise RotaryError(
                f"rotary_cos: got it with {info.dtype_name} in {name}; allowed is 16 bits, because fp8 is not turned; turn {name} before "
                "it is quantised"
            )
    if given.rotary_cos is None or given.rotary_sin is None:
        raise RotaryError(f"rotary_{'cos' if given.rotary_cos is None else 'sin'}: got None; allowed are cos and sin together, or neither")
    cos, sin = read_array(given.rotary_cos, "rotary_cos"), read_array(given.rotary_sin, "rotary_sin")
    for name, info in (("rotary_cos", cos), ("rotary_sin", sin)):
        refuse_gradients(info, name, on_cache=True)
        if info.dtype not in {q.dtype, DType.F32}:
            own = "" if q.dtype is DType.F32 else f"that of q, {q.dtype_name}, and "
            raise DTypeError(f"{name}: got type {info.dtype_name}; allowed is {own}float32; convert {name}")
        check_device(info, name, q)
        if len(info.shape) != 2 or not 1 <= 2 * info.shape[1] <= q.shape[-1]:
            raise RotaryError(
                f"{name}: got shape {info.shape}; allowed is (positions, rotary dim / 2) with a rotary dim of at most {q.shape[-1]}, "
                "the head dim"
            )
        if not is_contiguous(info):
            raise StrideError(f"{name}: got strides {info.strides}; allowed is a row-major array; call .contiguous()")
    if (cos.shape, cos.dtype) != (sin.shape, sin.dtype):
        raise RotaryError(
            f"rotary_sin: got {sin.dtype_name} {sin.shape} with {cos.dtype_name} {cos.shape} in rotary_cos; allowed are equal ones"
        )
    return Rotary(cos=cos, sin=sin, interleaved=given.rotary_interleaved)


def _check_written(q: ArrayInfo, k: ArrayInfo, v: ArrayInfo, new: NewTokens) -> None:
    """A cache that new tokens are written to lies apart from what is read meanwhile."""
    for name, info, other in (("k_cache", k, v), ("v_cache", v, k)):
        reason = why_not_written(info)
        if reason:
            raise OutputError(f"{name}: got {reason}; allowed is a writeable array, because new tokens are written to it; pass a copy")
        if overlaps_itself(info) or share_memory(info, other):
            raise OutputError(f"{name}: got elements that share memory, or that of the other cache; allowed is an array of its own")
        if any(share_memory(info, each) for each in (q, new.k, new.v)):
            raise OutputError(
                f"{name}: got memory of q, k or v, which is read while new tokens are written; allowed is an array of its own"
            )
