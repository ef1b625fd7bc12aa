"""The kernels that are compiled without a GPU: every arch, type and tile width plain, and all features in pairs at head dim 128."""

from __future__ import annotations

import itertools
from typing import Any

from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup
from atomr_accel_flashattn.jit.spec import KernelSpec
from atomr_accel_flashattn.jit.tiles import HEAD_DIM_WIDTHS
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
    "prescale": (False, True),
    "learned_sink": (False, True),
    "dropout": (False, True),
    "varlen": (False, True),
    "load_align": (16, 2),
}


def plain_specs() -> list[KernelSpec]:
    """Every arch, type and tile width, without any feature."""
    return [_spec(DispatchKey(arch, dtype, width)) for arch, dtype, width in itertools.product(ARCHS, DTYPES, HEAD_DIM_WIDTHS)]


def feature_specs() -> list[KernelSpec]:
    """A pairwise covering array over arch, type and every feature of the forward kernel."""
    return [_spec(_feature_key(row)) for row in covering_rows(AXES)]


def dropout_mask_specs() -> list[KernelSpec]:
    """The kernel that writes the keep pattern."""
    extras = Extras(direction="dropout_mask", dropout=True)
    return [_spec(DispatchKey(arch, DType.F16, 64, varlen=varlen, extras=extras)) for arch in ARCHS for varlen in (False, True)]


def all_specs() -> list[KernelSpec]:
    """Every kernel of this folder's tests, each once."""
    return list(dict.fromkeys([*plain_specs(), *feature_specs(), *dropout_mask_specs()]))


def _feature_key(row: dict[str, Any]) -> DispatchKey:
    window = row["window"]
    bounded = window is not None and window[0] >= 0
    return DispatchKey(
        row["arch"],
        row["dtype"],
        row["head_dim"],
        causal=window is not None and window[1] == 0,
        varlen=row["varlen"],
        sliding_window=window,
        alibi=row["alibi"],
        sink=row["sink"] if bounded else 0,  # without a left bound a sink is refused
        extras=Extras(
            softcap=row["softcap"],
            dropout=row["dropout"],
            learned_sink=row["learned_sink"],
            load_align=row["load_align"],
            prescale=row["prescale"],
        ),
    )


def _spec(key: DispatchKey) -> KernelSpec:
    spec = lookup(key)
    assert isinstance(spec, KernelSpec)
    return spec
