"""The whole way of a call with the emulator in place of the driver: request, key, spec, source, parameters, grid."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.dispatch import key_of_problem, lookup
from atomr_accel_flashattn.kernels.forward import ForwardSpec
from atomr_accel_flashattn.kernels.params import TensorMapSpec
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec, Tile
from atomr_accel_flashattn.runtime.plan import Outputs, addresses_of, slots_of
from atomr_accel_flashattn.types import SmArch
from tests.cases import Case
from tests.check import Run, check_case
from tests.inputs import Inputs, Layout, Poisoned
from tests.reference.running import problem_of

from .build import run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from atomr_accel_flashattn.dispatch.key import DispatchKey
    from atomr_accel_flashattn.problem import AttentionProblem

_MULTIPROCESSORS = 3  # so few that persistent blocks take many tiles


def emulate(inputs: Inputs, *, arch: SmArch = SmArch.SM_90, tile: Tile | None = None, family: Family = Family.FA2, seed: int = 0) -> Run:
    """What :func:`tests.check.check_case` calls: the kernel that ``lookup`` gives on ``arch``, or the same with another tile or family."""
    out_layout = Layout.ODD if inputs.q.strides[-2] % 16 else Layout.PADDED
    out = Poisoned.empty(inputs.out_shape, inputs.q.dtype, out_layout)
    lse = np.full(inputs.lse_shape, np.nan, np.float32)
    problem = problem_of(inputs)
    out_info = read_array(out.view, "out")
    key = key_of_problem(problem, SmArch.SM_90A if family is Family.FA3 else arch, out_info)
    spec = lookup(key)
    assert isinstance(spec, ForwardSpec)
    assert spec.family is family
    if tile is not None:
        spec = replace(spec, tile=tile)
    # The emulator has little more than a block of this GPU, and writes beyond it are not seen.
    assert spec.shared_memory <= SmArch.SM_90A.shared_memory_per_block, f"{spec.tile} takes {spec.shared_memory} bytes of shared memory"
    outputs = Outputs(out_info, read_array(lse, "lse"))
    launch(spec, problem, outputs, seed)
    out.check()
    return Run(out.view, lse, _keep_pattern(problem, key, outputs, inputs, seed) if inputs.dropout_p else None)


def check_orders(case: Case, seeds: Iterable[int], **options: Any) -> None:
    """The answer is right, and has the same bits in every order of threads and copies that ``seeds`` draw."""
    runs: list[Run] = []

    def run_all(inputs: Inputs) -> Run:
        runs.extend(emulate(inputs, seed=seed, **options) for seed in seeds)
        return runs[0]

    check_case(case, run_all)
    for seed, other in zip(seeds, runs, strict=True):
        for what, one, another in zip(("out", "lse"), runs[0], other, strict=False):
            assert one.tobytes() == another.tobytes(), f"seed {seed} gives other bits of {what}"


def launch(spec: KernelSpec, problem: AttentionProblem, outputs: Outputs, seed: int) -> None:
    """What a plan's launch does, with the emulator's maps and counters."""
    tiles = spec.work_tiles(problem)
    if not tiles:
        return
    params: Any = spec.pack(problem, outputs.out)
    addresses = dict(zip(slots_of(problem, outputs), addresses_of(problem, outputs), strict=True))
    (ctypes.c_uint64 * len(params.SLOTS)).from_buffer(params)[:] = [addresses[name] for name in params.SLOTS]
    for (name, _), described in zip(params.MAPS, params.tensor_maps, strict=True):
        ctypes.memmove(ctypes.addressof(getattr(params, name)), flat_tensor(described), 128)
    counters = np.zeros(2, np.int32)
    if params.counts:
        params.counters = counters.ctypes.data
    run(spec, params, spec.grid(tiles, _MULTIPROCESSORS, _MULTIPROCESSORS), seed=seed)
    assert not counters.any(), "a persistent kernel must leave its counters zero"


def flat_tensor(spec: TensorMapSpec) -> bytes:
    """What tests/emulator/ptx/tma.cuh reads in place of a CUtensorMap: FlatTensor."""
    assert all(step % 16 == 0 for step in spec.strides), f"strides {spec.strides} of a tensor map are no multiples of 16 bytes"
    assert spec.ptr % 16 == 0, "a tensor map starts on a multiple of 16 bytes"
    more = (1,) * (5 - len(spec.sizes))
    strides, sizes, box = (*spec.strides, *more), (*spec.sizes, *more), (*spec.box, *more)
    return struct.pack("<Q4q5i5iii", spec.ptr, *strides, *sizes, *box, len(spec.sizes), spec.dtype.itemsize).ljust(128, b"\0")


def _keep_pattern(problem: AttentionProblem, key: DispatchKey, outputs: Outputs, inputs: Inputs, seed: int) -> Any:
    keep = np.full(inputs.keep_shape, 0x55, np.uint8)
    extras = replace(key.extras, direction="dropout_mask")
    spec = lookup(replace(key, extras=extras))
    assert isinstance(spec, KernelSpec)
    launch(spec, problem, replace(outputs, dropout_mask=read_array(keep.view(np.bool_), "keep")), seed)
    assert keep.max(initial=0) <= 1, "the pattern has bytes that are neither 0 nor 1"
    return keep.view(np.bool_)
