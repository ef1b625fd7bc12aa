"""lookup: from a key to the kernel that does what it asks, or to a refusal by name.

A key carries values (this window, that ratio). A spec carries only what changes machine code, so many keys share one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, TypeVar

from ..errors import ArchUnsupportedError, DispatchError
from ..kernels.attention import AttentionSpec
from ..kernels.dropout_mask import DropoutMaskSpec
from ..kernels.fa2_bwd import Fa2BackwardSpec
from ..kernels.fa2_fwd import Fa2ForwardSpec
from ..kernels.fa3_fp8 import Fa3Fp8ForwardSpec, fp8_width, has_sum_columns
from ..kernels.fa3_fp8_kvcache import Fa3Fp8KvCacheSpec
from ..kernels.fa3_fwd import WARPGROUP_ROWS, Fa3ForwardSpec
from ..kernels.fa3_kvcache import Fa3KvCacheSpec
from ..kernels.forward import ForwardSpec
from ..kernels.fp8_kvcache import FP8_PRODUCTS, Fp8KvCacheSpec, Fp8ScheduledKvCacheSpec
from ..kernels.kvcache import Fa2KvCacheSpec
from ..kernels.merge_states import MergeStatesSpec
from ..kernels.spec import Family, KernelSpec, Tile
from ..kernels.step import ScheduledKvCacheSpec
from ..limits import BEFORE_FP8, FP8_HEAD_DIM_STEP, FP8_OUT_DTYPES, GPU_DTYPES, dtypes_of, merged_dtypes_of, not_built
from ..tiles.saved import forget_saved_tiles, saved_tile
from ..tiles.space import misfit
from ..tiles.tables import (
    backward_tile_for,
    cache_tile_for,
    fp8_cache_tile_for,
    fp8_wgmma_tile_for,
    head_dim_width,
    invariant_tile_for,
    step_tile_for,
    tile_for,
    wgmma_cache_tile_for,
    wgmma_tile_for,
)
from ..types import DType, ScaleUnit, SmArch
from .key import DispatchKey, Extras

__all__ = ["CpuSpec", "forget_lookups", "lookup"]

_Spec = TypeVar("_Spec", bound=AttentionSpec)
_BEFORE_WGMMA: Final = frozenset({SmArch.SM_80, SmArch.SM_86, SmArch.SM_89, SmArch.SM_90})


@dataclass(frozen=True, slots=True)
class CpuSpec:
    """What ``lookup`` gives for ``SmArch.CPU``: the reference backend, which is one piece of code for every key."""

    dtype: DType

    @property
    def kernel_name(self) -> str:
        """Name in tables and results."""
        return "reference_cpu"

    @property
    def arch(self) -> SmArch:
        """Always ``SmArch.CPU``."""
        return SmArch.CPU


def lookup(key: DispatchKey) -> KernelSpec | CpuSpec:
    """The kernel that does what ``key`` asks.

    Raises:
        ArchUnsupportedError: the arch cannot do it, in this version or a later one.
        FeatureNotBuiltError: this version does not do it; names the feature.
        DispatchError: no key, or a tile that the kernel cannot have.
    """
    if not isinstance(key, DispatchKey):
        raise DispatchError(f"key: got {type(key).__qualname__}; allowed is a DispatchKey")
    return _resolve(key)


def forget_lookups() -> None:
    """Resolve every key anew, with the tiles that are saved by now. Plans keep the kernels that they were made with."""
    forget_saved_tiles()
    _resolve.cache_clear()


@lru_cache(maxsize=4096)
def _resolve(key: DispatchKey) -> KernelSpec | CpuSpec:
    _refuse(key)
    _refuse_schedule(key)
    if key.arch is SmArch.CPU:
        return CpuSpec(key.dtype)
    if key.extras.direction == "dropout_mask":
        return DropoutMaskSpec(arch=key.arch.without_wgmma, varlen=key.varlen)
    if key.extras.direction == "merge_states":
        return MergeStatesSpec(arch=key.arch.without_wgmma, dtype=key.dtype, aligned=key.aligned)
    spec = _with_chosen_tile(_kernel(key), key.extras)
    if spec.shared_memory > key.arch.shared_memory_per_block:
        tile_arch = key.extras.tiles_for or key.arch
        raise ArchUnsupportedError(
            f"tiles_for: the tile of {tile_arch.value} needs {spec.shared_memory} bytes of shared memory; "
            f"{key.arch.value} allows {key.arch.shared_memory_per_block} per block; borrow the tiles of an arch with no more memory"
        )
    return spec


def _kernel(key: DispatchKey) -> ForwardSpec | Fa2BackwardSpec | Fa2KvCacheSpec | Fa3KvCacheSpec:
    if key.extras.direction == "bwd":
        return _backward(key)
    extras = key.extras
    cached = key.paged or extras.kv_cache
    reads_fp8 = key.v_dtype.is_fp8 and key.family is Family.FA2
    return _over_cache(key) if cached or extras.batch_invariant or extras.split or reads_fp8 else _forward(key)


def _over_cache(key: DispatchKey) -> Fa2KvCacheSpec | Fa3KvCacheSpec:
    """The kernel over a KV cache that answers ``key``; its ``steps()`` are what is launched.

    It answers calls on plain K and V that are batch-invariant, whose keys are split, or whose fp8 is read by mma.sync.
    """
    plain = not (key.paged or key.extras.kv_cache)
    width, v_width, arch, extras = head_dim_width(key.head_dim), head_dim_width(key.v_head_dim), key.arch.without_wgmma, key.extras
    if key.family is Family.FA3 and key.v_dtype.is_fp8:
        return _fp8_wgmma(key, Fa3Fp8KvCacheSpec, paged=key.paged, split=extras.split)
    if key.family is Family.FA3:
        features = {"alibi": key.alibi, "softcap": extras.softcap > 0}
        tile = wgmma_cache_tile_for(width, v_width, **features, short_q=extras.short_q, few_rows=extras.few_rows)
        tile = replace(tile, persistent=extras.persistent is not False)
        fields = _features(key, width, v_width) | {"pack_gqa": key.packs_heads, "paged": key.paged, "split": extras.split}
        return Fa3KvCacheSpec(arch=key.arch, tile=tile, plain_kv=plain, **fields)
    fp8, features = key.k_dtype.is_fp8, _features(key, width, v_width)
    if extras.batch_invariant:
        choose = invariant_tile_for
    elif extras.scheduled:
        choose = step_tile_for
    else:
        choose = fp8_cache_tile_for if fp8 else cache_tile_for
    tile = choose(extras.tiles_for or arch, width, v_width, extras.cache_rows)
    if extras.scheduled:
        spec = ScheduledKvCacheSpec.resident(arch=arch, tile=tile, paged=key.paged, **features)
        # A plan has one tile for all layers, and as many blocks, whatever their types.
        return Fp8ScheduledKvCacheSpec(arch=arch, tile=spec.tile, paged=key.paged, **features | _fp8_fields(key)) if fp8 else spec
    kind = Fp8KvCacheSpec if fp8 else Fa2KvCacheSpec
    return kind(
        arch=arch,
        tile=tile,
        paged=key.paged,
        split=extras.split,
        batch_invariant=extras.batch_invariant,
        plain_kv=plain,
        **features | (_fp8_fields(key) if fp8 else {}),
    )


def _fp8_fields(key: DispatchKey) -> dict[str, Any]:
    """Types other than that of q, whose descales are those of tokens, and how fp8 is multiplied."""
    types = {"k_dtype": key.k_dtype, "v_dtype": key.v_dtype, "out_dtype": key.out_dtype}
    scales = {"k_token_scales": key.extras.k_descale, "v_token_scales": key.extras.v_descale}
    return (
        {name: None if dtype is key.dtype else dtype for name, dtype in types.items()}
        | {name: unit is ScaleUnit.TOKEN for name, unit in scales.items()}
        | {"fp8_products": key.dtype.is_fp8 and (key.extras.tiles_for or key.arch) in FP8_PRODUCTS}
    )


def _forward(key: DispatchKey) -> ForwardSpec:
    """The forward kernel of the family that answers ``key``, with the tile of the package."""
    if key.v_dtype.is_fp8:
        return _fp8_wgmma(key, Fa3Fp8ForwardSpec)
    width, v_width = head_dim_width(key.head_dim), head_dim_width(key.v_head_dim)
    wgmma = key.family is Family.FA3
    kind: type[ForwardSpec] = Fa3ForwardSpec if wgmma else Fa2ForwardSpec
    return kind(
        arch=key.arch if wgmma else key.arch.without_wgmma,
        tile=_wgmma_tile(key, width, v_width) if wgmma else _mma_tile(key, width, v_width),
        pack_gqa=key.packs_heads,
        **_features(key, width, v_width),
    )


def _fp8_wgmma(key: DispatchKey, kind: type[_Spec], **fields: Any) -> _Spec:
    """The kernel of this kind of fp8 q, k and v. Over a cache a tile has keys of which pages are whole parts."""
    width, v_width, extras = fp8_width(key.head_dim), fp8_width(key.v_head_dim), key.extras
    blocks = ScaleUnit.BLOCK in {extras.q_descale, extras.k_descale, extras.v_descale}
    crowded = key.alibi or extras.softcap > 0
    on_blocks = blocks or key.paged or extras.kv_cache
    single_level = extras.single_level and not blocks  # O has another unit in each block: one level gains nothing there
    sums = has_sum_columns(key.v_dtype, single_level=single_level, block_descales=blocks)
    tile = fp8_wgmma_tile_for(width, v_width, crowded=crowded, blocks=on_blocks, single_level=single_level, sums=sums)
    tile = replace(tile, persistent=extras.persistent is not False)
    named = (("k_dtype", key.k_dtype), ("v_dtype", key.v_dtype), ("out_dtype", key.out_dtype))
    fields |= {name: dtype for name, dtype in named if dtype is not key.dtype}
    fields |= _features(key, width, v_width) | {"pack_gqa": key.packs_heads, "block_descales": blocks, "single_level": single_level}
    return kind(arch=key.arch, tile=tile, **fields)


def _backward(key: DispatchKey) -> Fa2BackwardSpec:
    """The backward kernel that answers ``key``; its ``steps()`` are what is launched."""
    width, v_width, arch = head_dim_width(key.head_dim), head_dim_width(key.v_head_dim), key.arch.without_wgmma
    crowded = key.extras.softcap > 0 or key.extras.dropout
    tile = backward_tile_for(key.extras.tiles_for or arch, width, v_width, crowded=crowded)
    features, extras = _features(key, width, v_width), key.extras
    return Fa2BackwardSpec(arch=arch, tile=tile, deterministic=extras.deterministic, head_split=extras.head_split, **features)


def _features(key: DispatchKey, width: int, v_width: int) -> dict[str, Any]:
    """The fields of an ``AttentionSpec`` that say what is computed, forward or backward."""
    extras = key.extras
    return {
        "dtype": key.dtype,
        "head_dim": width,
        "v_head_dim": v_width,
        "exact_head_dim": (width, v_width) == (key.head_dim, key.v_head_dim),
        "aligned": key.aligned,
        "left_bound": key.left_bound,
        "right_bound": key.right_bound,
        "sink_tokens": key.sink > 0,
        "alibi": key.alibi,
        "softcap": extras.softcap > 0,
        "scale_first": extras.scale_first,
        "learned_sink": extras.learned_sink,
        "dropout": extras.dropout,
        "varlen": key.varlen,
    }


def _with_chosen_tile(spec: _Spec, extras: Extras) -> _Spec:
    """``spec`` with the tile that the key names, else the one that was tuned for it on this machine, else its own."""
    if extras.batch_invariant:  # tuned tiles cut keys in other places
        return spec
    short_q = extras.short_q and isinstance(spec, ForwardSpec)
    rows = extras.cache_rows if isinstance(spec, Fa2KvCacheSpec) else WARPGROUP_ROWS if extras.few_rows and spec.family is Family.FA3 else 0
    kept = None if extras.tiles_for or extras.scheduled else saved_tile(spec, short_q=short_q, cache_rows=rows)
    tile = extras.tile or kept
    if tile is None:
        return spec
    if extras.persistent is not None and "persistent" in spec.AXES:
        tile = replace(tile, persistent=extras.persistent)
    chosen = replace(spec, tile=tile)
    reason = misfit(chosen)
    if reason:
        raise DispatchError(f"tile: got {tile} for {spec.kernel_name}; {reason}")
    return chosen


def _wgmma_tile(key: DispatchKey, width: int, v_width: int) -> Tile:
    extras = key.extras
    features = {"dropout": extras.dropout, "alibi": key.alibi, "softcap": extras.softcap > 0}
    tile = wgmma_tile_for(width, v_width, **features, short_q=extras.short_q, few_rows=extras.few_rows)
    return replace(tile, persistent=extras.persistent is not False)


def _mma_tile(key: DispatchKey, width: int, v_width: int) -> Tile:
    extras = key.extras
    tile_arch = extras.tiles_for or key.arch.without_wgmma
    tile = tile_for(tile_arch, width, v_width, dropout=extras.dropout, plain=_is_plain(key, width, v_width))
    return replace(tile, persistent=extras.persistent is True)


def _is_plain(key: DispatchKey, width: int, v_width: int) -> bool:
    """What :func:`~..tiles.tables.tile_for` calls plain: nothing needs registers beside the products and the softmax."""
    extras = key.extras
    masked = key.left_bound or key.right_bound or extras.dropout
    scored = key.alibi or extras.softcap > 0 or extras.scale_first
    whole = (key.head_dim, key.v_head_dim) == (width, v_width) and key.aligned
    return whole and not (masked or scored or key.varlen)


def _refuse_schedule(key: DispatchKey) -> None:
    extras = key.extras
    if extras.scheduled and (extras.split or extras.batch_invariant or not (key.paged or extras.kv_cache)):
        beside = "split" if extras.split else "batch_invariant" if extras.batch_invariant else "no KV cache"
        raise DispatchError(f"scheduled: got a StepPlan with {beside}; allowed is a KV cache whose keys are cut by lengths alone")
    if extras.scheduled and (extras.tile or extras.tiles_for):  # its memory has the size that its own tile needs
        beside = "tiles_for" if extras.tiles_for else f"tile {extras.tile}"
        raise DispatchError(f"scheduled: got a StepPlan with {beside}; allowed is the tile that the plan was made for")


def _refuse(key: DispatchKey) -> None:
    """Features of the design that this version does not have, and element types that the arch does not take."""
    extras, arch = key.extras, key.arch
    _refuse_fp8(key)
    fp8 = key.v_dtype.is_fp8
    gpu, cached = arch is not SmArch.CPU, key.paged or extras.kv_cache
    fp8_wgmma = fp8 and key.family is Family.FA3
    if gpu and fp8:
        _refuse_fp8_on_gpu(key)
    unbuilt = (
        (gpu and extras.split and not cached and (extras.direction != "fwd" or extras.dropout or fp8_wgmma), "split", ""),
        (gpu and extras.left_pad and not extras.kv_cache, "left_pad", ""),
        (extras.kv_layout not in {"NHD", "HND"}, "kv_layout", f"got {extras.kv_layout!r}"),
        (cached and extras.direction == "bwd", "paged_backward", ""),
        (not fp8 and key.k_dtype is not key.dtype, "k_dtype", ""),
        (not fp8 and key.v_dtype is not key.dtype, "v_dtype", ""),
        (not fp8 and key.out_dtype is not key.dtype, "out_dtype", ""),
    )
    for asked, feature, got in unbuilt:
        if asked:
            raise not_built(feature, got)
    if extras.batch_invariant:
        _refuse_invariant(key)
    if cached:
        _refuse_on_cache(key)
    if extras.family is Family.FA3 and extras.direction == "bwd":
        raise not_built("fa3_backward")
    if extras.tiles_for in {SmArch.CPU, SmArch.SM_90A}:
        raise ArchUnsupportedError(f"tiles_for: got {extras.tiles_for.value}; allowed are the architectures of the mma.sync family")
    if extras.family is Family.FA3 and arch in _BEFORE_WGMMA:
        raise ArchUnsupportedError(
            f"family: got fa3 on {arch.value}, which has no wgmma; allowed are sm_90a and, resolved to mma.sync, sm_100 and sm_120; "
            "use an Fa2FwdRequest"
        )
    _refuse_dtype(key)


def _refuse_on_cache(key: DispatchKey) -> None:
    if key.extras.dropout:
        raise DispatchError(
            "dropout: got dropout with a KV cache, which decodes; allowed is none; K and V of a training step are plain arrays"
        )
    if key.paged and (key.extras.left_pad or key.extras.kv_cache):
        raise DispatchError("left_pad: got left padding or rows of a contiguous cache with pages; allowed is one of the two kinds of cache")


def _refuse_dtype(key: DispatchKey) -> None:
    direction = key.extras.direction
    allowed = merged_dtypes_of(key.arch) if direction == "merge_states" else dtypes_of(key.arch)
    if key.dtype not in allowed and not (key.v_dtype.is_fp8 and direction == "fwd"):
        names = ", ".join(dtype.value for dtype in allowed)
        raise ArchUnsupportedError(
            f"dtype: got {key.dtype.value} on {key.arch.value}; allowed there are {names}; convert, or run on the CPU backend"
        )


def _refuse_fp8(key: DispatchKey) -> None:
    """Types that do not go together, descales of other types, and what a call with fp8 has not."""
    extras, types = key.extras, {"q": key.dtype, "k": key.k_dtype, "v": key.v_dtype}
    for name, dtype in types.items():
        if getattr(extras, f"{name}_descale") is not None and not dtype.is_fp8:
            raise DispatchError(f"{name}_descale: got one with {dtype.value} in {name}; allowed is None, because only fp8 is scaled")
    if not any(dtype.is_fp8 for dtype in (*types.values(), key.out_dtype)):
        if extras.single_level:
            raise DispatchError(f"single_level: got it with {key.dtype.value}; allowed with fp8, whose sums have two levels")
        return
    if extras.direction == "bwd":
        raise not_built("fp8_backward", f"got {key.dtype.value}")
    if extras.dropout:
        raise DispatchError("dropout: got dropout with fp8, which has no backward to drop for; allowed is none")
    q_fits = key.dtype.is_fp8 or key.dtype in GPU_DTYPES
    if not (q_fits and key.k_dtype.is_fp8 and key.v_dtype.is_fp8 and key.out_dtype in FP8_OUT_DTYPES):
        got = ", ".join(dtype.value for dtype in (*types.values(), key.out_dtype))
        raise DispatchError(
            f"dtype: got {got} in q, k, v and o; "
            "allowed is one type, or fp8 in k and v with fp8, f16 or bf16 in q and f16, bf16 or f32 in o"
        )
    if extras.direction == "fwd" and (key.head_dim % FP8_HEAD_DIM_STEP or key.v_head_dim % FP8_HEAD_DIM_STEP):
        raise DispatchError(
            f"head_dim: got {key.head_dim} and {key.v_head_dim} with fp8; allowed are multiples of {FP8_HEAD_DIM_STEP}; pad with zeros"
        )


def _refuse_fp8_on_gpu(key: DispatchKey) -> None:
    """What fp8 kernels have not."""
    extras, arch = key.extras, key.arch
    if arch in BEFORE_FP8:
        raise ArchUnsupportedError(f"dtype: got {key.v_dtype.value} on {arch.value}, which has no fp8; allowed are sm_89 and later")
    for name, unit in (("k_descale", extras.k_descale), ("v_descale", extras.v_descale)):
        if unit is ScaleUnit.TOKEN and not key.paged:
            raise DispatchError(f"{name}: got those of tokens without pages; allowed are those of all elements, heads or blocks")
    if extras.v_descale is ScaleUnit.TOKEN and extras.batch_invariant:
        raise not_built("invariant_token_scales")


def _refuse_invariant(key: DispatchKey) -> None:
    """What a batch-invariant call has not."""
    extras = key.extras
    if key.arch is not SmArch.CPU and (extras.family is Family.FA3 or extras.dropout):
        raise not_built("fa3_batch_invariant" if extras.family is Family.FA3 else "invariant_dropout")
    if extras.split:
        raise DispatchError("split: got split KV with batch_invariant; allowed is one of the two, as sums depend on where keys are cut")
    if extras.direction == "bwd" or extras.tile is not None:
        got = "a backward" if extras.direction == "bwd" else f"tile {extras.tile}"
        raise DispatchError(f"batch_invariant: got it with {got}; allowed is a forward with the tile of the package, which fixes its sums")
