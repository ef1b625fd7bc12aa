"""The wgmma family over a cache of fp8 K and V: ``cuda/kernels/fa3_fp8_kvcache.cuh``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

from ..problem import ArrayInfo, AttentionProblem
from .fa3_fp8 import Fp8Wgmma
from .fa3_kvcache import Fa3KvCacheSpec
from .forward import DESCALE_SLOTS, descale_strides
from .kvcache import KvCacheParams, cache_numbers
from .params import KernelParams, StrideParams, TensorMapParams

__all__ = ["Fa3Fp8KvCacheParams", "Fa3Fp8KvCacheSpec"]

_BEFORE_MAPS = 24 + ctypes.sizeof(KvCacheParams) + 3 * ctypes.sizeof(StrideParams) + 16


class Fa3Fp8KvCacheParams(KernelParams):
    """``fa::Fa3Fp8KvCacheParams``. The addresses of its factors run on into those of ``fa::KvCacheParams``."""

    SLOTS = (*DESCALE_SLOTS, *KvCacheParams.SLOTS)
    MAPS = (("q_map", "q"), ("k_map", "k"), ("v_map", "v"))
    _fields_ = (
        *((name, ctypes.c_void_p) for name in DESCALE_SLOTS),
        ("params", KvCacheParams),
        *((f"{name}_stride", StrideParams) for name in DESCALE_SLOTS),
        ("counters", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("tiles", "box_rows")),
        ("_alignment", ctypes.c_ubyte * (-_BEFORE_MAPS % 64)),  # the maps begin at a multiple of 64
        *((name, TensorMapParams) for name, _ in MAPS),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa3Fp8KvCacheSpec(Fp8Wgmma, Fa3KvCacheSpec):
    """The mainloop of :class:`~.fa3_fp8.Fa3Fp8ForwardSpec` with K and V in a cache. sm_90a."""

    HEADER: ClassVar[str] = "fa3_fp8_kvcache"
    ENTRY: ClassVar[str] = "fa3_fp8_kvcache"
    PARAMS: ClassVar[str] = "Fa3Fp8KvCacheParams"

    def pack_call(self, problem: AttentionProblem, out: ArrayInfo, splits: int) -> KernelParams:
        """``fa::Fa3Fp8KvCacheParams`` of one call without addresses, its maps still to be encoded."""
        cache = problem.cache
        if cache is None:
            raise ValueError("a problem without a cache has no parameters of one")
        params = Fa3Fp8KvCacheParams(
            params=KvCacheParams(fwd=self.pack_forward(problem, out), **cache_numbers(problem, cache, splits)),
            **descale_strides(problem),
            tiles=self.work_tiles(problem) * splits,
            box_rows=self._box_rows(cache),
        )
        params.tensor_maps = self.tensor_maps(problem)
        params.counts = self.tile.persistent
        return params
