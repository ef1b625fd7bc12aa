"""fp8 calls on the emulator: problem, key, kernel, parameters, grid."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.dispatch import key_of_problem, lookup
from atomr_accel_flashattn.kernels.fa3_fp8 import Fa3Fp8ForwardSpec
from atomr_accel_flashattn.problem import Descale, Descales, Strides
from atomr_accel_flashattn.runtime.plan import Outputs
from atomr_accel_flashattn.types import DType, ScaleUnit, SmArch
from tests.check import Run
from tests.fp8 import DTYPES
from tests.inputs import Inputs, Layout, Poisoned
from tests.reference.running import problem_of

from .running import launch

if TYPE_CHECKING:
    from atomr_accel_flashattn.kernels.spec import Tile
    from atomr_accel_flashattn.problem import AttentionProblem
    from tests.fp8 import Quantised

__all__ = ["emulate_fp8", "fp8_problem"]


def fp8_problem(call: Quantised, out_dtype: DType) -> AttentionProblem:
    """The normal form of a call, as a request would make it."""
    stored: Inputs = replace(call.meant, q=call.q, k=call.k, v=call.v)
    descales = Descales(*(_descale(call.descales.get(name), name) for name in ("q_descale", "k_descale", "v_descale")))
    return replace(problem_of(stored), descales=descales, out_dtype=out_dtype)


def emulate_fp8(call: Quantised, out_dtype: DType, *, tile: Tile | None = None, seed: int = 0, **changes: Any) -> Run:
    """A run of the kernel that ``lookup`` gives, or of the same with another tile or other fields."""
    out = Poisoned.empty(call.meant.out_shape, DTYPES[out_dtype], Layout.PADDED)
    lse = np.full(call.meant.lse_shape, np.nan, np.float32)
    problem, out_info = fp8_problem(call, out_dtype), read_array(out.view, "out")
    spec = lookup(key_of_problem(problem, SmArch.SM_90A, out_info))
    assert isinstance(spec, Fa3Fp8ForwardSpec)
    spec = replace(spec, **changes, **({} if tile is None else {"tile": tile}))
    assert not spec.misfit()
    assert spec.shared_memory <= SmArch.SM_90A.shared_memory_per_block, f"{spec.tile} takes {spec.shared_memory} bytes of shared memory"
    launch(spec, problem, Outputs(out_info, read_array(lse, "lse")), seed)
    out.check()
    return Run(out.view, lse)


def _descale(x: Any, name: str) -> Descale | None:
    if x is None:
        return None
    steps = [step // 4 for step in x.strides]
    if x.ndim == 0:
        return Descale(read_array(x, name), ScaleUnit.TENSOR, Strides(0, 0, 0))
    if x.ndim == 2:
        return Descale(read_array(x, name), ScaleUnit.HEAD, Strides(steps[0], 0, steps[1]))
    return Descale(read_array(x, name), ScaleUnit.BLOCK, Strides(steps[0], steps[2], steps[1]))
