"""From what is asked to the kernel that does it: DispatchKey -> lookup -> KernelSpec. The names here are public."""

from __future__ import annotations

from ..errors import DispatchError
from ..types import DType, SmArch
from .arch import arch_of_capability, best_arch
from .choice import key_of_backward, key_of_merge, key_of_problem
from .features import FEATURES, with_features
from .key import DispatchKey, Extras
from .protocols import F16, Bf16, F8E4m3, F8E5m2, FaBwdDispatch, FaFwdDispatch, FaPagedFwdDispatch, GemmSupported
from .resolve import CpuSpec, forget_lookups, lookup
from .table import DISPATCH_TABLE, Cell, DispatchTable, cells

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
    "cells",
    "forget_lookups",
    "key_of_backward",
    "key_of_merge",
    "key_of_problem",
    "lookup",
    "with_features",
]
