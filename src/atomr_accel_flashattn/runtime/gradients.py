"""Gradients: what answers a backward request, and how they are made: on a GPU by one plan of three launches, on the CPU by its backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from ..arrays.new import empty_like_framework, empty_workspace, in_library_of
from ..arrays.read import as_numpy, contiguous_strides
from ..arrays.streams import current_stream, raw_stream, used_on
from ..arrays.torch_hooks import tell_written
from ..dispatch import CpuSpec, DispatchKey, FaBwdDispatch, key_of_problem, lookup
from ..dispatch.choice import head_splits_of
from ..errors import DispatchError
from ..kernels.fa2_bwd import Fa2BackwardSpec
from ..kernels.spec import KernelSpec
from ..launch.launcher import Launch, LaunchSeries
from ..problem import ArrayInfo, AttentionProblem, BackwardProblem, GradientArrays
from ..reference.backward import backward
from ..short_repr import ShortRepr
from ..types import DType, SmArch
from .backend import check_backend
from .plan import SLOTS, Plan, Workspace, find, forward_addresses, keep, launch_of, series_of
from .staleness import Fingerprint

__all__ = ["GradientOutputs", "Gradients", "differentiate", "fill_gradients", "gradient_addresses", "make_gradients"]

# Slots of a backward: the first two, those of the workspace, the others, those of the forward. BwdParams has them in this order.
_READ: Final = ("dout", "dlse")
_WRITTEN: Final = ("dq", "dk", "dv", "dsink")


@dataclass(slots=True, eq=False, repr=False)
class Gradients(ShortRepr):
    """What a backward call made, in the library of q (or of ``dq``, ``dk``, ``dv``, where the caller brought them).

    Attributes:
        dq: gradient of q, of its shape and type.
        dk: gradient of k, summed over the query heads that read a KV head.
        dv: gradient of v, likewise.
        dsink: gradient of the learned sink, float32 (Hq,); None without one.
    """

    dq: Any
    dk: Any
    dv: Any
    dsink: Any = None


@dataclass(slots=True, eq=False)
class GradientOutputs:
    """The arrays that a backward call writes, described, and the one that its launches share, None on the CPU.

    They may be made by one thread (on its stream) and written by another.
    """

    gradients: tuple[ArrayInfo, ArrayInfo, ArrayInfo]  # of q, k and v
    dsink: ArrayInfo | None
    workspace: ArrayInfo | None = None

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """What a plan has to fit."""
        dq, dk, dv = self.gradients
        return dq.strides, dk.strides, dv.strides

    def for_user(self, request: FaBwdDispatch) -> Gradients:
        """The arrays themselves: the caller's own where there were any, and what was made in the library of q."""
        q = request.problem.forward.q
        given: Any = (getattr(request, name, None) for name in GradientArrays._fields)
        dq, dk, dv = (in_library_of(q, made) if own is None else own for own, made in zip(given, self.gradients, strict=True))
        return Gradients(dq, dk, dv, self.dsink and in_library_of(q, self.dsink))


def differentiate(request: FaBwdDispatch, *, stream: Any = None, tiles_for: SmArch | None = None) -> Gradients:
    """The gradients that a request asks for. Arguments and errors: :func:`~.execute.run`."""
    Fingerprint.of_backward(request)
    plan = None if tiles_for is not None else find(request)
    key = None
    if plan is None:
        check_backend(request.problem.forward.q.device)
        key = _key(request, tiles_for)
    outputs = make_gradients(request, plan, key=key, other_stream=stream is not None)
    if stream is not None and outputs.workspace is not None:  # before the launches, of which one may fail
        used_on(outputs.workspace, raw_stream(stream))
    fill_gradients(request, outputs, plan, stream=stream, key=key)
    return outputs.for_user(request)


def make_gradients(
    request: FaBwdDispatch, plan: Plan | None = None, *, key: DispatchKey | None = None, other_stream: bool = False
) -> GradientOutputs:
    """The arrays that a call writes, the request's own or new ones on the current stream of q's library, and its workspace.

    Args:
        request: the call.
        plan: that of the call, if it is known.
        key: its dispatch key, if it is known.
        other_stream: whether it may be launched on another stream than the current one, with nobody keeping the workspace until it is done.

    Raises:
        DispatchError: no kernel does this; nothing has been allocated.
    """
    problem, given = request.problem, request.gradient_arrays
    forward = problem.forward
    spec = None if plan is not None else _spec_of(key or request.dispatch_key())
    workspace = _workspace_of(spec, request) if isinstance(spec, Fa2BackwardSpec) else None if plan is None else plan.workspace
    inputs = (forward.q, forward.k, forward.v)
    dq, dk, dv = (array or empty_like_framework(like, like.shape) for array, like in zip(given, inputs, strict=True))
    dsink = None if forward.learned_sink is None else empty_like_framework(forward.q, (forward.heads,), "float32")
    room = None if workspace is None else empty_workspace(forward.q, workspace.size, other_stream=other_stream)
    return GradientOutputs((dq, dk, dv), dsink, room)


def fill_gradients(
    request: FaBwdDispatch, outputs: GradientOutputs, plan: Plan | None = None, *, stream: Any = None, key: DispatchKey | None = None
) -> Plan | None:
    """Do what a request asks, into arrays that :func:`make_gradients` made, perhaps in another thread. The caller keeps the workspace.

    ``plan`` and ``key``: those of the call, if they are known. Returns the plan that was run; None from the CPU backend.
    """
    problem = request.problem
    q = problem.forward.q
    check_backend(q.device)
    if plan is None and key is None:
        plan = find(request)
    if plan is None or plan.out_strides != outputs.strides:
        key = key or _key(request, None)
        spec = _spec_of(key)
        if isinstance(spec, CpuSpec):
            _compute_on_cpu(request, outputs)
            _tell_written(request)
            return None
        plan = _make_plan(spec, request, outputs, key.arch)
        if key.extras.tiles_for is None:
            keep(request, plan)
    raw = current_stream(q) if stream is None else raw_stream(stream)
    assert plan.workspace is not None  # noqa: S101 - every plan that is made here has one
    plan.launch(raw, gradient_addresses(problem, outputs, plan.workspace))
    _tell_written(request)
    return plan


def _key(request: FaBwdDispatch, tiles_for: SmArch | None) -> DispatchKey:
    key = request.dispatch_key()
    return key if tiles_for is None else replace(key, extras=replace(key.extras, tiles_for=tiles_for))


def _spec_of(key: DispatchKey) -> Fa2BackwardSpec | CpuSpec:
    spec = lookup(key)
    if not isinstance(spec, (Fa2BackwardSpec, CpuSpec)):
        raise DispatchError(f"dispatch_key of a backward request: got one of {spec.kernel_name}; allowed is the direction 'bwd'")
    return spec


def _workspace_of(spec: Fa2BackwardSpec, request: FaBwdDispatch) -> Workspace:
    """What the kernels of ``spec`` share, and o and LSE if the forward is to run first.

    The statistics of rows, 8 bytes each, lie in dq where the call makes it, until dq is written: bwd_postprocess is the first to write
    it, and reads statistics only for the gradient of a learned sink. A row of dq has 16 bytes or more, so that they fit.
    """
    problem = request.problem
    known, sizes = problem.forward, spec.workspace(problem.forward, _splits(spec, problem.forward))
    if request.gradient_arrays.dq is None and known.learned_sink is None and 0 not in known.q.shape:
        del sizes["statistics"]
    if problem.out is None:
        assert known.q.dtype is not None  # noqa: S101 - requests have checked it
        sizes |= {"o": known.q.dtype.itemsize * prod(known.out_shape), "lse": 4 * prod(known.lse_shape)}
    return Workspace.of(sizes)


def _splits(spec: Fa2BackwardSpec, known: AttentionProblem) -> int:
    return head_splits_of(known, spec) if spec.head_split else 1


def _row_major_results(known: AttentionProblem) -> tuple[ArrayInfo, ArrayInfo]:
    """O and LSE of a forward that runs first, at no address yet."""
    q, shape, rows = known.q, known.out_shape, known.lse_shape
    out = ArrayInfo(0, shape, contiguous_strides(shape), q.dtype, q.dtype_name, q.device, None)
    return out, ArrayInfo(0, rows, contiguous_strides(rows), DType.F32, "float32", q.device, None)


def _make_plan(spec: Fa2BackwardSpec, request: FaBwdDispatch, outputs: GradientOutputs, arch: SmArch) -> Plan:
    """The kernels of ``spec``, behind that of the forward where o and LSE are not given."""
    problem = request.problem
    known, gradients = problem.forward, GradientArrays(*outputs.gradients)
    workspace = _workspace_of(spec, request)
    shared = (slot for slot in workspace.offsets if slot not in SLOTS and slot != "statistics")
    slots = (*_READ, "statistics", *shared, *_WRITTEN, *SLOTS)
    launches: list[Launch | LaunchSeries | None] = []
    if problem.out is None:
        out, lse = _row_major_results(known)
        problem = replace(problem, out=out, lse=lse)
        key = key_of_problem(known, arch, out, may_split=False)  # its workspace has no room for partial results
        forward = lookup(key)
        assert isinstance(forward, KernelSpec)  # noqa: S101 - the same arch as that of spec
        launches.append(launch_of(forward, known, forward.pack(known, out), slots, key.extras.persistent_blocks))
    splits = _splits(spec, known)
    launches += series_of(spec.steps(), known, spec.pack(problem, gradients, splits), slots, splits)
    return Plan(launches, outputs.strides, workspace)


def gradient_addresses(problem: BackwardProblem, outputs: GradientOutputs, workspace: Workspace) -> tuple[int, ...]:
    """What launches bring, in the order of the plan's slots; 0 for what the call does not have."""
    base = 0 if outputs.workspace is None else outputs.workspace.ptr
    at = {"statistics": outputs.gradients[0].ptr, **{slot: base + offset for slot, offset in workspace.offsets.items()}}
    out = at.pop("o") if problem.out is None else problem.out.ptr
    lse = at.pop("lse") if problem.lse is None else problem.lse.ptr
    read = (problem.dout, problem.dlse)
    written = (*outputs.gradients, outputs.dsink)
    return (*map(_address, read), *at.values(), *map(_address, written), *forward_addresses(problem.forward, out, lse))


def _address(array: ArrayInfo | None) -> int:
    return 0 if array is None else array.ptr


def _compute_on_cpu(request: FaBwdDispatch, outputs: GradientOutputs) -> None:
    held = Fingerprint.of_backward(request).hold()  # other threads run while BLAS does
    dq, dk, dv = map(as_numpy, outputs.gradients)
    backward(request.problem, dq, dk, dv, None if outputs.dsink is None else as_numpy(outputs.dsink))
    del held


def _tell_written(request: FaBwdDispatch) -> None:
    for array in request.gradient_arrays:
        if array is not None:
            tell_written(array.source)
