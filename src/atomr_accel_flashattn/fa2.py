"""Fa2FwdRequest and Fa2BwdRequest: a dense call, or its gradients, by the mma.sync family (FlashAttention-2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .dispatch import DispatchKey, best_arch, key_of_problem
from .kernels.spec import Family
from .requests.backward import DenseBwdRequest
from .requests.dense import DenseFwdRequest
from .requests.options import AttentionOptions, MaskKind, PositionBias
from .types import SmArch

__all__ = ["AttentionOptions", "Fa2BwdRequest", "Fa2FwdRequest", "MaskKind", "PositionBias"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Fa2FwdRequest(DenseFwdRequest):
    """Attention by FlashAttention-2 (arXiv 2307.08691), on any supported GPU. Attributes and errors: DenseFwdRequest."""

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key of this request on ``arch``; None is the best one for the device of q."""
        return key_of_problem(self.problem, arch or best_arch(self.problem.q.device), self.out_array, Family.FA2)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Fa2BwdRequest(DenseBwdRequest):
    """Gradients by FlashAttention-2 (arXiv 2307.08691, Algorithm 2). Attributes and errors: DenseBwdRequest."""

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()
