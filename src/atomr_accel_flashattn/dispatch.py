"""From what is asked to the kernel that does it: DispatchKey -> lookup -> KernelSpec.

A key is the public contract: it carries values (this window, that ratio) and can be written down without a tensor. A spec carries only
what changes machine code, so many keys share one. :func:`lookup` is total: for every key it returns a spec or raises a DispatchError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import inf
from typing import Any, Final

from .errors import ArchUnsupportedError, DispatchError, FeatureNotBuiltError
from .jit.driver import device_properties
from .jit.saved_tiles import forget_saved_tiles, saved_tile
from .jit.spec import Direction, Family, KernelSpec, Tile
from .jit.tile_space import misfit
from .jit.tiles import HEAD_DIM_WIDTHS, head_dim_width, tile_for, wgmma_tile_for
from .keys import VECTOR_BYTES, DispatchKey, Extras, key_of_problem
from .protocols import F16, Bf16, F8E4m3, F8E5m2, FaBwdDispatch, FaFwdDispatch, FaPagedFwdDispatch, GemmSupported
from .types import Device, DType, SmArch

__all__ = [
    "DISPATCH_TABLE",
    "F16",
    "FEATURES",
    "Bf16",
    "Cell",
    "CpuSpec",
    "DType",
    "DispatchError",
    "DispatchKey",
    "DispatchTable",
    "Extras",
    "F8E4m3",
    "F8E5m2",
    "FaBwdDispatch",
    "FaFwdDispatch",
    "FaPagedFwdDispatch",
    "GemmSupported",
    "SmArch",
    "arch_of_capability",
    "best_arch",
    "forget_lookups",
    "key_of_problem",
    "lookup",
    "with_features",
]

_MAX_HEAD_DIM: Final = HEAD_DIM_WIDTHS[-1]
_GPU_DTYPES: Final = (DType.F16, DType.BF16)
_CPU_DTYPES: Final = (DType.F16, DType.BF16, DType.F32, DType.F64)
_FLAGS: Final = ("causal", "varlen", "alibi", "paged")  # of a key: any other object would count as True
_EXTRA_FLAGS: Final = ("dropout", "learned_sink", "split", "left_pad", "prescale", "few_rows")
_BEFORE_WGMMA: Final = frozenset({SmArch.SM_80, SmArch.SM_86, SmArch.SM_89, SmArch.SM_90})


@dataclass(frozen=True, slots=True)
class CpuSpec:
    """What ``lookup`` gives for ``SmArch.CPU``: the reference backend, which is one piece of code for every key."""

    dtype: DType
    direction: Direction = Direction.FORWARD

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
        DispatchError: the key contradicts itself or holds a value outside its range.
    """
    if not isinstance(key, DispatchKey):
        raise DispatchError(f"key: got {type(key).__qualname__}; allowed is a DispatchKey")
    try:
        return _resolve(key)
    except DispatchError:
        raise
    except (TypeError, AttributeError) as error:  # a field of another type than declared, hashable or not
        raise DispatchError(
            f"key: a field has the wrong type ({error}); allowed are the types that DispatchKey declares; got {key}"
        ) from error


@lru_cache(maxsize=4096)
def _resolve(key: DispatchKey) -> KernelSpec | CpuSpec:
    _refuse_values(key)
    _refuse_unbuilt(key)
    direction = Direction(key.extras.direction)
    if key.arch is SmArch.CPU:
        return CpuSpec(key.dtype, direction)
    if direction is Direction.DROPOUT_MASK:
        return _dropout_mask_spec(key)
    extras, width, v_width = key.extras, head_dim_width(key.head_dim), head_dim_width(key.v_head_dim)
    tile_arch = extras.tiles_for or key.arch
    spec = KernelSpec(
        family=key.family,
        direction=direction,
        arch=SmArch.SM_90 if key.arch is SmArch.SM_90A and key.family is Family.FA2 else key.arch,
        dtype=key.dtype,
        head_dim=width,
        v_head_dim=v_width,
        tile=_tile(key, width, v_width),
        exact_head_dim=(width, v_width) == (key.head_dim, key.v_head_dim),
        aligned=extras.load_align % VECTOR_BYTES == 0,
        left_bound=key.left_bound,
        right_bound=key.right_bound,
        sink_tokens=key.sink > 0,
        alibi=bool(key.alibi),
        softcap=extras.softcap > 0,
        prescale=bool(extras.prescale),
        learned_sink=bool(extras.learned_sink),
        dropout=bool(extras.dropout),
        varlen=bool(key.varlen),
        pack_gqa=key.packs_heads,
    )
    spec = _with_chosen_tile(spec, extras)
    if spec.shared_memory > key.arch.shared_memory_per_block:
        raise ArchUnsupportedError(
            f"tiles_for: the tile of {tile_arch.value} needs {spec.shared_memory} bytes of shared memory; "
            f"{key.arch.value} allows {key.arch.shared_memory_per_block} per block; borrow the tiles of an arch with no more memory"
        )
    return spec


def _with_chosen_tile(spec: KernelSpec, extras: Extras) -> KernelSpec:
    """``spec`` with the tile that the key names, else the one that was tuned for it on this machine, else its own."""
    tile = extras.tile or (None if extras.tiles_for else saved_tile(spec, few_rows=bool(extras.few_rows)))
    if tile is None:
        return spec
    chosen = replace(spec, tile=tile if extras.persistent is None else replace(tile, persistent=extras.persistent))
    reason = misfit(chosen)
    if reason:
        raise DispatchError(f"tile: got {tile} for {spec.kernel_name}; {reason}")
    return chosen


def forget_lookups() -> None:
    """Resolve every key anew, with the tiles that are saved by now. Plans keep the kernels that they were made with."""
    forget_saved_tiles()
    _resolve.cache_clear()


def _tile(key: DispatchKey, width: int, v_width: int) -> Tile:
    """The package's own for the family that answers ``key``."""
    extras = key.extras
    if key.family is Family.FA3:
        tile = wgmma_tile_for(
            width,
            v_width,
            dropout=bool(extras.dropout),
            alibi=bool(key.alibi),
            softcap=extras.softcap > 0,
            few_rows=bool(extras.few_rows),
        )
        return replace(tile, persistent=extras.persistent is not False)
    tile_arch = extras.tiles_for or (SmArch.SM_90 if key.arch is SmArch.SM_90A else key.arch)
    tile = tile_for(tile_arch, width, v_width, dropout=bool(extras.dropout), plain=_is_plain(key, width, v_width))
    return replace(tile, persistent=extras.persistent is True)


def _is_plain(key: DispatchKey, width: int, v_width: int) -> bool:
    """What :func:`~.jit.tiles.tile_for` calls plain: nothing needs registers beside the products and the softmax."""
    extras = key.extras
    masked = key.left_bound or key.right_bound or extras.dropout
    scored = key.alibi or extras.softcap > 0 or extras.prescale
    whole = (key.head_dim, key.v_head_dim, extras.load_align % VECTOR_BYTES) == (width, v_width, 0)
    return whole and not (masked or scored or key.varlen)


def _dropout_mask_spec(key: DispatchKey) -> KernelSpec:
    """The keep pattern depends on no element type, head dim or tile: one kernel per arch, and one for packed sequences."""
    arch = SmArch.SM_90 if key.arch is SmArch.SM_90A else key.arch
    tile = tile_for(arch, 64, 64, dropout=True)
    return KernelSpec(
        family=Family.FA2,
        direction=Direction.DROPOUT_MASK,
        arch=arch,
        dtype=DType.F16,
        head_dim=64,
        v_head_dim=64,
        tile=tile,
        varlen=bool(key.varlen),
    )


def _refuse_values(key: DispatchKey) -> None:
    """Values outside their range, and keys that contradict themselves."""
    window: Any = key.sliding_window
    extras, on_cpu = key.extras, key.arch is SmArch.CPU
    blocks: Any = extras.persistent_blocks
    tile: Any = extras.tile
    dims = f"1..{_MAX_HEAD_DIM} on the CPU" if on_cpu else f"a multiple of 8 up to {_MAX_HEAD_DIM} (functional calls pad)"
    whole_window = window is None or (isinstance(window, tuple) and len(window) == 2 and all(_is_int(side, at_least=-1) for side in window))
    checks: tuple[tuple[str, object, bool, str], ...] = (
        ("arch", key.arch, isinstance(key.arch, SmArch), "an SmArch, as SmArch.SM_90A"),
        ("dtype", key.dtype, isinstance(key.dtype, DType), "a DType"),
        ("extras", extras, isinstance(extras, Extras), "an Extras"),
        ("head_dim", key.head_dim, _is_head_dim(key.head_dim, on_cpu=on_cpu), dims),
        ("v_head_dim", key.v_head_dim, _is_head_dim(key.v_head_dim, on_cpu=on_cpu), dims),
        ("sliding_window", window, whole_window, "None or (left, right) of integers >= -1, -1 unbounded"),
        ("sink", key.sink, _is_int(key.sink, at_least=0), "an integer >= 0"),
        ("gqa_ratio", key.gqa_ratio, _is_int(key.gqa_ratio, at_least=1), "an integer >= 1"),
        ("softcap", extras.softcap, 0 <= extras.softcap < inf, "a finite number >= 0"),
        ("load_align", extras.load_align, _is_int(extras.load_align, at_least=1), "an integer >= 1"),
        ("direction", extras.direction, extras.direction in {"fwd", "bwd", "dropout_mask"}, "'fwd', 'bwd' or 'dropout_mask'"),
        ("persistent", extras.persistent, extras.persistent in {None, True, False}, "None, True or False"),
        (
            "persistent_blocks",
            blocks,
            blocks is None or (extras.persistent is True and _is_int(blocks, at_least=1)),
            "None, or an integer >= 1 with persistent=True",
        ),
        ("tiles_for", extras.tiles_for, extras.tiles_for in {None, *SmArch}, "None or an SmArch"),
        ("family", extras.family, extras.family in {None, *Family}, "None or a Family"),
        ("tile", tile, tile is None or (isinstance(tile, Tile) and not extras.tiles_for), "None, or a Tile without tiles_for"),
    )
    flags = tuple((name, getattr(key, name)) for name in _FLAGS) + tuple((name, getattr(extras, name)) for name in _EXTRA_FLAGS)
    for name, value, fine, allowed in (*checks, *((name, value, value in {True, False}, "True or False") for name, value in flags)):
        if not fine:
            raise DispatchError(f"{name}: got {value!r}; allowed is {allowed}")
    if key.sink > 0 and not key.left_bound:
        raise DispatchError(
            f"sink: got {key.sink} with sliding_window={window}; allowed with a window whose left side is >= 0, because it lifts that bound"
        )


def _is_int(value: Any, *, at_least: int) -> bool:
    return isinstance(value, int) and value >= at_least


def _is_head_dim(value: Any, *, on_cpu: bool) -> bool:
    return _is_int(value, at_least=1) and value <= _MAX_HEAD_DIM and (on_cpu or value % 8 == 0)


def _refuse_unbuilt(key: DispatchKey) -> None:
    """Features of the design that this version does not have, and element types that the arch does not take."""
    extras, arch = key.extras, key.arch
    fp8 = [dtype.value for dtype in (key.dtype, extras.v_dtype, extras.out_dtype) if dtype is not None and dtype.is_fp8]
    features = (
        (bool(key.paged), "paged", "K and V have to be plain or packed arrays"),
        (bool(fp8), "fp8", f"got {', '.join(fp8)}; f16 and bf16 are built"),
        (extras.direction == "bwd", "backward", "forward is built"),
        (bool(extras.split), "split", "one block visits all keys of its rows"),
        (bool(extras.left_pad), "left_pad", "pack the sequences with cu_seqlens"),
        (extras.kv_layout != "NHD", "kv_layout", f"got {extras.kv_layout!r}; NHD is built"),
        (extras.v_dtype not in {None, key.dtype}, "v_dtype", "q, k and v share one type"),
        (extras.out_dtype not in {None, key.dtype}, "out_dtype", "o has the type of q"),
    )
    for asked, feature, reason in features:
        if asked:
            raise FeatureNotBuiltError(feature, reason)
    if extras.tiles_for in {SmArch.CPU, SmArch.SM_90A}:
        raise ArchUnsupportedError(f"tiles_for: got {extras.tiles_for.value}; allowed are the architectures of the mma.sync family")
    if extras.family is Family.FA3 and arch in _BEFORE_WGMMA:
        raise ArchUnsupportedError(
            f"family: got fa3 on {arch.value}, which has no wgmma; allowed are sm_90a and, resolved to mma.sync, sm_100 and sm_120; "
            "use an Fa2FwdRequest"
        )
    allowed = _CPU_DTYPES if arch is SmArch.CPU else _GPU_DTYPES
    if key.dtype not in allowed:
        names = ", ".join(dtype.value for dtype in allowed)
        raise ArchUnsupportedError(
            f"dtype: got {key.dtype.value} on {arch.value}; allowed there are {names}; convert, or run on the CPU backend"
        )


def _extra(**changes: Any) -> Callable[[DispatchKey], DispatchKey]:
    return lambda key: replace(key, extras=replace(key.extras, **changes))


def _plain(**changes: Any) -> Callable[[DispatchKey], DispatchKey]:
    return lambda key: replace(key, **changes)


# Each feature of the design as a change of a key: the rows of the support matrix, and the vocabulary of ahead-of-time compilation.
FEATURES: Final[Mapping[str, Callable[[DispatchKey], DispatchKey]]] = {
    "full": _plain(causal=False, sliding_window=None),
    "causal": _plain(causal=True, sliding_window=None),
    "sliding_causal": _plain(causal=True, sliding_window=(1023, 0)),
    "sliding_full": _plain(causal=False, sliding_window=(1023, 1023)),
    "sink_tokens": lambda key: replace(
        key, sink=4, sliding_window=key.sliding_window or (1023, 0), causal=key.causal or not key.sliding_window
    ),
    "varlen": _plain(varlen=True),
    "gqa": _plain(gqa_ratio=8),
    "alibi": _plain(alibi=True),
    "softcap": _extra(softcap=30.0),
    "learned_sink": _extra(learned_sink=True),
    "dropout": _extra(dropout=True),
    "dropout_mask": _extra(direction="dropout_mask", dropout=True),
    "unaligned": _extra(load_align=2),
    "prescale": _extra(prescale=True),
    "few_rows": _extra(few_rows=True),
    "backward": _extra(direction="bwd"),
    "paged": _plain(paged=True),
    "split": _extra(split=True),
    "left_pad": _extra(left_pad=True),
    "fa3": _extra(family=Family.FA3),
}


def with_features(key: DispatchKey, names: Iterable[str]) -> DispatchKey:
    """``key`` changed by features of :data:`FEATURES`, in the given order (masks first).

    Raises:
        DispatchError: a name that is no feature.
    """
    for name in names:
        if name not in FEATURES:
            raise DispatchError(f"feature: got {name!r}; allowed are {', '.join(FEATURES)}")
        key = FEATURES[name](key)
    return key


@dataclass(frozen=True, slots=True)
class Cell:
    """What ``lookup`` says of a key: a spec, or the refusal."""

    key: DispatchKey
    spec: KernelSpec | CpuSpec | None
    refusal: DispatchError | None

    @property
    def built(self) -> bool:
        """Whether there is a kernel."""
        return self.spec is not None


class DispatchTable(Mapping[DispatchKey, Cell]):
    """``lookup`` seen as a mapping: every key has a cell, and iterating visits arch x type x head dim x feature, one feature at a time."""

    def __getitem__(self, key: DispatchKey) -> Cell:
        try:
            return Cell(key, lookup(key), None)
        except DispatchError as refusal:
            return Cell(key, None, refusal)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, DispatchKey)

    def __iter__(self) -> Iterator[DispatchKey]:
        return iter(_table_keys())

    def __len__(self) -> int:
        return len(_table_keys())

    def cell(self, arch: SmArch, dtype: DType, head_dim: int, features: Iterable[str] = ()) -> Cell:
        """The cell of a plain key with some features of :data:`FEATURES`."""
        return self[with_features(DispatchKey(arch, dtype, head_dim), features)]


@cache
def _table_keys() -> tuple[DispatchKey, ...]:
    keys = (
        change(DispatchKey(arch, dtype, width))
        for arch in SmArch
        for dtype in DType
        for width in HEAD_DIM_WIDTHS
        for change in FEATURES.values()
    )
    return tuple(dict.fromkeys(keys))


DISPATCH_TABLE: Final = DispatchTable()


def arch_of_capability(major: int, minor: int) -> SmArch:
    """The architecture whose cubins run on a compute capability.

    Raises:
        ArchUnsupportedError: older than 8.0, or a family that is not built.
    """
    exact = {(8, 0): SmArch.SM_80, (8, 6): SmArch.SM_86, (8, 7): SmArch.SM_86, (8, 9): SmArch.SM_89, (9, 0): SmArch.SM_90A}
    arch = exact.get((major, minor)) or {10: SmArch.SM_100, 12: SmArch.SM_120}.get(major)
    if arch is None:
        raise ArchUnsupportedError(
            f"compute capability: got {major}.{minor}; allowed are 8.0, 8.6, 8.7, 8.9, 9.0, 10.x and 12.x; use the CPU backend"
        )
    return arch


def best_arch(device: Device) -> SmArch:
    """The architecture that calls on ``device`` compile for: on Hopper sm_90a, where ``lookup`` gives each call the family that can do it.

    Raises:
        ArchUnsupportedError: a GPU that no kernel is built for.
        NoDriverError: a GPU device on a machine without a driver.
    """
    return SmArch.CPU if device.kind == "cpu" else _arch_of_gpu(device.index)


@cache
def _arch_of_gpu(index: int) -> SmArch:
    return arch_of_capability(*device_properties(index).compute_capability)
