"""DispatchKey: what is asked of a kernel, as a value that can be written down without a tensor. It is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf
from typing import Any, Final, Literal

from ..errors import DispatchError
from ..kernels.fa3_fwd import fits_warpgroup
from ..kernels.spec import Family, Tile
from ..limits import HEAD_DIM_STEP, MAX_HEAD_DIM, VECTOR_BYTES, as_real, is_integer
from ..types import DType, ScaleUnit, SmArch

__all__ = ["DispatchKey", "Extras"]

_FLAGS: Final = ("causal", "varlen", "alibi", "paged")  # of a key: any other object would count as True
_EXTRA_FLAGS: Final = (
    "dropout",
    "learned_sink",
    "split",
    "scheduled",
    "kv_cache",
    "left_pad",
    "batch_invariant",
    "scale_first",
    "single_level",
    "short_q",
    "few_rows",
    "pack_gqa",
    "deterministic",
    "head_split",
)


def _check_all(*checks: tuple[str, object, bool, str]) -> None:
    """Each is a name, its value, whether that is fine, and what is allowed."""
    for name, value, fine, allowed in checks:
        if not fine:
            raise DispatchError(f"{name}: got {value!r}; allowed is {allowed}")


def _one_of(name: str, value: object, *allowed: object) -> tuple[str, object, bool, str]:
    """The check of a field that has a few values."""
    fine = any(value is each or (isinstance(each, str) and isinstance(value, str) and value == each) for each in allowed)
    return name, value, fine, f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"


def _none_or(name: str, value: object, kind: type) -> tuple[str, object, bool, str]:
    """The check of a field that may be left open."""
    return name, value, value is None or isinstance(value, kind), f"None or a {kind.__name__}"


def _is_number_below(limit: float, value: Any) -> bool:
    number = as_real(value)
    return number is not None and 0 <= number < limit


def _is_at_least(least: int, value: Any) -> bool:
    return is_integer(value) and value >= least


def _is_head_dim(value: Any, step: int) -> bool:
    return _is_at_least(1, value) and value <= MAX_HEAD_DIM and value % step == 0


def _is_tile(value: Any) -> bool:
    """A Tile of integers and flags; whether there is a kernel with it is for ``lookup`` to say."""
    return isinstance(value, Tile) and all(type(getattr(value, each.name)).__name__ == each.type for each in fields(Tile))


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """The rest of a key; everything has a default.

    Attributes:
        v_head_dim: head dim of v and o, None is that of q.
        k_dtype: element type of k, None is that of q. Another one is fp8, with fp8 or 16 bits in q.
        v_dtype: element type of v, None is that of q; as that of k.
        out_dtype: element type of o, None is that of q, and bf16 where q is fp8.
        q_descale: what elements of q share a factor, None is a factor of 1.
        k_descale: the same of k.
        v_descale: the same of v.
        single_level: of fp8 by wgmma: whether P V stays in its accumulator of 14 bits, which loses more the longer rows are.
        softcap: c of c * tanh(s / c), 0 is none.
        dropout: whether probabilities are dropped.
        learned_sink: whether a learned sink joins the denominator.
        direction: ``"fwd"``, ``"bwd"``, ``"dropout_mask"``, the kernel that writes the keep pattern, or ``"merge_states"``, the one
            that merges two outputs of this type and head dim; it takes float32 on a GPU, too.
        deterministic: of direction ``"bwd"``: whether gradients are bitwise equal from run to run.
        head_split: of direction ``"bwd"``: whether blocks share keys, each with some of the query heads that read them.
        split: whether K/V are split over blocks and combined.
        scheduled: on a KV cache: whether a fixed number of blocks share the keys of all sequences, as a StepPlan says.
        kv_cache: whether K and V are the rows of a contiguous cache, of which each sequence uses some slots; pages are ``paged``.
        kv_layout: layout of a cache, ``"NHD"``, ``"HND"`` or ``"VLLM_V1"``.
        cache_rows: of a kernel over a KV cache, rows of a tile (tiles/tables.py): 16, 32, 64 or 128.
        left_pad: whether sequences are padded on the left.
        batch_invariant: whether a row's bits may not depend on batch, length of q, pages or splits.
        load_align: bytes that every pointer and stride is a multiple of; 16 takes the vector loads, and TMA needs it.
        scale_first: whether scores are scaled before the maximum, as a softmax_scale needs that is not positive, or hardly.
        family: the family that is wanted, None is the best one of the arch, which for few queries on a KV cache is mma.sync.
        pack_gqa: whether the query heads that share K and V may be rows of one tile; ``DispatchKey.packs_heads`` says whether they are.
        persistent: whether blocks take tile after tile; None is what the tile says: yes in the wgmma family, no in the mma.sync family,
            unless the tile that is used was tuned with the other answer.
        persistent_blocks: how many persistent blocks, None is as many as the SMs hold.
        tiles_for: the arch whose tiles are borrowed (tests run them on the card at hand).
        short_q: whether no sequence has more rows than the tile for short q is meant for (tiles/tables.py), where there is one. Rows are
            queries, times the query heads of a KV head where the kernel packs those.
        few_rows: of the wgmma family: whether the rows of a KV head fill one warpgroup, no more, and their keys are many.
        tile: how the work is cut; None is the tile that was tuned for this kernel on this machine, or else that of the package.

    Raises:
        DispatchError: a value outside its range, or values that contradict each other.
    """

    v_head_dim: int | None = None
    k_dtype: DType | None = None
    v_dtype: DType | None = None
    out_dtype: DType | None = None
    q_descale: ScaleUnit | None = None
    k_descale: ScaleUnit | None = None
    v_descale: ScaleUnit | None = None
    single_level: bool = False
    softcap: float = 0.0
    dropout: bool = False
    learned_sink: bool = False
    direction: Literal["fwd", "bwd", "dropout_mask", "merge_states"] = "fwd"
    deterministic: bool = False
    head_split: bool = False
    split: bool = False
    scheduled: bool = False
    kv_cache: bool = False
    kv_layout: str = "NHD"
    cache_rows: int = 16
    left_pad: bool = False
    batch_invariant: bool = False
    load_align: int = VECTOR_BYTES
    scale_first: bool = False
    family: Family | None = None
    pack_gqa: bool = True
    persistent: bool | None = None
    persistent_blocks: int | None = None
    tiles_for: SmArch | None = None
    short_q: bool = False
    few_rows: bool = False
    tile: Tile | None = None

    def __post_init__(self) -> None:
        blocks: Any = self.persistent_blocks
        tile: Any = self.tile
        asked_blocks = self.persistent is True and _is_at_least(1, blocks)
        _check_all(
            *(_none_or(name, getattr(self, name), DType) for name in ("k_dtype", "v_dtype", "out_dtype")),
            _one_of("q_descale", self.q_descale, None, ScaleUnit.TENSOR, ScaleUnit.HEAD, ScaleUnit.BLOCK),
            *(_none_or(name, getattr(self, name), ScaleUnit) for name in ("k_descale", "v_descale")),
            ("softcap", self.softcap, _is_number_below(inf, self.softcap), "a finite number >= 0"),
            ("kv_layout", self.kv_layout, isinstance(self.kv_layout, str), "'NHD', 'HND' or 'VLLM_V1'"),
            ("load_align", self.load_align, _is_at_least(1, self.load_align), "an integer >= 1"),
            _one_of("cache_rows", self.cache_rows, 16, 32, 64, 128),
            _one_of("direction", self.direction, "fwd", "bwd", "dropout_mask", "merge_states"),
            _none_or("family", self.family, Family),
            _none_or("tiles_for", self.tiles_for, SmArch),
            ("persistent_blocks", blocks, blocks is None or asked_blocks, "None, or an integer >= 1 with persistent=True"),
            ("tile", tile, tile is None or (_is_tile(tile) and not self.tiles_for), "None, or a Tile without tiles_for"),
            _one_of("persistent", self.persistent, None, True, False),
            *(_one_of(name, getattr(self, name), True, False) for name in _EXTRA_FLAGS),
        )


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

    Raises:
        DispatchError: a value outside its range, or a key that contradicts itself.
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

    def __post_init__(self) -> None:
        window: Any = self.sliding_window
        whole_window = window is None or (isinstance(window, tuple) and len(window) == 2 and all(_is_at_least(-1, side) for side in window))
        _check_all(
            ("arch", self.arch, isinstance(self.arch, SmArch), "an SmArch, as SmArch.SM_90A"),
            ("dtype", self.dtype, isinstance(self.dtype, DType), "a DType"),
            ("extras", self.extras, isinstance(self.extras, Extras), "an Extras"),
            ("sliding_window", window, whole_window, "None or (left, right) of integers >= -1, -1 unbounded"),
            ("sink", self.sink, _is_at_least(0, self.sink), "an integer >= 0"),
            ("gqa_ratio", self.gqa_ratio, _is_at_least(1, self.gqa_ratio), "an integer >= 1"),
            *(_one_of(name, getattr(self, name), True, False) for name in _FLAGS),
        )
        step = 1 if self.arch is SmArch.CPU else HEAD_DIM_STEP
        dims = f"1..{MAX_HEAD_DIM} on the CPU" if step == 1 else f"a multiple of {step} up to {MAX_HEAD_DIM} (functional calls pad)"
        _check_all(
            ("head_dim", self.head_dim, _is_head_dim(self.head_dim, step), dims),
            ("v_head_dim", self.v_head_dim, _is_head_dim(self.v_head_dim, step), dims),
        )
        if self.sink > 0 and not self.left_bound:
            raise DispatchError(
                f"sink: got {self.sink} with sliding_window={window}; "
                "allowed with a window whose left side is >= 0, because it lifts that bound"
            )

    @property
    def v_head_dim(self) -> int:
        """Head dim of v and o."""
        return self.head_dim if self.extras.v_head_dim is None else self.extras.v_head_dim

    @property
    def k_dtype(self) -> DType:
        """Element type of k."""
        return self.extras.k_dtype or self.dtype

    @property
    def v_dtype(self) -> DType:
        """Element type of v."""
        return self.extras.v_dtype or self.dtype

    @property
    def out_dtype(self) -> DType:
        """Element type of o."""
        return self.extras.out_dtype or (DType.BF16 if self.dtype.is_fp8 else self.dtype)

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
        """Who answers on a GPU: wgmma on sm_90a, forward over arrays that TMA can read, a cache only if asked for; else mma.sync.

        Batch-invariant calls have one family, and so have types that wgmma does not multiply.
        """
        extras = self.extras
        wanted = extras.family or (Family.FA2 if self.paged or extras.kv_cache else Family.FA3)
        forward = extras.direction != "bwd" and wanted is Family.FA3 and not extras.batch_invariant and self._fits_wgmma
        return Family.FA3 if forward and self.arch is SmArch.SM_90A and self.aligned and not extras.tiles_for else Family.FA2

    @property
    def _fits_wgmma(self) -> bool:
        """Whether wgmma multiplies these types: beside fp8 K and V a q of fp8, and no factor of a token by itself."""
        of_tokens = ScaleUnit.TOKEN in {self.extras.k_descale, self.extras.v_descale}
        return not self.v_dtype.is_fp8 or (self.dtype.is_fp8 and not of_tokens)

    @property
    def aligned(self) -> bool:
        """Whether every address and stride is a multiple of 16 bytes."""
        return self.extras.load_align % VECTOR_BYTES == 0

    @property
    def packs_heads(self) -> bool:
        """Whether the query heads that share K and V are rows of one tile: not with what differs between heads, slopes and dropout."""
        fits = self.family is Family.FA3 and fits_warpgroup(self.gqa_ratio) and not (self.alibi or self.extras.dropout)
        return fits and self.extras.pack_gqa
