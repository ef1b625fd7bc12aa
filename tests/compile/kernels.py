"""The kernels that are compiled without a GPU: every arch, type and tile width plain, and all features in pairs.

The features of the mma.sync family meet at head dim 128, those of the wgmma family at every pair of widths that has a tile of its own. The
full product is ``make compile-all``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup
from atomr_accel_flashattn.kernels.kv_append import Fp8AppendSpec, KvAppendSpec
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec
from atomr_accel_flashattn.kernels.step import ScheduledKvCacheSpec, StepScheduleSpec
from atomr_accel_flashattn.limits import FP8_OUT_DTYPES, HEAD_DIM_WIDTHS
from atomr_accel_flashattn.types import DType, ScaleUnit, SmArch
from tests.pairwise import covering_rows

ARCHS = (SmArch.SM_80, SmArch.SM_86, SmArch.SM_89, SmArch.SM_90, SmArch.SM_100, SmArch.SM_120)
DTYPES = (DType.F16, DType.BF16)
# (sliding_window, sink): all that a kernel knows of a mask is on which sides it has a bound, and whether sinks lift the left one.
MASKS = ((None, 0), ((-1, 0), 0), ((64, -1), 0), ((64, 32), 0), ((64, 0), 4))
AXES: dict[str, tuple[Any, ...]] = {
    "arch": ARCHS,
    "dtype": DTYPES,
    "exact": (True, False),  # 128, and 120, which needs column tests in a 128 wide tile
    "mask": MASKS,
    "alibi": (False, True),
    "softcap": (0.0, 30.0),
    "scale_first": (False, True),
    "learned_sink": (False, True),
    "dropout": (False, True),
    "varlen": (False, True),
    "load_align": (16, 2),
}
# The wgmma family: no "load_align", which takes the other family, and tiles of blocks that stay.
WGMMA_WIDTHS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (64, 256), (192, 192), (256, 256))
WGMMA_AXES: dict[str, tuple[Any, ...]] = {
    "arch": (SmArch.SM_90A,),
    "dtype": DTYPES,
    "widths": WGMMA_WIDTHS,
    **{axis: AXES[axis] for axis in ("exact", "mask", "softcap", "scale_first", "learned_sink", "varlen")},
    # Query heads that share K and V are packed unless slopes or dropout tell them apart: one axis, so that packing meets all the others.
    "heads": tuple(
        {"gqa_ratio": ratio, "alibi": alibi, "dropout": dropout}
        for ratio, alibi, dropout in ((1, False, False), (4, False, False), (1, True, False), (1, False, True), (1, True, True))
    ),
    "persistent": (False, True),
    "short_q": (False, True),
}
# Over a KV cache there is no dropout.
WGMMA_CACHE_AXES = WGMMA_AXES | {
    "heads": tuple({"gqa_ratio": ratio, "alibi": alibi, "dropout": False} for ratio, alibi in ((1, False), (4, False), (1, True))),
    "cache": tuple({"paged": paged, "split": split} for paged in (False, True) for split in (False, True)),
}
FP8_AXES = {axis: values for axis, values in WGMMA_AXES.items() if axis != "dtype"} | {
    "widths": ((64, 64), (128, 128), (192, 192), (256, 256)),
    "exact": (True, False),
    "heads": tuple({"gqa_ratio": ratio, "alibi": alibi, "dropout": False} for ratio, alibi in ((1, False), (4, False), (1, True))),
}
# Where registers are scarcest: all features at once that the tiles of three and four computing warpgroups are given.
CROWDED_AXES: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "widths": tuple((width, width) for width in (24, 56, 64, 96, 128)),
    "scores": tuple({"alibi": alibi, "softcap": softcap} for alibi, softcap in ((False, 30.0), (True, 0.0), (True, 30.0))),
    "dropout": (False, True),
    "short_q": (False, True),
    "gqa_ratio": (1, 4),
}
CROWDED = {"arch": SmArch.SM_90A, "mask": ((64, 32), 4), "scale_first": True, "learned_sink": True, "varlen": True}


def plain_specs() -> list[KernelSpec]:
    """Every arch, type and tile width without any feature; of each arch and width one type causal, the other with all keys."""
    return [
        _spec(DispatchKey(arch, dtype, width, causal=sum(at) % 2 == 0, extras=Extras(short_q=short_q)))
        for *at, arch, dtype, width in _numbered(ARCHS, DTYPES, HEAD_DIM_WIDTHS)
        for short_q in (False, True)
    ]


def feature_specs() -> list[KernelSpec]:
    """A pairwise covering array over arch, type and every feature of the forward kernel."""
    return [_spec(_feature_key({"widths": (128, 128), **row})) for row in covering_rows(AXES)]


def wgmma_plain_specs() -> list[KernelSpec]:
    """Every type and pair of tile widths of the wgmma family; of each pair one type causal, and one with query heads packed."""
    return [
        _spec(DispatchKey(SmArch.SM_90A, dtype, d, causal=(t + w // 2) % 2 == 0, gqa_ratio=1 if (t + w) % 2 else 4, extras=extras))
        for t, w, dtype, (d, dv) in _numbered(DTYPES, WGMMA_WIDTHS)
        for extras in (Extras(v_head_dim=dv, short_q=short_q) for short_q in (False, True))
    ]


def wgmma_feature_specs() -> list[KernelSpec]:
    """A pairwise covering array over type, widths and every feature of the wgmma family."""
    return [_spec(_feature_key(row | row["heads"])) for row in covering_rows(WGMMA_AXES)]


def wgmma_crowded_specs() -> list[KernelSpec]:
    """Pairs of what makes registers scarce, beside all features that always do."""
    return [_spec(_feature_key(CROWDED | row | row["scores"])) for row in covering_rows(CROWDED_AXES)]


def wgmma_fp8_specs() -> list[KernelSpec]:
    """fp8 of the wgmma family: pairs of widths and types plain, and a pairwise covering array of features."""
    types = ((DType.F8E4M3, None, None), (DType.F8E4M3, DType.F8E5M2, DType.F8E5M2), (DType.F8E5M2, None, DType.F8E4M3))
    plain = [
        DispatchKey(
            SmArch.SM_90A,
            DType.F8E4M3 if persistent else DType.F8E5M2,
            width,
            causal=w % 2 == 0,
            gqa_ratio=1 if w % 2 else 4,
            extras=Extras(persistent=persistent),
        )
        for w, width in enumerate((64, 128, 192, 256))
        for persistent in (True, False)
    ]
    plain += [replace(key, extras=replace(key.extras, single_level=True)) for key in plain[::2]]
    keys = []
    for i, row in enumerate(covering_rows(FP8_AXES)):
        dtype, k_dtype, v_dtype = types[i % 3]
        key = _feature_key(row | row["heads"] | {"dtype": dtype, "padding": 16})
        keys.append(replace(key, extras=replace(key.extras, k_dtype=k_dtype, v_dtype=v_dtype, out_dtype=FP8_OUT_DTYPES[i % 4 % 3])))
        if i % 3 == 0:
            keys.append(replace(keys[-1], extras=replace(keys[-1].extras, k_descale=ScaleUnit.BLOCK, v_descale=ScaleUnit.BLOCK)))
    for i, key in enumerate(keys[::3]):
        extras = replace(key.extras, kv_cache=i % 2 == 0, split=i % 4 < 2, family=Family.FA3)
        keys.append(replace(key, paged=i % 2 == 1, extras=extras))
    return [_spec(key).steps()[0] for key in (*plain, *keys)]


def dropout_mask_specs() -> list[KernelSpec]:
    """The kernel that writes the keep pattern."""
    extras = Extras(direction="dropout_mask", dropout=True)
    return [_spec(DispatchKey(arch, DType.F16, 64, varlen=varlen, extras=extras)) for arch in ARCHS for varlen in (False, True)]


def merge_specs() -> list[KernelSpec]:
    """The kernel that merges two states: every arch and type."""
    return [
        _spec(DispatchKey(arch, dtype, 64, extras=Extras(direction="merge_states", load_align=align)))
        for arch in ARCHS
        for dtype in (*DTYPES, DType.F32)
        for align in (16, 2)
    ]


def backward_specs() -> list[KernelSpec]:
    """The three kernels of a backward: every arch and tile width plain, and the pairs of features at head dim 128.

    Some are deterministic, some split over query heads.
    """
    plain = [DispatchKey(arch, DTYPES[(a + w) % 2], width, causal=w % 2 == 0) for a, w, arch, width in _numbered(ARCHS, HEAD_DIM_WIDTHS)]
    features = [_feature_key({"widths": (128, 128), **row}) for row in covering_rows(AXES)]
    asked = (  # deterministic, split over query heads
        *((key, False, False) for key in plain),
        *((key, False, True) for key in plain),
        *((key, True, False) for key in plain if key.arch in {SmArch.SM_80, SmArch.SM_90}),
        *((key, i % 3 == 0, i % 4 == 1) for i, key in enumerate(features)),
    )
    keys = (
        replace(key, extras=replace(key.extras, direction="bwd", deterministic=deterministic, head_split=split))
        for key, deterministic, split in asked
    )
    return [step for key in keys for step in lookup(key).steps()]


def cache_specs() -> list[KernelSpec]:
    """Those over a KV cache: every arch and tile width with each number of rows, the pairs of features at head dim 128, and appends."""
    rows = (16, 32, 64, 128)
    keys = [
        DispatchKey(
            arch, DTYPES[(a + w) % 2], width, causal=True, paged=True, extras=Extras(cache_rows=rows[(a + w) % 4], split=w % 2 == 0)
        )
        for a, w, arch, width in _numbered(ARCHS, HEAD_DIM_WIDTHS)
    ]
    for i, row in enumerate(covering_rows(AXES)):
        key = _feature_key({"widths": (128, 128), **row})
        cache = {"kv_cache": i % 2 == 0, "dropout": False, "cache_rows": rows[i % 4], "split": i % 3 == 0}
        keys.append(replace(key, paged=i % 2 == 1, extras=replace(key.extras, **cache)))
    keys += [replace(key, extras=replace(key.extras, split=False, scheduled=True)) for key in keys if not key.extras.split]
    for i, row in enumerate(covering_rows(AXES)):
        if i % 4 == 1 and not row["dropout"]:
            key = _feature_key({"widths": (128, 128), **row})
            keys.append(replace(key, paged=i % 8 == 1, extras=replace(key.extras, cache_rows=rows[i % 4], batch_invariant=True)))
    keys += [
        DispatchKey(arch, DTYPES[(a + w) % 2], width, causal=True, extras=Extras(cache_rows=rows[(a + w) % 3], batch_invariant=True))
        for a, w, arch, width in _numbered(ARCHS, HEAD_DIM_WIDTHS)
    ]
    flags = itertools.product((False, True), repeat=3)
    appends = [
        KvAppendSpec(arch=ARCHS[i % len(ARCHS)], dtype=DTYPES[i % 2], paged=paged, interleaved=interleaved, wide_rotary=wide)
        for i, (paged, interleaved, wide) in enumerate(flags)
    ]
    answers = [lookup(key) for key in keys]
    schedules = {StepScheduleSpec.before(spec) for spec in answers if isinstance(spec, ScheduledKvCacheSpec)}
    return [*(step for spec in answers for step in spec.steps()), *sorted(schedules, key=lambda spec: spec.kernel_name), *appends]


FP8_ARCHS = (SmArch.SM_89, SmArch.SM_90, SmArch.SM_100, SmArch.SM_120)
FP8 = (DType.F8E4M3, DType.F8E5M2)
FP8_CACHE_AXES: dict[str, tuple[Any, ...]] = AXES | {
    "arch": FP8_ARCHS,
    "dtype": (*DTYPES, *FP8),
    "k_dtype": FP8,
    "v_dtype": FP8,
    "out_dtype": (*DTYPES, DType.F32),
    "k_descale": (None, ScaleUnit.HEAD, ScaleUnit.TOKEN),
    "v_descale": (None, ScaleUnit.BLOCK, ScaleUnit.TOKEN),
    "rows": (16, 32, 64, 128),
    "way": ("whole", "split", "scheduled"),
    "dropout": (False,),
}


def fp8_cache_specs() -> list[KernelSpec]:
    """Those over an fp8 cache: a pairwise covering array at head dim 128, and each tile width with q of either kind."""
    keys = []
    for row in covering_rows(FP8_CACHE_AXES):
        key = _feature_key({"widths": (128, 128), **row, "exact": True})
        types = {name: row[name] for name in ("k_dtype", "v_dtype", "out_dtype", "k_descale", "v_descale")}
        extras = replace(key.extras, **types, cache_rows=row["rows"], split=row["way"] == "split", scheduled=row["way"] == "scheduled")
        paged = ScaleUnit.TOKEN in {row["k_descale"], row["v_descale"]} or row["rows"] != 32
        head_dim = 128 if row["exact"] else 112
        keys.append(replace(key, head_dim=head_dim, paged=paged, extras=replace(extras, v_head_dim=head_dim, kv_cache=not paged)))
    for a, w, arch, width in _numbered(FP8_ARCHS, HEAD_DIM_WIDTHS):
        types = {"k_dtype": FP8[0], "v_dtype": FP8[0]}
        extras = Extras(**types, cache_rows=(16, 32, 64, 128)[(a + w) % 4], batch_invariant=(a + w) % 3 == 2, out_dtype=DType.BF16)
        keys.append(DispatchKey(arch, (DType.BF16, FP8[0])[(a + w) % 2], width, causal=True, paged=True, extras=extras))
    appends = [
        Fp8AppendSpec(
            arch=FP8_ARCHS[i % 4],
            dtype=(*DTYPES, FP8[0])[i % 3],
            k_dtype=FP8[i % 2],
            v_dtype=FP8[i // 2 % 2],
            paged=i % 2 == 1,
            interleaved=i % 4 == 1,
            wide_rotary=i == 2,
            k_token_scales=i % 6 == 1,
            v_token_scales=i % 6 == 1,
        )
        for i in range(8)
    ]
    return [*(step for key in keys for step in lookup(key).steps()), *appends]


def fp8_plain_specs() -> list[KernelSpec]:
    """Plain fp8 K and V by mma.sync: some widths with q of each kind, tiles of many and of few rows, and much at once at head dim 128."""
    keys = []
    for a, w, arch, width in _numbered((SmArch.SM_89, SmArch.SM_90, SmArch.SM_120), (64, 128, 256)):
        extras = Extras(k_dtype=FP8[w % 2], v_dtype=FP8[a % 2], out_dtype=FP8_OUT_DTYPES[w], cache_rows=(128, 64)[(a + w) % 2])
        keys.append(
            DispatchKey(arch, (DType.BF16, FP8[0], FP8[1])[(a + w) % 3], width, causal=a % 2 == 0, varlen=w % 2 == 0, extras=extras)
        )
        if a == w:
            much = {"learned_sink": True, "softcap": 30.0, "split": w == 1, "load_align": 16 >> 4 * (w % 2), "k_descale": ScaleUnit.BLOCK}
            keys.append(replace(keys[-1], head_dim=112, alibi=True, sliding_window=(64, 0), sink=4, extras=replace(extras, **much)))
    return [step for key in keys for step in lookup(key).steps()]


def wgmma_cache_specs() -> list[KernelSpec]:
    """A pairwise covering array of the wgmma family over a KV cache, with what combines splits; of rows that are split plain ones, too."""
    specs: list[KernelSpec] = []
    for row in covering_rows(WGMMA_CACHE_AXES):
        key, cache = _feature_key(row | row["heads"]), row["cache"]
        extras = replace(key.extras, family=Family.FA3, kv_cache=not cache["paged"], split=cache["split"])
        specs += lookup(replace(key, paged=cache["paged"], extras=extras)).steps()
        if extras.kv_cache and extras.split:
            specs += lookup(replace(key, extras=replace(extras, kv_cache=False))).steps()
    return specs


def all_specs() -> list[KernelSpec]:
    """Every kernel of this folder's tests, each once."""
    wgmma = (*wgmma_plain_specs(), *wgmma_feature_specs(), *wgmma_crowded_specs(), *wgmma_cache_specs(), *wgmma_fp8_specs())
    caches = (*cache_specs(), *fp8_cache_specs(), *fp8_plain_specs())
    return list(
        dict.fromkeys([*plain_specs(), *feature_specs(), *wgmma, *dropout_mask_specs(), *merge_specs(), *backward_specs(), *caches])
    )


def _numbered(*axes: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The product of the axes, each combination behind the numbers of its values."""
    for chosen in itertools.product(*map(enumerate, axes)):
        numbers, values = zip(*chosen, strict=True)
        yield (*numbers, *values)


def _feature_key(row: dict[str, Any]) -> DispatchKey:
    window, sink = row["mask"]
    head_dim, v_head_dim = (width if row.get("exact", True) else width - row.get("padding", 8) for width in row["widths"])
    return DispatchKey(
        row["arch"],
        row["dtype"],
        head_dim,
        causal=window is not None and window[1] == 0,
        varlen=row["varlen"],
        sliding_window=window,
        alibi=row["alibi"],
        sink=sink,
        gqa_ratio=row.get("gqa_ratio", 1),
        extras=Extras(
            softcap=row["softcap"],
            dropout=row["dropout"],
            learned_sink=row["learned_sink"],
            load_align=row.get("load_align", 16),
            scale_first=row["scale_first"],
            v_head_dim=v_head_dim,
            persistent=row.get("persistent"),
            short_q=row.get("short_q", False),
        ),
    )


def _spec(key: DispatchKey) -> KernelSpec:
    spec = lookup(key)
    assert isinstance(spec, KernelSpec)
    return spec
