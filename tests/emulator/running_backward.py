"""The backward's three kernels on the emulator: spec, source, parameters, grid, and workspaces full of NaN."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.dispatch import key_of_backward, lookup
from atomr_accel_flashattn.problem import GradientArrays
from atomr_accel_flashattn.types import SmArch
from tests.inputs import NUMPY_DTYPE, Inputs, Layout, Poisoned
from tests.oracle import Gradients, Upstream
from tests.reference.running import backward_problem_of

from .build import run

if TYPE_CHECKING:
    from atomr_accel_flashattn.problem import BackwardProblem

__all__ = ["emulate_backward"]


def emulate_backward(
    inputs: Inputs,
    upstream: Upstream,
    *,
    arch: SmArch = SmArch.SM_90,
    seed: int = 0,
    deterministic: bool = False,
    longest_q: int | None = None,
    splits: int = 1,
    offsets_q: Any = None,
    statistics_in_dq: bool = False,
) -> Gradients:
    """What :func:`tests.check.check_gradients` calls: the kernels of ``arch``, on o and LSE of the CPU backend.

    ``longest_q``: what a caller says that it is; None is the truth. ``splits``: blocks that share a tile of keys.
    ``offsets_q``: what lies in the place of the right ones when the kernels run. ``statistics_in_dq``: as where a call makes dq.
    """
    problem = replace(backward_problem_of(inputs, upstream), deterministic=deterministic)
    if offsets_q is not None:
        problem = replace(problem, forward=replace(problem.forward, cu_seqlens_q=read_array(offsets_q, "cu_seqlens_q")))
    if longest_q is not None:
        problem = replace(problem, forward=replace(problem.forward, seqlen_q=longest_q))
    layout = Layout.CONTIGUOUS if statistics_in_dq else Layout.ODD if inputs.q.strides[-2] % 16 else Layout.PADDED
    made = [Poisoned.empty(array.shape, NUMPY_DTYPE[inputs.dtype], layout) for array in (inputs.q, inputs.k, inputs.v)]
    dsink = None if inputs.learned_sink is None else np.full(inputs.heads, np.nan, np.float32)
    gradients = GradientArrays(*(read_array(each.view, name) for each, name in zip(made, ("dq", "dk", "dv"), strict=True)))
    key = key_of_backward(problem, gradients, arch)
    spec = lookup(replace(key, extras=replace(key.extras, head_split=splits > 1)))
    assert spec.shared_memory <= arch.shared_memory_per_block
    workspace = {
        **{name: np.full(size // 4, np.nan, np.float32) for name, size in spec.workspace(problem.forward, splits).items()},
        "dsink": dsink,
    }
    if statistics_in_dq:
        assert workspace.pop("statistics").nbytes <= made[0].view.nbytes
    addresses = _addresses(problem, gradients, workspace)
    addresses.setdefault("statistics", addresses["dq"])
    for step in spec.steps():
        tiles = step.work_tiles(problem.forward)
        if not tiles:
            continue
        params: Any = step.pack(problem, gradients, splits)
        (ctypes.c_uint64 * len(params.SLOTS)).from_buffer(params)[:] = [addresses[name] for name in params.SLOTS]
        run(step, params, step.grid(tiles, 1, splits), seed=seed)
    for each in made:
        each.check()
    dq, dk, dv = (each.view for each in made)
    return Gradients(dq, dk, dv, dsink)


def _addresses(problem: BackwardProblem, gradients: GradientArrays, workspace: dict[str, Any]) -> dict[str, int]:
    """Each slot's address; 0 for what a call does not have."""
    known = problem.forward
    infos: dict[str, Any] = {
        **{name: getattr(known, name) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "learned_sink")},
        "rng": known.dropout and known.dropout.rng,
        "o": problem.out,
        "lse": problem.lse,
        "dout": problem.dout,
        "dlse": problem.dlse,
        **gradients._asdict(),
    }
    addresses = {name: 0 if info is None else info.ptr for name, info in infos.items()}
    return addresses | {name: 0 if array is None else array.ctypes.data for name, array in workspace.items()}
