"""Attention over a cache of fp8 K and V: ``cuda/kernels/fp8_kvcache.cuh``, and ``fp8_step_kvcache.cuh`` in the blocks of a StepPlan.

The first answers dense and packed calls, too. They are the kernels of 16 bits with descales, and with operands of another type
(``cuda/attention/cache_operands.cuh``).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar, Final

from ..problem import ArrayInfo, AttentionProblem
from ..types import SmArch
from .forward import DESCALE_SLOTS, descale_strides
from .kvcache import Fa2KvCacheSpec, KvCacheParams
from .params import KernelParams, StrideParams
from .step import ScheduledKvCacheSpec, StepParams

__all__ = ["FP8_PRODUCTS", "DescaledKvCacheParams", "DescaledStepParams", "Fp8KvCacheSpec", "Fp8ScheduledKvCacheSpec"]

FP8_PRODUCTS: Final = frozenset({SmArch.SM_89, SmArch.SM_120})  # whose mma.sync multiplies fp8; others compile it to products of f16
_STRIDES: Final = tuple((f"{name}_stride", StrideParams) for name in DESCALE_SLOTS)


def _instructions(spec: Fa2KvCacheSpec) -> tuple[str, ...]:
    products = ("QMMA",) if spec.fp8_products and spec.arch in FP8_PRODUCTS else ()
    return ("HMMA", "LDSM", "F2FP", *products, *(("LDGSTS",) if spec.aligned else ()))


class DescaledKvCacheParams(KernelParams):
    """``fa::DescaledKvCacheParams``. Its addresses run on into those of ``fa::KvCacheParams``."""

    SLOTS = (*DESCALE_SLOTS, *KvCacheParams.SLOTS)
    _fields_ = (*((name, ctypes.c_void_p) for name in DESCALE_SLOTS), ("params", KvCacheParams), *_STRIDES)


class DescaledStepParams(KernelParams):
    """``fa::DescaledStepParams``. Its addresses run on into those of ``fa::StepParams``."""

    SLOTS = (*DESCALE_SLOTS, *StepParams.SLOTS)
    _fields_ = (*((name, ctypes.c_void_p) for name in DESCALE_SLOTS), ("params", StepParams), *_STRIDES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8KvCacheSpec(Fa2KvCacheSpec):
    """K and V, of a cache or plain, are fp8; Q is, or has 16 bits. On every architecture that converts fp8: sm_89 and later."""

    HEADER: ClassVar[str] = "fp8_kvcache"
    ENTRY: ClassVar[str] = "fp8_kvcache"
    PARAMS: ClassVar[str] = "DescaledKvCacheParams"

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """mma.sync, ldmatrix, conversions, and cp.async where every address is aligned."""
        return _instructions(self)

    def pack_call(self, problem: AttentionProblem, out: ArrayInfo, parts: int) -> DescaledKvCacheParams:
        """``fa::DescaledKvCacheParams`` of one call without addresses; ``parts``: splits of its keys."""
        return DescaledKvCacheParams(params=self.pack_splits(problem, out, parts), **descale_strides(problem))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8ScheduledKvCacheSpec(ScheduledKvCacheSpec):
    """The same in the blocks of a StepPlan."""

    HEADER: ClassVar[str] = "fp8_step_kvcache"
    ENTRY: ClassVar[str] = "fp8_step_kvcache"
    PARAMS: ClassVar[str] = "DescaledStepParams"

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """mma.sync, ldmatrix, conversions, and cp.async where every address is aligned."""
        return _instructions(self)

    def pack_call(self, problem: AttentionProblem, out: ArrayInfo, parts: int) -> KernelParams:
        """``fa::DescaledStepParams`` of one call without addresses; ``parts``: blocks of a plan."""
        return DescaledStepParams(params=ScheduledKvCacheSpec.pack_call(self, problem, out, parts), **descale_strides(problem))
