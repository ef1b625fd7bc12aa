"""DispatchKey: what is asked of a kernel, as a value that can be written down without a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from .jit.spec import Family, Tile, fits_warpgroup
from .jit.tiles import has_few_rows
from .types import DType, SmArch

if TYPE_CHECKING:
    from .problem import ArrayInfo, AttentionProblem

__all__ = ["VECTOR_BYTES", "DispatchKey", "Extras", "key_of_problem"]

VECTOR_BYTES: Final = 16  # one cp.async

# Kernels that take the maximum of raw scores divide slopes by the scale and multiply infinity by it: in float32 the scale must be neither 0
# nor so small that a slope overflows.
_SMALL_SCALE: Final = 2.0**-60
_LONGEST_COPY_STRIDE: Final = 1 << 40  # bytes
_MOST_ROWS: Final = (1 << 31) - 1024  # of packed heads: kernels count rows, and the rest of a tile, in 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """The rest of a key; everything has a default.

    Attributes:
        v_head_dim: head dim of v and o, None is that of q.
        v_dtype: element type of v, None is that of q.
        out_dtype: element type of o, None is that of q.
        softcap: c of c * tanh(s / c), 0 is none.
        dropout: whether probabilities are dropped.
        learned_sink: whether a learned sink joins the denominator.
        direction: ``"fwd"``, ``"bwd"``, or ``"dropout_mask"``, the kernel that writes the keep pattern.
        split: whether K/V are split over blocks and combined.
        kv_layout: layout of a paged cache, ``"NHD"``, ``"HND"`` or ``"VLLM_V1"``.
        left_pad: whether sequences are padded on the left.
        load_align: bytes that every pointer and stride is a multiple of; 16 takes the vector loads.
        prescale: whether scores are scaled before the maximum, as a softmax_scale needs that is not positive, or hardly.
        tensor_copies: whether the copy engine of sm_90a can step through q, k and v: strides of 0 to 2^40 bytes, and where heads are packed
            no more rows than 32 bits count, and a step from one head to the next.
        family: the family that is demanded, None is the best one of the arch.
        persistent: whether blocks take tile after tile; None leaves it to the launch of the wgmma family, which knows how many there are,
            and is False in the mma.sync family, unless the tile that is used was tuned with the other answer.
        persistent_blocks: how many persistent blocks, None is as many as the multiprocessors hold.
        tiles_for: the arch whose tiles are borrowed (tests run them on the card at hand).
        few_rows: whether no sequence has more rows than the tile for few rows is meant for (jit/tiles.py), where there is one. Rows are
            queries, times the query heads of a KV head where the kernel packs those (``DispatchKey.packs_heads``).
        tile: how the work is cut; None is the tile that was tuned for this kernel on this machine, or else that of the package.
    """

    v_head_dim: int | None = None
    v_dtype: DType | None = None
    out_dtype: DType | None = None
    softcap: float = 0.0
    dropout: bool = False
    learned_sink: bool = False
    direction: Literal["fwd", "bwd", "dropout_mask"] = "fwd"
    split: bool = False
    kv_layout: str = "NHD"
    left_pad: bool = False
    load_align: int = VECTOR_BYTES
    prescale: bool = False
    tensor_copies: bool = True
    family: Family | None = None
    persistent: bool | None = None
    persistent_blocks: int | None = None
    tiles_for: SmArch | None = None
    few_rows: bool = False
    tile: Tile | None = None


@dataclass(frozen=True, slots=True)
class DispatchKey:
    """What is asked of a kernel, with its numbers.

    Attributes:
        arch: where it runs.
        dtype: element type of q and k.
        head_dim: of q and k, 1..256; on GPUs a multiple of 8.
        causal: whether keys after the query's own position are hidden.
        varlen: whether sequences are packed.
        sliding_window: (left, right) keys around the query's position, -1 unbounded; None is no window.
        alibi: whether a slope per head is subtracted.
        sink: first keys that stay visible beyond the left bound.
        paged: whether K and V lie in pages.
        gqa_ratio: query heads per KV head.
        extras: the rest.
    """

    arch: SmArch
    dtype: DType
    head_dim: int
    causal: bool = False
    varlen: bool = False
    sliding_window: tuple[int, int] | None = None
    alibi: bool = False
    sink: int = 0
    paged: bool = False
    gqa_ratio: int = 1
    extras: Extras = Extras()

    @property
    def v_head_dim(self) -> int:
        """Head dim of v and o."""
        return self.head_dim if self.extras.v_head_dim is None else self.extras.v_head_dim

    @property
    def left_bound(self) -> bool:
        """Whether the window hides keys far before the query."""
        return self.sliding_window is not None and self.sliding_window[0] >= 0

    @property
    def right_bound(self) -> bool:
        """Whether keys after the query are hidden, all or beyond a distance."""
        return self.causal or (self.sliding_window is not None and self.sliding_window[1] >= 0)

    @property
    def family(self) -> Family:
        """Who answers on a GPU: wgmma on sm_90a where its tensor copies can read the arrays, mma.sync everywhere else."""
        extras = self.extras
        copied = extras.tensor_copies and extras.load_align % VECTOR_BYTES == 0
        wgmma = self.arch is SmArch.SM_90A and extras.family is not Family.FA2 and copied and not extras.tiles_for
        return Family.FA3 if wgmma else Family.FA2

    @property
    def packs_heads(self) -> bool:
        """Whether the query heads that share K and V are rows of one tile: not with what differs between heads, slopes and dropout."""
        return self.family is Family.FA3 and fits_warpgroup(self.gqa_ratio) and not (self.alibi or self.extras.dropout)


def key_of_problem(problem: AttentionProblem, arch: SmArch, out: ArrayInfo | None = None, family: Family | None = None) -> DispatchKey:
    """The key of a problem on ``arch``.

    Args:
        problem: checked inputs.
        arch: where it runs.
        out: where o goes, when the caller brought it; it counts for the alignment.
        family: the family that is demanded, None is the best one of the arch.
    """
    band = problem.band
    left, right = (-1 if side is None else side for side in (band.left, band.right))
    assert problem.q.dtype is not None  # noqa: S101 - requests have checked it
    key = DispatchKey(
        arch=arch,
        dtype=problem.q.dtype,
        head_dim=problem.head_dim,
        causal=band.right == 0,
        varlen=problem.is_varlen,
        sliding_window=None if left < 0 and right <= 0 else (left, right),
        alibi=problem.alibi_slopes is not None,
        sink=band.sink_tokens,
        gqa_ratio=problem.heads // problem.heads_kv,
        extras=Extras(
            v_head_dim=None if problem.v_head_dim == problem.head_dim else problem.v_head_dim,
            softcap=problem.softcap,
            dropout=problem.dropout is not None,
            learned_sink=problem.learned_sink is not None,
            load_align=_load_align([problem.q, problem.k, problem.v, *([out] if out is not None else [])]),
            prescale=problem.softmax_scale < _SMALL_SCALE,
            tensor_copies=all(map(_can_be_copied, (problem.q, problem.k, problem.v))),
            family=family,
        ),
    )
    packed = key.packs_heads
    rows = problem.seqlen_q * (key.gqa_ratio if packed else 1)
    if packed and (rows > _MOST_ROWS or not problem.q_strides.head):
        return replace(key, extras=replace(key.extras, tensor_copies=False))  # the family that packs no heads
    few_rows = has_few_rows(problem.head_dim, problem.v_head_dim, rows)
    return replace(key, extras=replace(key.extras, few_rows=few_rows)) if few_rows else key


def _load_align(arrays: list[ArrayInfo]) -> int:
    """The largest power of two up to 16 that divides every address and, in bytes, every stride that is ever stepped."""
    bits = VECTOR_BYTES
    for array in arrays:
        itemsize = array.dtype.itemsize if array.dtype is not None else 1
        bits |= array.ptr
        for size, step in zip(array.shape[:-1], array.strides[:-1], strict=True):
            bits |= step * itemsize if size > 1 else 0
    return bits & -bits


def _can_be_copied(array: ArrayInfo) -> bool:
    """Whether a tensor map takes the strides of an array (CUDA Driver API, cuTensorMapEncodeTiled)."""
    itemsize = array.dtype.itemsize if array.dtype is not None else 1
    steps = (step * itemsize for size, step in zip(array.shape[:-1], array.strides[:-1], strict=True) if size > 1)
    return all(0 <= step < _LONGEST_COPY_STRIDE for step in steps)
