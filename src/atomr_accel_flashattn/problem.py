"""A forward attention problem in its one normal form, and a backward one.

Every request lowers to an :class:`AttentionProblem`, or to a :class:`BackwardProblem`, which holds one; the GPU parameter packer and the
CPU backend read nothing else. They are made by requests that have already checked their arguments, so nothing here validates. Meaning:
docs/semantics.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from .errors import ArrayTypeError
from .limits import MAX_LENGTH
from .types import Device, DType, KvLayout, ScaleUnit

__all__ = [
    "ArrayInfo",
    "AttentionProblem",
    "BackwardProblem",
    "Band",
    "Descale",
    "Descales",
    "Dropout",
    "GradientArrays",
    "KvCache",
    "NewTokens",
    "Rotary",
    "StepBuffers",
    "StepShape",
    "Strides",
]


class Strides(NamedTuple):
    """Steps in elements from one batch, row (token) and head to the next.

    ``batch`` is 0 for packed (varlen) tensors; of a KV cache it is the step from block to block.
    """

    batch: int
    row: int
    head: int


class Band(NamedTuple):
    """A mask: key j is visible when p - left <= j <= p + right, p = i + Sk - Sq; None is unbounded. ``j < sink_tokens`` lifts ``left``."""

    left: int | None = None
    right: int | None = None
    sink_tokens: int = 0


@dataclass(slots=True, unsafe_hash=True)
class ArrayInfo:
    """What we need to know of an array, whatever library it came from. Strides are in elements.

    Never changed once made. It does not say so with ``frozen``, which costs 1 us of a call: every call describes its new output.
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType | None  # None: an integer array (cu_seqlens, rng), named by `dtype_name`
    dtype_name: str
    device: Device
    source: Any = field(repr=False, compare=False)  # keeps the memory alive; what the user handed in

    def __reduce__(self) -> NoReturn:
        raise ArrayTypeError(
            "ArrayInfo: got a request to copy or pickle it, and its address would be that of the original; "
            "allowed is to copy the array, or the request, which is made anew from its arrays"
        )


@dataclass(frozen=True, slots=True)
class Dropout:
    """Drop probability and the (seed, offset) int64[2] array that fixes the pattern (docs/semantics.md, Dropout)."""

    p: float
    rng: ArrayInfo

    @property
    def keep_threshold(self) -> int:
        """T in 1..255: a byte below it keeps its element."""
        return min(255, max(1, round(256 * (1 - self.p))))

    @property
    def rescale(self) -> float:
        """256 / T, the factor on kept probabilities."""
        return 256 / self.keep_threshold


class Descale(NamedTuple):
    """Factors that turn fp8 elements into values: float32, of shape (), (B, Hkv), (B, Hkv, n) or (cache blocks, block size, Hkv).

    ``n`` is at least the number of blocks of 128 tokens in the longest sequence. Query head h of q takes that of its KV head.
    """

    array: ArrayInfo
    unit: ScaleUnit
    strides: Strides  # batch: to the next sequence, or block of a paged cache; row: block of 128 tokens, or slot; head: KV head


class Descales(NamedTuple):
    """Those of q, k and v; None is a factor of 1."""

    q: Descale | None = None
    k: Descale | None = None
    v: Descale | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary position embedding (arXiv 2104.09864) of the first ``2 * cos.shape[1]`` elements of a head.

    ``cos`` and ``sin`` are (rows, rotary_dim / 2), of q's type or float32. ``interleaved``: element 2 i turns with 2 i + 1, otherwise i
    with i + rotary_dim / 2.
    """

    cos: ArrayInfo
    sin: ArrayInfo
    interleaved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTokens:
    """Keys and values that are written behind the last ones of their sequences before anybody attends.

    k is (B, n, Hkv, D) and v (B, n, Hkv, Dv), or packed (total, Hkv, D) and (total, Hkv, Dv) with ``cu_seqlens``. ``longest``: of the
    sequence that gets most.
    """

    k: ArrayInfo
    v: ArrayInfo
    k_strides: Strides
    v_strides: Strides
    longest: int
    cu_seqlens: ArrayInfo | None = None
    rotary: Rotary | None = None  # of the new keys, and of q


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """K and V lie in blocks of slots: the pages of a paged cache, or the rows of a contiguous one, which has a block for each sequence.

    k and v of the problem are (blocks, slots, Hkv, D) in layout NHD and (blocks, Hkv, slots, D) in HND. Slot s of sequence b is slot
    ``s % block_size`` of block ``blocks[b, s // block_size]``. A sequence is the slots from ``left_pad[b]`` to ``lengths[b]``, and the new
    tokens behind them.
    """

    num_blocks: int
    block_size: int
    layout: KvLayout
    blocks: ArrayInfo | None  # int32: (B, entries) of a paged cache; (B,) of a contiguous one, where None is block b
    lengths: ArrayInfo | None  # int32 (B,), slots in use before new tokens; None: ``cu_seqlens_k`` of the problem says them
    left_pad: ArrayInfo | None = None  # int32 (B,), slots before the first key; of contiguous caches only
    new: NewTokens | None = None
    lengths_name: str = "seq_lens"  # what the caller calls ``lengths``

    @property
    def paged(self) -> bool:
        """Whether a sequence has more than one block."""
        return self.blocks is not None and len(self.blocks.shape) == 2

    @property
    def capacity(self) -> int:
        """Slots that a sequence may have: those of its blocks, and no more than kernels count."""
        return min(MAX_LENGTH, self.block_size * (self.blocks.shape[1] if self.blocks is not None and self.paged else 1))


@dataclass(slots=True, eq=False)
class StepBuffers:
    """What a StepPlan has: on a GPU one array, and the addresses in it; on the CPU ``array`` describes ``like``, and there are none.

    ``scheduled``: whether a schedule was ever asked for.
    """

    array: ArrayInfo
    schedule: int
    partial_o: int
    partial_sum: int
    scheduled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """One forward call. Dense: (B, S, H, D) arrays. Varlen: (total, H, D) arrays, ``seqlen_*`` are the maxima, ``cu_seqlens_*`` set.

    Types: q, k and v have one; or k and v are fp8, each of its own type, and q is fp8 or of 16 bits.

    With ``cache``, k and v are that of the cache, q is either, and ``seqlen_k`` is an upper bound of the lengths.
    """

    q: ArrayInfo
    k: ArrayInfo
    v: ArrayInfo
    q_strides: Strides
    k_strides: Strides
    v_strides: Strides
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    v_head_dim: int
    softmax_scale: float
    band: Band = Band()
    softcap: float = 0.0
    alibi_slopes: ArrayInfo | None = None  # float32 (Hq,) or (B, Hq)
    learned_sink: ArrayInfo | None = None  # float32 (Hq,)
    cu_seqlens_q: ArrayInfo | None = None  # int32 (B + 1,)
    cu_seqlens_k: ArrayInfo | None = None
    dropout: Dropout | None = None
    cache: KvCache | None = None
    num_splits: int = 0  # parts that the keys of a row are cut into, 0 for as many as suit
    batch_invariant: bool = False
    step: StepBuffers | None = None  # of a StepPlan: on a GPU blocks share the keys of all sequences as the schedule there says
    descales: Descales | None = None  # where k and v are fp8, and only there
    out_dtype: DType | None = None  # of o; None is that of q, which it is wherever k and v are not fp8
    single_level: bool = False  # of fp8: whether P V may stay in the accumulator of 8-bit wgmma

    @property
    def is_varlen(self) -> bool:
        """Whether the sequences of q are packed one after the other."""
        return self.cu_seqlens_q is not None

    @property
    def written_descales(self) -> tuple[ArrayInfo, ...]:
        """Descales by slots, which a call that quantises new tokens writes beside them."""
        new = None if self.cache is None else self.cache.new
        if new is None or self.descales is None or new.v.dtype is self.v.dtype:
            return ()
        return tuple(each.array for each in self.descales[1:] if each is not None and each.unit is ScaleUnit.TOKEN)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of o."""
        if self.cu_seqlens_q is None:
            return (self.batch, self.seqlen_q, self.heads, self.v_head_dim)
        return (self.q.shape[0], self.heads, self.v_head_dim)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of the float32 LSE."""
        if self.is_varlen:
            return (self.heads, self.q.shape[0])
        return (self.batch, self.heads, self.seqlen_q)

    @property
    def dropout_mask_shape(self) -> tuple[int, ...]:
        """Shape of the bool keep pattern."""
        return (self.batch, self.heads, self.seqlen_q, self.seqlen_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What the calls of one StepPlan have in common: all that says where the keys of a step lie, but their lengths.

    Attributes:
        device: of all arrays.
        batch: sequences.
        heads: of q.
        heads_kv: of the cache.
        head_dim: of q and k.
        v_head_dim: of v.
        seqlen_q: queries of a sequence, of a packed q at most.
        packed_q: whether q is packed.
        band: the mask.
        capacity: slots that a sequence may have.
        new_tokens: of each sequence, written by the call; None: packed ones.
        left_pad: whether sequences are padded on the left.
    """

    device: Device
    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    v_head_dim: int
    seqlen_q: int
    packed_q: bool
    band: Band
    capacity: int
    new_tokens: int | None
    left_pad: bool

    @classmethod
    def of(cls, problem: AttentionProblem) -> StepShape:
        """That of a call on a cache."""
        cache = problem.cache
        assert cache is not None  # noqa: S101 - callers have looked
        new = cache.new
        return cls(
            device=problem.q.device,
            batch=problem.batch,
            heads=problem.heads,
            heads_kv=problem.heads_kv,
            head_dim=problem.head_dim,
            v_head_dim=problem.v_head_dim,
            seqlen_q=problem.seqlen_q,
            packed_q=problem.is_varlen,
            band=problem.band,
            capacity=cache.capacity,
            new_tokens=0 if new is None else new.longest if new.cu_seqlens is None else None,
            left_pad=cache.left_pad is not None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardProblem:
    """The gradients of one forward call, of o and of the LSE together; one of ``dout`` and ``dlse`` is there."""

    forward: AttentionProblem
    out: ArrayInfo | None  # o and LSE of the forward; both None: it runs first
    lse: ArrayInfo | None  # float32, row-major, ``forward.lse_shape``
    dout: ArrayInfo | None  # like o, the last stride is 1; None is zero
    dlse: ArrayInfo | None = None  # like the LSE; None is zero
    deterministic: bool = False


class GradientArrays(NamedTuple):
    """Where the gradients of q, k and v go, of their shapes and types; None is a new array."""

    dq: ArrayInfo | None = None
    dk: ArrayInfo | None = None
    dv: ArrayInfo | None = None
