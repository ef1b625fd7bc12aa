"""run: from a request to an answer. Key, lookup, outputs, kernel, parameters, launch; or, for arrays in host memory, the CPU backend."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from .arrays import as_numpy, contiguous_strides, current_stream, empty_like_framework, raw_stream
from .dispatch import CpuSpec, DispatchKey, Extras, FaFwdDispatch, lookup
from .env import settings
from .errors import ArrayTypeError, DeviceMismatchError, ShapeError
from .jit.counters import counters_for
from .jit.driver import device_properties
from .jit.launch import LoadedKernel, launch, load_kernel
from .jit.params import (
    Fa3FwdParams,
    FwdParams,
    dropout_mask_grid,
    forward_grid,
    forward_pointers,
    pack_dropout_mask,
    pack_fa3_forward,
    pack_forward,
)
from .jit.spec import Family, KernelSpec
from .jit.tensor_map import encode, tensor_map_specs
from .problem import ArrayInfo, AttentionProblem
from .reference import attention as reference
from .request_plans import Key, RequestPlan, find, keep, key_of
from .short_repr import ShortRepr
from .torch_hooks import empty_on, hooks, meet_torch
from .types import Device, DType, SmArch

__all__ = ["Launch", "Output", "Outputs", "execute", "fill", "make_outputs", "run"]

_MAX_GRID: Final = 2**31 - 1


@dataclass(slots=True, eq=False, repr=False)
class Output(ShortRepr):
    """What a forward call made, in the library of q (or of ``out``, when the caller brought one).

    Attributes:
        out: o, shaped like q with v's head dim.
        lse: float32 (B, Hq, Sq), packed (Hq, total_q); None when it was not asked for.
        dropout_mask: bool, True where kept, (B, Hq, Sq, Sk), with the longest lengths when packed; None when not asked for, or without
            dropout.
    """

    out: Any
    lse: Any = None
    dropout_mask: Any = None


@dataclass(slots=True, eq=False)
class Outputs:
    """The arrays that a call writes, described. They may be made by one thread (on its stream) and written by another."""

    out: ArrayInfo
    lse: ArrayInfo | None = None
    dropout_mask: ArrayInfo | None = None

    def for_user(self, request: FaFwdDispatch) -> Output:
        """The arrays themselves: the caller's own ``out`` where there was one."""
        out = self.out.source if request.out_array is None else getattr(request, "out", self.out.source)
        return Output(out, self.lse and self.lse.source, self.dropout_mask and self.dropout_mask.source)


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A forward launch that was made, for the plan cache to repeat with other addresses."""

    kernel: LoadedKernel
    grid: int
    params: FwdParams | Fa3FwdParams


def run(
    request: FaFwdDispatch, *, stream: Any = None, lse: bool = True, dropout_mask: bool = False, tiles_for: SmArch | None = None
) -> Output:
    """Do what a request asks. On a GPU, a request that is like one of before, or the same one, costs little (request_plans.py).

    Args:
        request: a DenseFwdRequest, Fa2FwdRequest, Fa3FwdRequest or VarlenFwdRequest, or anything that satisfies FaFwdDispatch.
        stream: the CUDA stream to enqueue on (a raw handle, or a stream of torch, CuPy or cuda.core); None is the current stream of q's
            library. New outputs, and a dropout seed that is drawn, belong to that library's current stream, as ever: a caller who names
            another stream orders the two, and so does one whose k or v come from another library than q.
        lse: whether the log-sum-exp is wanted.
        dropout_mask: whether the dropout pattern is wanted; it takes O(Sq Sk) memory.
        tiles_for: the arch whose tiles are borrowed, for tests.

    Raises:
        DispatchError: no kernel does this.
        DeviceMismatchError: the arrays are not where ATOMR_FLASHATTN_BACKEND wants them.
        RuntimeFlashAttnError: no driver, no compiler, a kernel that does not compile or launch.
    """
    key = None if dropout_mask or tiles_for is not None else key_of(request)
    plan = find(key)
    if plan is None:
        resolved = _resolve(request, tiles_for)
        outputs = make_outputs(request, lse=lse, dropout_mask=dropout_mask)
        _fill_first(request.problem, key, resolved, outputs, stream)
    else:
        _check_backend(request.problem.q.device)
        outputs = make_outputs(request, lse=lse, out_strides=plan.out_strides)
        _fill_again(request, key, plan, outputs, stream)
    return outputs.for_user(request)


def execute(
    request: FaFwdDispatch, *, stream: Any = None, lse: bool, dropout_mask: bool = False, tiles_for: SmArch | None = None
) -> tuple[Output, Launch | None]:
    """:func:`run` the whole way, whatever was run before, and the launch it made; None from the CPU backend and for empty outputs."""
    key, spec = _resolve(request, tiles_for)
    outputs = make_outputs(request, lse=lse, dropout_mask=dropout_mask)
    return outputs.for_user(request), _fill(request.problem, key, spec, outputs, stream)


def make_outputs(request: FaFwdDispatch, *, lse: bool, dropout_mask: bool = False, out_strides: tuple[int, ...] | None = None) -> Outputs:
    """The arrays that a call writes: the request's own ``out``, new ones for the rest, on the current stream of q's library.

    ``out_strides``: what a call like this one got, of its plan; torch tensors on a GPU are made from them for a third of the cost.
    """
    problem = request.problem
    if not hooks.plain_types:
        meet_torch()
    if out_strides is not None and not dropout_mask and request.out_array is None and type(problem.q.source) in hooks.plain_types:
        return _tensors_again(problem, out_strides, lse=lse)
    out = request.out_array or empty_like_framework(problem.q, problem.out_shape)
    return Outputs(
        out,
        _beside(out, problem.lse_shape, "float32") if lse else None,
        _beside(out, problem.dropout_mask_shape, "bool") if dropout_mask and problem.dropout is not None else None,
    )


def fill(request: FaFwdDispatch, outputs: Outputs, *, stream: Any = None) -> None:
    """Do what a request asks, into arrays that :func:`make_outputs` made, perhaps in another thread. Arguments and errors: :func:`run`."""
    key = None if outputs.dropout_mask is not None else key_of(request)
    plan = find(key)
    if plan is None:
        _fill_first(request.problem, key, _resolve(request, None), outputs, stream)
    else:
        _check_backend(request.problem.q.device)
        _fill_again(request, key, plan, outputs, stream)


def _fill_first(
    problem: AttentionProblem, key: Key | None, resolved: tuple[DispatchKey, KernelSpec | CpuSpec], outputs: Outputs, stream: Any
) -> None:
    """The whole way, which leaves a plan under ``key``."""
    made = _fill(problem, *resolved, outputs, stream)
    if made is not None and key is not None:
        keep(key, RequestPlan(made.kernel.plan(made.params, made.grid), outputs.out.strides))


def _fill_again(request: FaFwdDispatch, key: Key | None, plan: RequestPlan, outputs: Outputs, stream: Any) -> None:
    """Repeat a launch; the whole way where the library of q, or an earlier one, gave the new output other strides."""
    problem, out, lse = request.problem, outputs.out, outputs.lse
    if out.strides != plan.out_strides:
        _fill_first(problem, key, _resolve(request, None), outputs, stream)
        return
    raw = current_stream(problem.q) if stream is None else raw_stream(stream)
    plan.launch.launch(raw, forward_pointers(problem, out, None if lse is None else lse.ptr))


def _resolve(request: FaFwdDispatch, tiles_for: SmArch | None) -> tuple[DispatchKey, KernelSpec | CpuSpec]:
    if isinstance(request, type) or not isinstance(request, FaFwdDispatch):
        raise ArrayTypeError(
            f"request: got {type(request).__qualname__}; allowed is a DenseFwdRequest, Fa2FwdRequest, Fa3FwdRequest or VarlenFwdRequest"
        )
    device = request.problem.q.device
    _check_backend(device)
    key = request.dispatch_key()
    if tiles_for is not None:
        key = replace(key, extras=replace(key.extras, tiles_for=tiles_for))
    return key, lookup(key)


def _fill(problem: AttentionProblem, key: DispatchKey, spec: KernelSpec | CpuSpec, outputs: Outputs, stream: Any) -> Launch | None:
    out, lse, mask = outputs.out, outputs.lse, outputs.dropout_mask
    if not isinstance(spec, KernelSpec):
        reference.forward(problem, as_numpy(out), None if lse is None else as_numpy(lse), None if mask is None else as_numpy(mask))
        return None
    raw = current_stream(problem.q) if stream is None else raw_stream(stream)
    made = _launch_forward(problem, key, spec, outputs, raw)
    if mask is not None:
        _launch_dropout_mask(problem, key, mask, raw)
    return made


def _check_backend(device: Device) -> None:
    backend = settings().backend
    if (backend, device.kind) in {("cpu", "cuda"), ("gpu", "cpu")}:
        raise DeviceMismatchError(
            f"q: got an array on {device} with ATOMR_FLASHATTN_BACKEND={backend}; allowed are arrays on the {backend}; "
            "move them, or unset the variable"
        )


def _beside(out: ArrayInfo, shape: tuple[int, ...], dtype_name: str) -> ArrayInfo:
    """A second output in the library of ``out``; NumPy or DeviceArray where that library cannot be allocated with."""
    return empty_like_framework(out, shape, dtype_name, fallback=True)


def _tensors_again(problem: AttentionProblem, out_strides: tuple[int, ...], *, lse: bool) -> Outputs:
    """New torch tensors whose shapes and strides are known, and need not be read."""
    q, shape = problem.q, problem.out_shape
    out = empty_on(q.device.index, q.source, (shape, out_strides, q.source.dtype))
    outputs = Outputs(ArrayInfo(out.data_ptr(), shape, out_strides, q.dtype, q.dtype_name, q.device, out))
    if lse:
        shape = problem.lse_shape
        strides = contiguous_strides(shape)
        out = empty_on(q.device.index, q.source, (shape, strides, sys.modules["torch"].float32))
        outputs.lse = ArrayInfo(out.data_ptr(), shape, strides, DType.F32, "float32", q.device, out)
    return outputs


def _launch_forward(problem: AttentionProblem, key: DispatchKey, spec: KernelSpec, outputs: Outputs, stream: int) -> Launch | None:
    if not prod(problem.out_shape):
        return None
    out, lse = outputs.out, outputs.lse
    grid = forward_grid(problem, spec)
    _check_grid(grid, problem)
    params = pack_forward(problem, out, lse.ptr if lse is not None else None, spec)
    if spec.family is Family.FA3:
        made = _prepare_fa3(problem, spec, params, grid, key, stream)
    else:
        index = problem.q.device.index
        if spec.tile.persistent:
            grid = min(grid, key.extras.persistent_blocks or device_properties(index).multiprocessors * spec.tile.min_blocks)
        made = Launch(load_kernel(spec, index), grid, params)
    launch(made.kernel, made.grid, made.params, stream)
    return made


def _prepare_fa3(problem: AttentionProblem, spec: KernelSpec, forward: FwdParams, tiles: int, key: DispatchKey, stream: int) -> Launch:
    """A launch of the wgmma family.

    Persistent blocks are as many as asked for, or one per multiprocessor. With no more tiles than that, and no word from the caller, each
    tile gets a block of its own, and the counters are not needed.
    """
    index = problem.q.device.index
    blocks = key.extras.persistent_blocks or device_properties(index).multiprocessors
    if key.extras.persistent is None and tiles <= blocks:
        spec = replace(spec, tile=replace(spec.tile, persistent=False))
    grid, counters = (min(tiles, blocks), counters_for(index, stream)) if spec.tile.persistent else (tiles, 0)
    q_map, k_map, v_map = (encode(each, index) for each in tensor_map_specs(problem, spec))
    return Launch(load_kernel(spec, index), grid, pack_fa3_forward(forward, (q_map, k_map, v_map), counters, tiles))


def _launch_dropout_mask(problem: AttentionProblem, key: DispatchKey, mask: ArrayInfo, stream: int) -> None:
    spec = lookup(DispatchKey(key.arch, key.dtype, key.head_dim, varlen=key.varlen, extras=Extras(direction="dropout_mask", dropout=True)))
    if not isinstance(spec, KernelSpec) or not prod(problem.dropout_mask_shape):
        return
    grid = dropout_mask_grid(problem)
    _check_grid(grid, problem)
    launch(load_kernel(spec, problem.q.device.index), grid, pack_dropout_mask(problem, mask.ptr), stream)


def _check_grid(grid: int, problem: AttentionProblem) -> None:
    if grid > _MAX_GRID:
        raise ShapeError(
            f"q: got batch {problem.batch}, {problem.heads} heads and length {problem.seqlen_q}, which makes {grid} thread blocks; "
            f"allowed are {_MAX_GRID}; split the batch over several calls"
        )
