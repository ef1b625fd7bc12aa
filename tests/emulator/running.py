"""The whole way of a call with the emulator in place of the driver: request, key, spec, source, parameters, grid."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.dispatch import key_of_problem, lookup
from atomr_accel_flashattn.kernels.forward import FwdParams
from atomr_accel_flashattn.kernels.params import (
    TensorMapSpec,
    dropout_mask_grid,
    forward_grid,
    pack_dropout_mask,
    pack_fa3_forward,
    pack_forward,
)
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec, Tile
from atomr_accel_flashattn.launch.tensor_map import tensor_map_specs
from atomr_accel_flashattn.types import SmArch
from tests.check import Run
from tests.inputs import Inputs, Layout, Poisoned
from tests.reference.running import problem_of

from .build import run

if TYPE_CHECKING:
    from atomr_accel_flashattn.dispatch.key import DispatchKey
    from atomr_accel_flashattn.problem import AttentionProblem

_PERSISTENT_BLOCKS = 3


def emulate(inputs: Inputs, *, arch: SmArch = SmArch.SM_90, tile: Tile | None = None, family: Family = Family.FA2, seed: int = 0) -> Run:
    """What :func:`tests.check.check_case` calls: the kernel that ``lookup`` gives on ``arch``, or the same with another tile or family."""
    out_layout = Layout.ODD if inputs.q.strides[-2] % 16 else Layout.PADDED
    out = Poisoned.empty(inputs.out_shape, inputs.q.dtype, out_layout)
    lse = np.full(inputs.lse_shape, np.nan, np.float32)
    problem = problem_of(inputs)
    out_info = read_array(out.view, "out")
    key = key_of_problem(problem, SmArch.SM_90A if family is Family.FA3 else arch, out_info)
    spec = lookup(key)
    assert isinstance(spec, KernelSpec)
    assert spec.family is family
    if tile is not None:
        spec = replace(spec, tile=tile)
    # The emulator has little more than a block of this GPU, and writes beyond it are not seen.
    assert spec.shared_memory <= SmArch.SM_90A.shared_memory_per_block, f"{spec.tile} takes {spec.shared_memory} bytes of shared memory"
    if out.view.size and spec.family is Family.FA3:
        _run_fa3(problem, spec, pack_forward(problem, out_info, lse.ctypes.data, spec), seed)
    elif out.view.size:
        grid = forward_grid(problem, spec)
        params = pack_forward(problem, out_info, lse.ctypes.data, spec)
        run(spec, params, min(grid, _PERSISTENT_BLOCKS) if spec.tile.persistent else grid, seed=seed)
    out.check()
    return Run(out.view, lse, _keep_pattern(problem, key, inputs, seed) if inputs.dropout_p else None)


def _run_fa3(problem: AttentionProblem, spec: KernelSpec, forward: FwdParams, seed: int) -> None:
    counters = np.zeros(2, np.int32)
    q_map, k_map, v_map = (flat_tensor(each) for each in tensor_map_specs(problem, spec))
    tiles = forward_grid(problem, spec)
    params = pack_fa3_forward(forward, (q_map, k_map, v_map), counters.ctypes.data, tiles)
    run(spec, params, min(tiles, _PERSISTENT_BLOCKS) if spec.tile.persistent else tiles, seed=seed)
    assert not counters.any(), "a persistent kernel must leave its counters zero"


def flat_tensor(spec: TensorMapSpec) -> bytes:
    """What tests/emulator/ptx/tma.cuh reads in place of a CUtensorMap: FlatTensor."""
    assert all(step % 16 == 0 for step in spec.strides), f"strides {spec.strides} of a tensor map are no multiples of 16 bytes"
    assert spec.ptr % 16 == 0, "a tensor map starts on a multiple of 16 bytes"
    more = (1,) * (5 - len(spec.sizes))
    strides, sizes, box = (*spec.strides, *more), (*spec.sizes, *more), (*spec.box, *more)
    return struct.pack("<Q4q5i5ii", spec.ptr, *strides, *sizes, *box, len(spec.sizes)).ljust(128, b"\0")


def _keep_pattern(problem: AttentionProblem, key: DispatchKey, inputs: Inputs, seed: int) -> Any:
    keep = np.full(inputs.keep_shape, 0x55, np.uint8)
    spec = lookup(replace(key, extras=replace(key.extras, direction="dropout_mask")))
    assert isinstance(spec, KernelSpec)
    if keep.size:
        run(spec, pack_dropout_mask(problem, keep.ctypes.data), dropout_mask_grid(problem), seed=seed)
    assert keep.max(initial=0) <= 1, "the pattern has bytes that are neither 0 nor 1"
    return keep.view(np.bool_)
