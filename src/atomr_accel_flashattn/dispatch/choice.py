"""From a problem to its key: the one place that chooses family, packing of query heads, tile for short q, and persistence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from ..errors import ShapeError
from ..kernels.fa2_bwd import Fa2BackwardSpec
from ..kernels.fa3_fwd import WARPGROUP_ROWS
from ..kernels.fa3_kvcache import Fa3KvCacheSpec, pages_fit_boxes, wgmma_splits_for
from ..kernels.kvcache import splits_for
from ..kernels.merge_states import States
from ..kernels.spec import Family, KernelSpec, Tile
from ..launch.driver import device_properties
from ..limits import HEAD_DIM_STEP, MAX_GRID, MAX_HEAD_DIM, VECTOR_BYTES
from ..problem import ArrayInfo, AttentionProblem, BackwardProblem, GradientArrays, StepShape
from ..tiles.tables import are_few_rows, cache_rows, is_short_q
from ..types import Device, DType, KvLayout, SmArch
from .arch import best_arch
from .key import DispatchKey, Extras
from .resolve import lookup

__all__ = ["head_splits_of", "key_of_backward", "key_of_merge", "key_of_problem", "key_of_step", "splits_of", "step_blocks"]

# Kernels that take the maximum of raw scores divide slopes by the scale and multiply infinity by it: in float32 the scale must be neither 0
# nor so small that a slope overflows.
_SMALL_SCALE: Final = 2.0**-60
_LONGEST_TMA_STRIDE: Final = 1 << 40  # bytes
_MOST_ROWS: Final = MAX_GRID - 1023  # of packed heads: kernels count rows, and the rest of a tile, in 32 bits


def key_of_problem(
    problem: AttentionProblem,
    arch: SmArch,
    out: ArrayInfo | None = None,
    family: Family | None = None,
    *,
    persistent: bool | None = None,
    persistent_blocks: int | None = None,
    tile: Tile | None = None,
    may_split: bool = True,
) -> DispatchKey:
    """The key of a problem on ``arch``, with every choice made: ``lookup`` names the kernel that runs.

    Args:
        problem: checked inputs.
        arch: where it runs.
        out: where o goes, when the caller brought it; it counts for the alignment.
        family: the family that is wanted, None is the best one of the arch.
        persistent: whether blocks take tile after tile; None: where there are more tiles than SMs. On another GPU than that of the arrays,
            whose SMs are not known, None stays open, and means yes in the wgmma family.
        persistent_blocks: how many persistent blocks the caller wants.
        tile: how the work is cut, None for the tile that lookup finds. Plain K and V are then not split, as it is of another kernel.
        may_split: whether the keys of plain K and V may be split, with a workspace and a second launch.
    """
    key = _asked(problem, arch, out, family)
    if arch is SmArch.CPU:
        return key
    reads_fp8 = problem.descales is not None and key.family is Family.FA2
    if problem.cache is not None or problem.batch_invariant or reads_fp8:
        may_split = may_split and (tile is None or problem.cache is not None)
        return _on_cache(problem, key, tile, family, may_split=may_split)
    may_pack = _rows_can_be_packed(problem, key)
    packs = key.packs_heads and may_pack
    choices = replace(_of_rows(problem, key.extras, problem.seqlen_q * (key.gqa_ratio if packs else 1)), pack_gqa=may_pack, tile=tile)
    choices = replace(choices, persistent=persistent, persistent_blocks=persistent_blocks)
    key = replace(key, extras=choices)
    if persistent is None and _runs_here(problem.q.device, arch):
        spec = lookup(key)
        if isinstance(spec, KernelSpec):
            key = replace(key, extras=replace(choices, persistent=_is_persistent(spec, problem)))
        if may_split and tile is None and key.family is Family.FA3 and problem.dropout is None and not key.v_dtype.is_fp8:
            return _split_where_few(problem, key)
    return key


def _split_where_few(problem: AttentionProblem, key: DispatchKey) -> DispatchKey:
    """``key``, or that of the kernel that splits plain K and V, where tiles are so few that it is faster by what a second launch costs."""
    key_of_split = replace(key, extras=replace(key.extras, split=True, persistent=None))
    spec = lookup(key_of_split)
    if not isinstance(spec, Fa3KvCacheSpec):
        return key
    splits = splits_of(problem, spec)
    if splits == 1:
        return key
    return replace(key_of_split, extras=replace(key_of_split.extras, persistent=_is_persistent(spec, problem, splits)))


def _on_cache(problem: AttentionProblem, key: DispatchKey, tile: Tile | None, family: Family | None, *, may_split: bool) -> DispatchKey:
    """The kernel over a cache; keys are split where the GPU of the arrays has more SMs than there are tiles.

    It answers calls on plain K and V, too, that are batch-invariant, or whose fp8 is read by mma.sync. ``family``: what the caller wants.
    """
    if problem.seqlen_q * key.gqa_ratio > _MOST_ROWS:
        raise ShapeError(
            f"q: got length {problem.seqlen_q} with {key.gqa_ratio} query heads a KV head, whose rows are counted together; "
            f"allowed are {_MOST_ROWS} of them"
        )
    scheduled = problem.step is not None
    key = _family_on_cache(problem, key, family)
    rows = cache_rows(problem.seqlen_q * key.gqa_ratio) if key.family is Family.FA2 else key.extras.cache_rows
    key = replace(key, extras=replace(key.extras, cache_rows=rows, tile=tile, scheduled=scheduled))
    if scheduled:
        return key
    if not may_split or not _runs_here(problem.q.device, key.arch):
        return key
    spec = lookup(key)
    if not isinstance(spec, KernelSpec):
        return key
    splits = splits_of(problem, spec)
    persistent = _is_persistent(spec, problem, splits) if key.family is Family.FA3 else None
    return replace(key, extras=replace(key.extras, split=splits > 1, persistent=persistent))


def _family_on_cache(problem: AttentionProblem, key: DispatchKey, family: Family | None) -> DispatchKey:
    """Wgmma where the rows of a KV head fill a warpgroup, and TMA can gather the keys; mma.sync for fewer rows, as in decoding.

    The bits of batch-invariant calls depend on no length of q, so they have one family. The blocks of a StepPlan are of mma.sync.
    """
    mma_sync = replace(key, extras=replace(key.extras, family=Family.FA2))
    if problem.batch_invariant:  # lookup refuses another family by name
        return mma_sync if family is None else key
    if problem.cache is None or problem.step is not None:
        return mma_sync
    wgmma = replace(key, extras=replace(key.extras, pack_gqa=_rows_can_be_packed(problem, key)))
    rows = problem.seqlen_q * (key.gqa_ratio if wgmma.packs_heads else 1)
    gathers = pages_fit_boxes(problem.cache) and problem.cache.num_blocks > 0
    if wgmma.family is Family.FA3 and gathers and rows >= WARPGROUP_ROWS:
        return replace(wgmma, extras=_of_rows(problem, wgmma.extras, rows))
    return mma_sync


def _of_rows(problem: AttentionProblem, extras: Extras, rows: int) -> Extras:
    """With what the number of ``rows`` of a KV head, or of a query head by itself, says about the tile of wgmma."""
    few = extras.family is Family.FA3 and are_few_rows(rows, problem.seqlen_k)
    return replace(extras, short_q=is_short_q(problem.head_dim, problem.v_head_dim, rows), few_rows=few)


def splits_of(problem: AttentionProblem, spec: KernelSpec) -> int:
    """Parts that ``spec`` cuts the keys of a cache into, on the GPU of the arrays."""
    tiles, multiprocessors = spec.work_tiles(problem), device_properties(problem.q.device.index).multiprocessors
    if isinstance(spec, Fa3KvCacheSpec):
        return wgmma_splits_for(problem, tiles, spec.tile.block_n, multiprocessors)
    return splits_for(problem, tiles, multiprocessors)


def key_of_step(shape: StepShape, arch: SmArch) -> DispatchKey:
    """The key of the calls of a StepPlan, as far as they have it in common: the tile and the mask are those of all."""
    left, right = (-1 if side is None else side for side in (shape.band.left, shape.band.right))
    ratio = shape.heads // shape.heads_kv
    return DispatchKey(
        arch=arch,
        dtype=DType.F16,
        head_dim=shape.head_dim,
        causal=shape.band.right == 0,
        varlen=shape.packed_q,
        sliding_window=None if left < 0 and right <= 0 else (left, right),
        sink=shape.band.sink_tokens,
        gqa_ratio=ratio,
        paged=True,
        extras=Extras(v_head_dim=shape.v_head_dim, family=Family.FA2, cache_rows=cache_rows(shape.seqlen_q * ratio), scheduled=True),
    )


def step_blocks(device: Device, spec: KernelSpec) -> int:
    """Blocks of a StepPlan: as many as the SMs hold at a time."""
    return spec.grid(1, device_properties(device.index).multiprocessors)


def key_of_backward(problem: BackwardProblem, gradients: GradientArrays, arch: SmArch) -> DispatchKey:
    """The key of a backward problem on ``arch``: that of the mma.sync family, which has the only backward, on every GPU.

    Every array that has strides of its own counts for the alignment. ``gradients``: where the caller wants them. Without queries nothing is
    added to dQ, in no order: then there is no block of bwd_preprocess either, which would set the counters of a deterministic call.

    Blocks share keys where the GPU of the arrays has more SMs than there are tiles of keys, so to say (``head_splits`` of the kernel).
    """
    key = _asked(problem.forward, arch, None, None if arch is SmArch.CPU else Family.FA2)
    known = problem.forward
    arrays = (known.q, known.k, known.v, problem.out, problem.dout, *gradients)
    align = _load_align([array for array in arrays if array is not None])
    deterministic = problem.deterministic and known.seqlen_q > 0
    key = replace(key, extras=replace(key.extras, direction="bwd", load_align=align, deterministic=deterministic))
    if key.gqa_ratio > 1 and _runs_here(known.q.device, arch):
        spec = lookup(key)
        split = isinstance(spec, Fa2BackwardSpec) and head_splits_of(known, spec) > 1
        key = replace(key, extras=replace(key.extras, head_split=split))
    return key


def head_splits_of(problem: AttentionProblem, spec: Fa2BackwardSpec) -> int:
    """Blocks of ``spec`` that share a tile of keys, on the GPU of the arrays."""
    return spec.head_splits(problem, device_properties(problem.q.device.index).multiprocessors)


def key_of_merge(states: States, arch: SmArch) -> DispatchKey:
    """The key of two states that are merged on ``arch``. Columns are no head dim that a product has, and may have any number."""
    out = states.out
    assert out.dtype is not None  # noqa: S101 - merge_states has checked it
    neighbours = all(each.strides[-1] == 1 for each in states.outputs)
    row = out.shape[-1] * out.dtype.itemsize
    align = _load_align(list(states.outputs)) if neighbours and row % VECTOR_BYTES == 0 else 1
    width = min(MAX_HEAD_DIM, max(1, -(-out.shape[-1] // HEAD_DIM_STEP)) * HEAD_DIM_STEP)
    return DispatchKey(arch, out.dtype, width, extras=Extras(direction="merge_states", load_align=align))


def _asked(problem: AttentionProblem, arch: SmArch, out: ArrayInfo | None, family: Family | None) -> DispatchKey:
    """What is asked, and the family that does it: on sm_90a mma.sync where TMA cannot step through the arrays."""
    band, cache = problem.band, problem.cache
    left, right = (-1 if side is None else side for side in (band.left, band.right))
    assert problem.q.dtype is not None  # noqa: S101 - requests have checked it
    inputs = (problem.q, problem.k, problem.v)
    align = _load_align([*inputs, *([out] if out is not None else [])])
    if arch is SmArch.SM_90A and not (align % VECTOR_BYTES == 0 and all(map(_tma_can_read, inputs))):
        family = Family.FA2
    return DispatchKey(
        arch=arch,
        dtype=problem.q.dtype,
        head_dim=problem.head_dim,
        causal=band.right == 0,
        varlen=problem.is_varlen,
        sliding_window=None if left < 0 and right <= 0 else (left, right),
        alibi=problem.alibi_slopes is not None,
        sink=band.sink_tokens,
        gqa_ratio=problem.heads // problem.heads_kv,
        paged=cache is not None and cache.paged,
        extras=Extras(
            v_head_dim=None if problem.v_head_dim == problem.head_dim else problem.v_head_dim,
            **_types(problem),
            softcap=problem.softcap,
            dropout=problem.dropout is not None,
            learned_sink=problem.learned_sink is not None,
            split=problem.num_splits > 1,
            kv_cache=cache is not None and not cache.paged,
            kv_layout=KvLayout.NHD.value if cache is None else cache.layout.value,
            left_pad=cache is not None and cache.left_pad is not None,
            batch_invariant=problem.batch_invariant,
            load_align=align,
            scale_first=problem.softmax_scale < _SMALL_SCALE,
            family=family or (Family.FA3 if arch is SmArch.SM_90A else Family.FA2 if arch is not SmArch.CPU else None),
        ),
    )


def _types(problem: AttentionProblem) -> dict[str, Any]:
    """Types other than that of q, descales, and how P V is summed, of a call with fp8 K and V."""
    if problem.descales is None:
        return {}
    q, types = problem.q.dtype, (problem.k.dtype, problem.v.dtype, problem.out_dtype)
    found = {name: None if dtype is q else dtype for name, dtype in zip(("k_dtype", "v_dtype", "out_dtype"), types, strict=True)}
    units = {f"{name}_descale": each and each.unit for name, each in zip("qkv", problem.descales, strict=True)}
    return found | units | {"single_level": problem.single_level}


def _rows_can_be_packed(problem: AttentionProblem, key: DispatchKey) -> bool:
    """Whether 32 bits count the rows of all heads of a group, and a tensor map can step from one of these heads to the next."""
    return problem.seqlen_q * key.gqa_ratio <= _MOST_ROWS and problem.q_strides.head != 0


def _runs_here(device: Device, arch: SmArch) -> bool:
    """Whether arrays on ``device`` are computed with kernels for ``arch``, so that its SMs count."""
    return device.kind == "cuda" and arch is best_arch(device)


def _is_persistent(spec: KernelSpec, problem: AttentionProblem, splits: int = 1) -> bool:
    """With no more tiles (of all splits) than SMs each gets a block of its own, whatever its kernel would do with more."""
    multiprocessors = device_properties(problem.q.device.index).multiprocessors
    return spec.persistent and spec.work_tiles(problem) * splits > multiprocessors


def _load_align(arrays: list[ArrayInfo]) -> int:
    """The largest power of two up to 16 that divides every address and, in bytes, every stride that is ever stepped."""
    bits = VECTOR_BYTES
    for array in arrays:
        itemsize = array.dtype.itemsize if array.dtype is not None else 1
        bits |= array.ptr
        for size, step in zip(array.shape[:-1], array.strides[:-1], strict=True):
            bits |= step * itemsize if size > 1 else 0
    return bits & -bits


def _tma_can_read(array: ArrayInfo) -> bool:
    """Whether a tensor map takes the strides of an array: 0 to 2^40 bytes (CUDA Driver API, cuTensorMapEncodeTiled)."""
    itemsize = array.dtype.itemsize if array.dtype is not None else 1
    steps = (step * itemsize for size, step in zip(array.shape[:-1], array.strides[:-1], strict=True) if size > 1)
    return all(0 <= step < _LONGEST_TMA_STRIDE for step in steps)
