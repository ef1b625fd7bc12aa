"""The kernels that are compiled without a GPU: every arch, type and tile width plain, and all features in pairs.

The features of the mma.sync family meet at head dim 128, those of the wgmma family at every pair of widths that has a tile of its own.
"""

from __future__ import annotations

import itertools
from typing import Any

from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup
from atomr_accel_flashattn.kernels.spec import KernelSpec
from atomr_accel_flashattn.limits import HEAD_DIM_WIDTHS
from atomr_accel_flashattn.types import DType, SmArch
from tests.pairwise import covering_rows

ARCHS = (SmArch.SM_80, SmArch.SM_86, SmArch.SM_89, SmArch.SM_90, SmArch.SM_100, SmArch.SM_120)
DTYPES = (DType.F16, DType.BF16)
AXES: dict[str, tuple[Any, ...]] = {
    "arch": ARCHS,
    "dtype": DTYPES,
    "head_dim": (128, 104),  # 104 needs column tests in a 128 wide tile
    "window": (None, (-1, 0), (-1, 5), (64, -1), (64, 0), (64, 32)),
    "sink": (0, 4),
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
    "widths": (*WGMMA_WIDTHS, (56, 56), (104, 104)),
    **{axis: AXES[axis] for axis in ("window", "sink", "softcap", "scale_first", "learned_sink", "varlen")},
    # Query heads that share K and V are packed unless slopes or dropout tell them apart: one axis, so that packing meets all the others.
    "heads": tuple(
        {"gqa_ratio": ratio, "alibi": alibi, "dropout": dropout}
        for ratio, alibi, dropout in ((1, False, False), (4, False, False), (1, True, False), (1, False, True), (1, True, True))
    ),
    "persistent": (False, True),
    "short_q": (False, True),
}


def plain_specs() -> list[KernelSpec]:
    """Every arch, type and tile width, without any feature and causal, for few rows and for many."""
    return [
        _spec(DispatchKey(arch, dtype, width, causal=causal, extras=Extras(short_q=short_q)))
        for arch, dtype, width, causal, short_q in itertools.product(ARCHS, DTYPES, HEAD_DIM_WIDTHS, (False, True), (False, True))
    ]


def feature_specs() -> list[KernelSpec]:
    """A pairwise covering array over arch, type and every feature of the forward kernel."""
    return [_spec(_feature_key(row)) for row in covering_rows(AXES)]


def wgmma_plain_specs() -> list[KernelSpec]:
    """Every type and pair of tile widths of the wgmma family, without any feature, query heads packed and not."""
    return [
        _spec(DispatchKey(SmArch.SM_90A, dtype, d, gqa_ratio=ratio, extras=Extras(v_head_dim=dv, short_q=short_q)))
        for dtype, (d, dv), short_q, ratio in itertools.product(
            DTYPES, [*WGMMA_WIDTHS, *((width, width) for width in HEAD_DIM_WIDTHS)], (False, True), (1, 4)
        )
    ]


def wgmma_feature_specs() -> list[KernelSpec]:
    """A pairwise covering array over type, widths and every feature of the wgmma family."""
    return [_spec(_feature_key(row | row["heads"])) for row in covering_rows(WGMMA_AXES)]


def wgmma_crowded_specs() -> list[KernelSpec]:
    """Tiles of three and four computing warpgroups, whose registers are the scarcest, with all features at once that they are given."""
    everything = {"window": (64, 32), "sink": 4, "scale_first": True, "learned_sink": True, "varlen": True}
    rows = [
        {
            **everything,
            "arch": SmArch.SM_90A,
            "dtype": DType.BF16,
            "widths": (width, width),
            "alibi": alibi,
            "softcap": softcap,
            "dropout": dropout,
            "short_q": short_q,
            "gqa_ratio": ratio,
        }
        for width in (24, 56, 64, 96, 128)
        for alibi, softcap in ((False, 30.0), (True, 0.0), (True, 30.0))
        for dropout in (False, True)
        for short_q in (False, True)
        for ratio in (1, 4)
    ]
    return [_spec(_feature_key(row)) for row in rows]


def dropout_mask_specs() -> list[KernelSpec]:
    """The kernel that writes the keep pattern."""
    extras = Extras(direction="dropout_mask", dropout=True)
    return [_spec(DispatchKey(arch, DType.F16, 64, varlen=varlen, extras=extras)) for arch in ARCHS for varlen in (False, True)]


def all_specs() -> list[KernelSpec]:
    """Every kernel of this folder's tests, each once."""
    wgmma = (*wgmma_plain_specs(), *wgmma_feature_specs(), *wgmma_crowded_specs())
    return list(dict.fromkeys([*plain_specs(), *feature_specs(), *wgmma, *dropout_mask_specs()]))


def _feature_key(row: dict[str, Any]) -> DispatchKey:
    window = row["window"]
    head_dim, v_head_dim = row["widths"] if "widths" in row else (row["head_dim"],) * 2
    bounded = window is not None and window[0] >= 0
    return DispatchKey(
        row["arch"],
        row["dtype"],
        head_dim,
        causal=window is not None and window[1] == 0,
        varlen=row["varlen"],
        sliding_window=window,
        alibi=row["alibi"],
        sink=row["sink"] if bounded else 0,  # without a left bound a sink is refused
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
