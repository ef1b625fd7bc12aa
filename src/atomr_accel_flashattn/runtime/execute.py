"""run: from a request to its answer. A plan, from the store or made here, and the arrays it writes; in host memory, the CPU backend.

Backward requests go on to :mod:`.gradients`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, overload

from ..arrays.new import empty_like_framework
from ..arrays.read import as_numpy, contiguous_strides
from ..arrays.streams import current_stream, raw_stream
from ..arrays.torch_hooks import empty_on, hooks, meet_torch, tell_written
from ..dispatch import CpuSpec, DispatchKey, Extras, FaBwdDispatch, FaFwdDispatch, lookup
from ..env import settings
from ..errors import ArrayTypeError, DeviceMismatchError, ShapeError, UnsupportedArgumentError
from ..kernels.spec import KernelSpec
from ..launch.driver import device_properties
from ..launch.launcher import Launch, load_kernel
from ..limits import MAX_GRID
from ..problem import ArrayInfo, AttentionProblem
from ..reference import attention as reference
from ..types import Device, DType, SmArch
from .gradients import Gradients, differentiate
from .plan import Output, Outputs, Plan, addresses_of, find, keep, slots_of

__all__ = ["execute", "fill", "make_outputs", "run"]


@overload
def run(
    request: FaFwdDispatch, *, stream: Any = None, lse: bool = True, dropout_mask: bool = False, tiles_for: SmArch | None = None
) -> Output: ...


@overload
def run(request: FaBwdDispatch, *, stream: Any = None) -> Gradients: ...


def run(
    request: FaFwdDispatch | FaBwdDispatch,
    *,
    stream: Any = None,
    lse: bool = True,
    dropout_mask: bool = False,
    tiles_for: SmArch | None = None,
) -> Output | Gradients:
    """Do what a request asks. On a GPU, a request that is like one of before, or the same one, costs little (runtime/plan.py).

    Args:
        request: a DenseFwdRequest, Fa2FwdRequest, Fa3FwdRequest or VarlenFwdRequest, or anything that satisfies FaFwdDispatch, for an
            Output; a DenseBwdRequest, Fa2BwdRequest or VarlenBwdRequest, or anything that satisfies FaBwdDispatch, for Gradients.
        stream: the CUDA stream to enqueue on (a raw handle, or a stream of torch, CuPy or cuda.core); None is the current stream of q's
            library. New outputs, and a dropout seed that is drawn, belong to that library's current stream, as ever: a caller who names
            another stream orders the two, and so does one whose k or v come from another library than q.
        lse: whether the log-sum-exp is wanted, of a forward request.
        dropout_mask: whether the dropout pattern is wanted, of a forward request; it takes O(Sq Sk) memory.
        tiles_for: the arch whose tiles are borrowed, for tests.

    Raises:
        DispatchError: no kernel does this.
        DeviceMismatchError: the arrays are not where ATOMR_FLASHATTN_BACKEND wants them.
        RuntimeFlashAttnError: no driver, no compiler, a kernel that does not compile or launch.
    """
    if hasattr(request, "gradient_arrays") and isinstance(request, FaBwdDispatch) and not isinstance(request, type):
        if not lse or dropout_mask or tiles_for is not None:
            raise UnsupportedArgumentError("run: got lse, dropout_mask or tiles_for with a backward request; allowed is stream")
        _check_backend(request.problem.forward.q.device)
        return differentiate(request)
    forward: Any = request
    return execute(forward, stream=stream, lse=lse, dropout_mask=dropout_mask, tiles_for=tiles_for)[0]


def execute(
    request: FaFwdDispatch, *, stream: Any = None, lse: bool, dropout_mask: bool = False, tiles_for: SmArch | None = None
) -> tuple[Output, Plan | None]:
    """:func:`run`, and the plan that it went by; None from the CPU backend."""
    if isinstance(request, type) or not isinstance(request, FaFwdDispatch):
        raise ArrayTypeError(
            f"request: got {type(request).__qualname__}; allowed is a DenseFwdRequest, Fa2FwdRequest, Fa3FwdRequest or "
            "VarlenFwdRequest, and of backward ones a DenseBwdRequest, Fa2BwdRequest or VarlenBwdRequest"
        )
    dropout_mask = dropout_mask and request.problem.dropout is not None
    plan = None if tiles_for is not None else find(request, dropout_mask=dropout_mask)
    key = None
    if plan is None:  # what is refused is refused before anything is allocated
        _check_backend(request.problem.q.device)
        key = _key(request, tiles_for)
        lookup(key)
    outputs = make_outputs(request, plan, lse=lse, dropout_mask=dropout_mask)
    plan = fill(request, outputs, plan, stream=stream, key=key)
    return outputs.for_user(request), plan


def make_outputs(request: FaFwdDispatch, plan: Plan | None = None, *, lse: bool, dropout_mask: bool = False) -> Outputs:
    """The arrays that a call writes: the request's own ``out``, new ones for the rest, on the current stream of q's library.

    ``plan``: that of the call, if it is known. torch tensors on a GPU are made from its strides for a third of the cost.
    """
    problem = request.problem
    if not hooks.plain_types:
        meet_torch()
    if plan is not None and not dropout_mask and request.out_array is None and type(problem.q.source) in hooks.plain_types:
        return _tensors_again(problem, plan.out_strides, lse=lse)
    out = request.out_array or empty_like_framework(problem.q, problem.out_shape)
    return Outputs(
        out,
        _beside(out, problem.lse_shape, "float32") if lse else None,
        _beside(out, problem.dropout_mask_shape, "bool") if dropout_mask and problem.dropout is not None else None,
    )


def fill(
    request: FaFwdDispatch, outputs: Outputs, plan: Plan | None = None, *, stream: Any = None, key: DispatchKey | None = None
) -> Plan | None:
    """Do what a request asks, into arrays that :func:`make_outputs` made, perhaps in another thread. Arguments and errors: :func:`run`.

    ``plan``: that of the call, if it is known; another one is made where the library of q gave the new output other strides. ``key``: the
    request's dispatch key, known to who has looked for a plan and found none. Returns the plan that was run; None from the CPU backend.
    """
    problem, out = request.problem, outputs.out
    _check_backend(problem.q.device)
    if plan is None and key is None:
        plan = find(request, dropout_mask=outputs.dropout_mask is not None)
    if plan is None or plan.out_strides != out.strides:
        key = key or _key(request, None)
        spec = lookup(key)
        if not isinstance(spec, KernelSpec):
            _compute_on_cpu(problem, outputs)
            _tell_written(request)
            return None
        plan = _make_plan(problem, key, spec, outputs)
        if key.extras.tiles_for is None:
            keep(request, plan, dropout_mask=outputs.dropout_mask is not None)
    raw = current_stream(problem.q) if stream is None else raw_stream(stream)
    plan.launch(raw, addresses_of(problem, outputs))
    _tell_written(request)
    return plan


def _tell_written(request: FaFwdDispatch) -> None:
    if request.out_array is not None:
        tell_written(request.out_array.source)


def _key(request: FaFwdDispatch, tiles_for: SmArch | None) -> DispatchKey:
    key = request.dispatch_key()
    if tiles_for is None:
        return key
    choices = replace(key.extras, tiles_for=tiles_for, family=None, short_q=False)
    choices = replace(choices, persistent=None, persistent_blocks=None)
    return replace(key, extras=choices)


def _make_plan(problem: AttentionProblem, key: DispatchKey, spec: KernelSpec, outputs: Outputs) -> Plan:
    """The kernel that ``lookup`` names, and beside it the one that writes the dropout pattern where that is wanted."""
    specs = [spec]
    if outputs.dropout_mask is not None:
        pattern = lookup(
            DispatchKey(key.arch, key.dtype, key.head_dim, varlen=key.varlen, extras=Extras(direction="dropout_mask", dropout=True))
        )
        assert not isinstance(pattern, CpuSpec)  # noqa: S101 - the same arch as that of spec
        specs.append(pattern)
    launches = (_launch_of(each, problem, outputs, key.extras.persistent_blocks) for each in specs)
    return Plan(tuple(each for each in launches if each is not None), outputs.out.strides)


def _launch_of(spec: KernelSpec, problem: AttentionProblem, outputs: Outputs, blocks: int | None) -> Launch | None:
    """One launch of a plan; None where there is nothing to do."""
    index = problem.q.device.index
    tiles = spec.work_tiles(problem)
    if not tiles:
        return None
    grid = spec.grid(tiles, device_properties(index).multiprocessors, blocks)
    if tiles > MAX_GRID:
        raise ShapeError(
            f"q: got batch {problem.batch}, {problem.heads} heads and length {problem.seqlen_q}, which makes {tiles} thread blocks; "
            f"allowed are {MAX_GRID}; split the batch over several calls"
        )
    return load_kernel(spec, index).launch_of(spec.pack(problem, outputs.out), grid, slots_of(outputs))


def _compute_on_cpu(problem: AttentionProblem, outputs: Outputs) -> None:
    lse, mask = outputs.lse, outputs.dropout_mask
    reference.forward(problem, as_numpy(outputs.out), None if lse is None else as_numpy(lse), None if mask is None else as_numpy(mask))


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
