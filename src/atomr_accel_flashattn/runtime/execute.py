"""run: from a request to its answer. A plan, from the store or made here, and the arrays it writes; in host memory, the CPU backend.

Backward requests go on to :mod:`.gradients`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, overload

from ..arrays.new import empty_like_framework, empty_workspace
from ..arrays.read import as_numpy, contiguous_strides, dtype_name_of
from ..arrays.streams import current_stream, raw_stream, used_on
from ..arrays.torch_hooks import empty_on, hooks, meet_torch, tell_written
from ..dispatch import CpuSpec, DispatchKey, Extras, FaBwdDispatch, FaFwdDispatch, lookup
from ..errors import ArrayTypeError, UnsupportedArgumentError
from ..kernels.fa3_kvcache import Fa3KvCacheSpec
from ..kernels.kvcache import Fa2KvCacheSpec
from ..kernels.spec import KernelSpec
from ..problem import ArrayInfo, AttentionProblem
from ..reference import attention as reference
from ..tiles.tables import cache_rows
from ..types import DType, SmArch
from .backend import check_backend
from .gradients import Gradients, differentiate
from .on_cache import cache_addresses, check_scheduled, plan_on_cache, workspace_on_cache
from .plan import Output, Outputs, Plan, addresses_of, find, keep, launch_of, slots_of
from .staleness import Fingerprint

__all__ = ["execute", "fill", "make_outputs", "run", "written_arrays"]


@overload
def run(
    request: FaFwdDispatch, *, stream: Any = None, lse: bool = True, dropout_mask: bool = False, tiles_for: SmArch | None = None
) -> Output: ...


@overload
def run(request: FaBwdDispatch, *, stream: Any = None, tiles_for: SmArch | None = None) -> Gradients: ...


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
        request: a DenseFwdRequest, Fa2FwdRequest, Fa3FwdRequest or VarlenFwdRequest, one on a KV cache (PagedAttentionRequest,
            CachedFwdRequest, ChunkedPrefillRequest), or anything that satisfies FaFwdDispatch, for an Output; a DenseBwdRequest,
            Fa2BwdRequest or VarlenBwdRequest, or anything that satisfies FaBwdDispatch, for Gradients.
        stream: the CUDA stream to enqueue on (a raw handle, or a stream of torch, CuPy or cuda.core); None is the current stream of q's
            library. New outputs, and a dropout seed that is drawn, belong to that library's current stream, as ever: a caller who names
            another stream orders the two, and so does one whose k or v come from another library than q.
        lse: whether the log-sum-exp is wanted, of a forward request.
        dropout_mask: whether the dropout pattern is wanted, of a forward request; it takes O(Sq Sk) memory.
        tiles_for: the arch whose tiles are borrowed, for tests.

    Raises:
        DispatchError: no kernel does this.
        StaleArrayError: an array was freed, resized or given other data since the request was made.
        DeviceMismatchError: the arrays are not where ATOMR_FLASHATTN_BACKEND wants them.
        RuntimeFlashAttnError: no driver, no compiler, a kernel that does not compile or launch.
    """
    if hasattr(request, "gradient_arrays") and isinstance(request, FaBwdDispatch) and not isinstance(request, type):
        if not lse or dropout_mask:
            raise UnsupportedArgumentError("run: got lse or dropout_mask with a backward request; allowed are stream and tiles_for")
        return differentiate(request, stream=stream, tiles_for=tiles_for)
    forward: Any = request
    return execute(forward, stream=stream, lse=lse, dropout_mask=dropout_mask, tiles_for=tiles_for)[0]


def execute(
    request: FaFwdDispatch, *, stream: Any = None, lse: bool, dropout_mask: bool = False, tiles_for: SmArch | None = None
) -> tuple[Output, Plan | None]:
    """:func:`run`, and the plan that it went by; None from the CPU backend."""
    if isinstance(request, type) or not isinstance(request, FaFwdDispatch):
        raise ArrayTypeError(
            f"request: got {type(request).__qualname__}; allowed is a DenseFwdRequest, Fa2FwdRequest, Fa3FwdRequest, "
            "VarlenFwdRequest, PagedAttentionRequest, CachedFwdRequest or ChunkedPrefillRequest, "
            "and of backward ones a DenseBwdRequest, Fa2BwdRequest or VarlenBwdRequest"
        )
    Fingerprint.of(request)
    dropout_mask = dropout_mask and request.problem.dropout is not None
    plan = None if tiles_for is not None else find(request, dropout_mask=dropout_mask)
    key = None
    if plan is None:  # what is refused is refused before anything is allocated
        check_backend(request.problem.q.device)
        key = _key(request, tiles_for)
        lookup(key)
    outputs = make_outputs(request, plan, lse=lse, dropout_mask=dropout_mask, key=key, other_stream=stream is not None)
    if stream is not None and outputs.workspace is not None:  # before its first launch, which may be the last that goes well
        used_on(outputs.workspace, raw_stream(stream))
    plan = fill(request, outputs, plan, stream=stream, key=key)
    return outputs.for_user(request), plan


def make_outputs(
    request: FaFwdDispatch,
    plan: Plan | None = None,
    *,
    lse: bool,
    dropout_mask: bool = False,
    key: DispatchKey | None = None,
    other_stream: bool = False,
) -> Outputs:
    """The arrays that a call writes: the request's own ``out``, new ones for the rest, on the current stream of q's library.

    Args:
        request: the call.
        plan: that of the call, if it is known. torch tensors on a GPU are made from its strides for a third of the cost.
        lse: whether the log-sum-exp is wanted.
        dropout_mask: whether the dropout pattern is wanted.
        key: the request's dispatch key, if it is known.
        other_stream: whether a workspace may be used on another stream than the current one, with nobody keeping it until it is done.
    """
    problem, outputs = request.problem, _outputs(request, plan, lse=lse, dropout_mask=dropout_mask)
    workspace = None if plan is None else plan.workspace
    if plan is None and (problem.cache is not None or problem.q.device.kind != "cpu"):
        workspace = workspace_on_cache(problem, key or _key(request, None))
    if workspace is not None and workspace.size:
        outputs.workspace = empty_workspace(problem.q, workspace.size, other_stream=other_stream)
    return outputs


def _outputs(request: FaFwdDispatch, plan: Plan | None, *, lse: bool, dropout_mask: bool) -> Outputs:
    problem = request.problem
    if not hooks.plain_types:
        meet_torch()
    if plan is not None and not dropout_mask and request.out_array is None and type(problem.q.source) in hooks.plain_types:
        return _tensors_again(problem, plan.out_strides, lse=lse)
    like = request.out_array or problem.q
    return Outputs(
        request.out_array or empty_like_framework(like, problem.out_shape, problem.out_dtype and dtype_name_of(problem.out_dtype)),
        empty_like_framework(like, problem.lse_shape, "float32") if lse else None,
        empty_like_framework(like, problem.dropout_mask_shape, "bool") if dropout_mask and problem.dropout is not None else None,
    )


def fill(
    request: FaFwdDispatch, outputs: Outputs, plan: Plan | None = None, *, stream: Any = None, key: DispatchKey | None = None
) -> Plan | None:
    """Do what a request asks, into arrays that :func:`make_outputs` made, perhaps in another thread. Arguments and errors: :func:`run`.

    ``plan``: that of the call, if it is known; another one is made where the library of q gave the new output other strides. ``key``: the
    request's dispatch key, known to who has looked for a plan and found none. Returns the plan that was run; None from the CPU backend.
    """
    problem, out = request.problem, outputs.out
    check_backend(problem.q.device)
    if plan is None and key is None:
        plan = find(request, dropout_mask=outputs.dropout_mask is not None)
    if plan is None or plan.out_strides != out.strides:
        key = key or _key(request, None)
        spec = lookup(key)
        if not isinstance(spec, KernelSpec):
            _compute_on_cpu(request, outputs)
            _tell_written(request)
            return None
        plan = _make_plan(problem, key, spec, outputs)
        if key.extras.tiles_for is None:
            keep(request, plan, dropout_mask=outputs.dropout_mask is not None)
    raw = current_stream(problem.q) if stream is None else raw_stream(stream)
    room = plan.workspace
    at = addresses_of(problem, outputs, room) if problem.cache is None or room is None else cache_addresses(problem, outputs, room)
    plan.launch(raw, at)
    _tell_written(request)
    return plan


def written_arrays(request: FaFwdDispatch) -> list[ArrayInfo]:
    """The caller's arrays that a call writes."""
    cache = request.problem.cache
    written = [] if request.out_array is None else [request.out_array]
    if cache is not None and cache.new is not None:
        written += [request.problem.k, request.problem.v, *request.problem.written_descales]
    return written


def _tell_written(request: FaFwdDispatch) -> None:
    for array in written_arrays(request):
        tell_written(array.source)


def _key(request: FaFwdDispatch, tiles_for: SmArch | None) -> DispatchKey:
    key = request.dispatch_key()
    if tiles_for is None:
        return key
    choices = replace(key.extras, tiles_for=tiles_for, family=None, short_q=False, persistent=None, persistent_blocks=None)
    rows = cache_rows(request.problem.seqlen_q * key.gqa_ratio)  # another family may have answered
    choices = replace(choices, cache_rows=rows, split=key.extras.split and (key.paged or key.extras.kv_cache))
    return replace(key, extras=choices)


def _make_plan(problem: AttentionProblem, key: DispatchKey, spec: KernelSpec, outputs: Outputs) -> Plan:
    """The kernel that ``lookup`` names, and beside it the one that writes the dropout pattern where that is wanted."""
    if isinstance(spec, (Fa2KvCacheSpec, Fa3KvCacheSpec)):
        return plan_on_cache(problem, spec, outputs)
    specs = [spec]
    if outputs.dropout_mask is not None:
        pattern = lookup(
            DispatchKey(key.arch, key.dtype, key.head_dim, varlen=key.varlen, extras=Extras(direction="dropout_mask", dropout=True))
        )
        assert not isinstance(pattern, CpuSpec)  # noqa: S101 - the same arch as that of spec
        specs.append(pattern)
    slots, blocks = slots_of(problem, outputs), key.extras.persistent_blocks
    return Plan((launch_of(each, problem, each.pack(problem, outputs.out), slots, blocks) for each in specs), outputs.out.strides)


def _compute_on_cpu(request: FaFwdDispatch, outputs: Outputs) -> None:
    lse, mask = outputs.lse, outputs.dropout_mask
    check_scheduled(request.problem)
    arrays = Fingerprint.of(request)
    held = arrays.hold()  # other threads run while BLAS does
    reference.forward(
        request.problem, as_numpy(outputs.out), None if lse is None else as_numpy(lse), None if mask is None else as_numpy(mask)
    )
    del held


def _tensors_again(problem: AttentionProblem, out_strides: tuple[int, ...], *, lse: bool) -> Outputs:
    """New torch tensors whose shapes and strides are known, and need not be read."""
    q, shape = problem.q, problem.out_shape
    kind, dtype, name = q.source.dtype, q.dtype, q.dtype_name
    if problem.out_dtype is not None:
        dtype, name = problem.out_dtype, dtype_name_of(problem.out_dtype)
        kind = getattr(sys.modules["torch"], name)
    out = empty_on(q.device.index, q.source, (shape, out_strides, kind))
    outputs = Outputs(ArrayInfo(out.data_ptr(), shape, out_strides, dtype, name, q.device, out))
    if lse:
        shape = problem.lse_shape
        strides = contiguous_strides(shape)
        out = empty_on(q.device.index, q.source, (shape, strides, sys.modules["torch"].float32))
        outputs.lse = ArrayInfo(out.data_ptr(), shape, strides, DType.F32, "float32", q.device, out)
    return outputs
