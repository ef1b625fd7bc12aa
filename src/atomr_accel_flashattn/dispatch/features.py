"""Each feature of the design as a change of a key: the rows of the support matrix, and the vocabulary of ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from ..errors import DispatchError
from ..kernels.spec import Family
from ..types import DType, ScaleUnit
from .key import DispatchKey

__all__ = ["FEATURES", "with_features"]


def _extra(**changes: Any) -> Callable[[DispatchKey], DispatchKey]:
    return lambda key: replace(key, extras=replace(key.extras, **changes))


def _plain(**changes: Any) -> Callable[[DispatchKey], DispatchKey]:
    return lambda key: replace(key, **changes)


_FP8_KV: Final[Mapping[str, Any]] = {"k_dtype": DType.F8E4M3, "v_dtype": DType.F8E4M3}

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
    "scale_first": _extra(scale_first=True),
    "short_q": _extra(short_q=True),
    "backward": _extra(direction="bwd"),
    "deterministic": _extra(direction="bwd", deterministic=True),
    "head_split": lambda key: replace(key, gqa_ratio=max(8, key.gqa_ratio), extras=replace(key.extras, direction="bwd", head_split=True)),
    "paged": _plain(paged=True),
    "kv_layout": lambda key: replace(key, paged=True, extras=replace(key.extras, kv_layout="HND")),
    "kv_cache": _extra(kv_cache=True),
    "paged_fa3": lambda key: replace(key, paged=True, extras=replace(key.extras, family=Family.FA3)),
    "left_pad": _extra(kv_cache=True, left_pad=True),
    "split": lambda key: replace(key, extras=replace(key.extras, split=True, kv_cache=not key.paged)),
    "plain_split": _extra(split=True),
    "scheduled": lambda key: replace(key, extras=replace(key.extras, scheduled=True, kv_cache=not key.paged)),
    "batch_invariant": _extra(batch_invariant=True),
    "fp8_kv": _extra(**_FP8_KV),
    "fp8_block_descales": lambda key: replace(
        key, dtype=DType.F8E4M3, extras=replace(key.extras, k_descale=ScaleUnit.BLOCK, v_descale=ScaleUnit.BLOCK)
    ),
    "fp8_cache": lambda key: replace(
        key, paged=True, extras=replace(key.extras, **_FP8_KV, k_descale=ScaleUnit.TOKEN, v_descale=ScaleUnit.TOKEN)
    ),
    "merge_states": _extra(direction="merge_states"),
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
