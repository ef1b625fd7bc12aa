"""Plan: what answers calls of one kind, and the one store of plans.

A plan is the launches of a call with every number fixed, and the arrays that the call makes. Addresses and the stream are no part of it:
every run brings those of now. The first call of a kind makes its plan and runs it as all later ones do. A backward call has three launches
or four, and a workspace that they share.

What a key holds, and why that is enough. A request was checked when it was made, and is frozen; its launches are a function of its
class, of the attributes that the class names (``PLAN_ATTRIBUTES``), of its problem, of whether the dropout pattern is wanted, and of the
strides of the output. Of the problem everything is in the key but addresses, of which it has the low bits that decide on vector loads.
Strides of outputs that the caller brought are in the key, those of new ones in the plan, because a plan is looked for before outputs
are made. An LSE and a workspace are an address and no more. Settings and tile tables are fixed for a process.

Requests of other classes, subclasses of ours included, may name any kernel in their ``dispatch_key``: they have no key, and no plan of
theirs is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from ..arrays.dlpack import BorrowedTensor
from ..arrays.new import in_library_of
from ..arrays.read import user_array
from ..dispatch import FaBwdDispatch, FaFwdDispatch
from ..env import settings
from ..errors import ShapeError
from ..kernels.forward import DESCALE_SLOTS, FwdParams
from ..kernels.params import KernelParams
from ..kernels.spec import KernelSpec
from ..launch.driver import device_properties
from ..launch.launcher import Launch, LaunchSeries, LoadedKernel, load_kernel
from ..limits import MAX_GRID, VECTOR_BYTES
from ..problem import ArrayInfo, AttentionProblem, BackwardProblem, Descales, GradientArrays, KvCache
from ..short_repr import ShortRepr
from .staleness import arrays_of_cache

__all__ = [
    "MAX_PLANS",
    "SLOTS",
    "SLOTS_OF_SPLIT",
    "Key",
    "Output",
    "Outputs",
    "Plan",
    "Workspace",
    "addresses_of",
    "clear",
    "descale_addresses",
    "find",
    "forward_addresses",
    "keep",
    "key_of_backward_request",
    "key_of_request",
    "launch_of",
    "partial_addresses",
    "series_of",
    "slots_of",
]

Key: TypeAlias = tuple[Any, ...]

MAX_PLANS: Final = 4096  # of about 1 KB; a workload with more shapes than that starts over
_ALIGNMENT: Final = 256  # bytes, of each array in a workspace
SLOTS: Final = FwdParams.SLOTS  # names of the addresses of a call, in order
_SLOTS_WITH_PATTERN: Final = (*SLOTS, "keep")
_SLOTS_WITH_DESCALES: Final = (*SLOTS, *DESCALE_SLOTS)
# Of plain K and V by a kernel over a cache.
SLOTS_OF_SPLIT: Final = (*SLOTS, "partial_o", "partial_sum", "blocks", "cache_lengths", "left_pad", "cu_seqlens_new", "error")


@dataclass(slots=True, eq=False, repr=False)
class Output(ShortRepr):
    """What a forward call made, in the library of q (or of ``out``, when the caller brought one).

    Attributes:
        out: o, shaped like q with v's head dim.
        lse: float32 (B, Hq, Sq), packed (Hq, total_q); None when it was not asked for.
        dropout_mask: bool, True where kept, (B, Hq, Sq, Sk), with the longest lengths when packed; None when not asked for, or without
            dropout.
        rng: int64 (seed, offset), the dropout that was used; None without dropout.
    """

    out: Any
    lse: Any = None
    dropout_mask: Any = None
    rng: Any = None


@dataclass(slots=True, eq=False)
class Outputs:
    """The arrays that a call writes, described. They may be made by one thread (on its stream) and written by another."""

    out: ArrayInfo
    lse: ArrayInfo | None = None
    dropout_mask: ArrayInfo | None = None
    workspace: ArrayInfo | None = None  # on a GPU, of calls whose keys are split, or that rotate q

    @property
    def strides(self) -> tuple[int, ...]:
        """What a plan has to fit."""
        return self.out.strides

    def for_user(self, request: FaFwdDispatch) -> Output:
        """The arrays themselves: the caller's own ``out`` where there was one, and what was made in the library of that, or of q."""
        out_array, dropout = request.out_array, request.problem.dropout
        like = out_array or request.problem.q
        rng = dropout and user_array(dropout.rng)
        if type(like.source) is BorrowedTensor:
            out, lse, pattern = (each and in_library_of(like, each) for each in (self.out, self.lse, self.dropout_mask))
        else:
            out, lse, pattern = self.out.source, self.lse and self.lse.source, self.dropout_mask and self.dropout_mask.source
        return Output(out if out_array is None else getattr(request, "out", out), lse, pattern, rng)


class Workspace(NamedTuple):
    """Memory that the launches of one call share, in which each array begins at a multiple of 256 bytes.

    Attributes:
        size: in bytes.
        offsets: where each array begins, by the slot that its address goes to.
    """

    size: int
    offsets: dict[str, int]

    @classmethod
    def of(cls, sizes: dict[str, int]) -> Workspace:
        """One for arrays of these sizes, in bytes."""
        offsets, end = {}, 0
        for slot, size in sizes.items():
            offsets[slot] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return cls(end, offsets)


class Plan:
    """The launches of a call, in order, and the strides of the outputs that they write.

    Attributes:
        launches: none for a call without work.
        out_strides: in elements, of o, or of each array that a backward call writes (runtime/gradients.py). A call makes o with them, and
            an LSE and a dropout pattern that are row-major.
        workspace: what its launches share, None for nothing.
        launch: ``launch(stream, addresses)`` makes them all, on addresses in the order that they were made for.
    """

    __slots__ = ("launch", "launches", "out_strides", "workspace")

    def __init__(
        self, made: Iterable[Launch | LaunchSeries | None], out_strides: tuple[Any, ...], workspace: Workspace | None = None
    ) -> None:
        self.launches = launches = tuple(each for each in made if each is not None)
        self.out_strides = out_strides
        self.workspace = workspace
        self.launch: Callable[[int, tuple[int, ...]], None] = launches[0].launch if len(launches) == 1 else self._launch_all

    def on_places(self, places: tuple[int, ...]) -> Plan:
        """The same launches, of addresses among others: that of slot i is the one at ``places[i]``."""
        return Plan((each.on_places(places) for each in self.launches), self.out_strides, self.workspace)

    def _launch_all(self, stream: int, addresses: tuple[int, ...]) -> None:
        for each in self.launches:
            each.launch(stream, addresses)


def launch_of(
    spec: KernelSpec, problem: AttentionProblem, params: KernelParams, slots: tuple[str, ...], blocks: int | None = None
) -> Launch | None:
    """One launch of a plan on the GPU of q; None where there is nothing to do. ``blocks``: how many persistent ones the caller wants.

    Raises:
        ShapeError: more blocks than a grid has.
        RuntimeFlashAttnError: the kernel does not compile or load.
    """
    loaded = _load(spec, problem, blocks)
    return None if loaded is None else loaded[0].launch_of(params, loaded[1], slots)


def series_of(
    steps: Sequence[KernelSpec], problem: AttentionProblem, params: KernelParams, slots: tuple[str, ...], blocks: int | None = None
) -> list[Launch | LaunchSeries]:
    """The launches of kernels that take the same parameters. Arguments and errors: :func:`launch_of`."""
    loaded = [found for found in (_load(step, problem, blocks) for step in steps) if found is not None]
    if settings().debug:  # each is waited for
        return [kernel.launch_of(params, grid, slots) for kernel, grid in loaded]
    if not loaded:
        return []
    kernels, grids = zip(*loaded, strict=True)
    return [LaunchSeries(kernels, params, grids, slots)]


def _load(spec: KernelSpec, problem: AttentionProblem, blocks: int | None) -> tuple[LoadedKernel, int] | None:
    """A kernel on the GPU of q, and its grid; None where there is nothing to do."""
    index = problem.q.device.index
    tiles = spec.work_tiles(problem)
    if not tiles:
        return None
    if tiles > MAX_GRID:
        raise ShapeError(
            f"q: got batch {problem.batch}, {problem.heads} heads and length {problem.seqlen_q}, which makes {tiles} thread blocks; "
            f"allowed are {MAX_GRID}; split the batch over several calls"
        )
    return load_kernel(spec, index), spec.grid(tiles, device_properties(index).multiprocessors, blocks)


def slots_of(problem: AttentionProblem, outputs: Outputs) -> tuple[str, ...]:
    """The names of what :func:`addresses_of` gives, in its order."""
    if problem.descales is not None:
        return _SLOTS_WITH_DESCALES
    return SLOTS if outputs.dropout_mask is None else _SLOTS_WITH_PATTERN


def addresses_of(problem: AttentionProblem, outputs: Outputs, workspace: Workspace | None = None) -> tuple[int, ...]:
    """The addresses of a forward call on plain K and V; 0 for what it does not have. ``workspace``: that of its plan."""
    lse, keep_pattern = outputs.lse, outputs.dropout_mask
    addresses = forward_addresses(problem, outputs.out.ptr, 0 if lse is None else lse.ptr)
    if workspace is not None:
        addresses = (*addresses, *partial_addresses(workspace, 0 if outputs.workspace is None else outputs.workspace.ptr))
    if problem.descales is not None:
        return (*addresses, *descale_addresses(problem.descales))
    return addresses if keep_pattern is None else (*addresses, keep_pattern.ptr)  # a call with a pattern has neither of both


def descale_addresses(descales: Descales) -> tuple[int, ...]:
    """Those of factors of q, k and v, in the order of ``DESCALE_SLOTS``; 0 for a factor of 1."""
    return tuple(0 if each is None else each.array.ptr for each in descales)


def partial_addresses(workspace: Workspace, base: int) -> tuple[int, ...]:
    """What goes behind those of :data:`SLOTS` to a kernel over a cache (:data:`SLOTS_OF_SPLIT`): it has parts, perhaps, and no cache."""
    at = workspace.offsets
    parts = (base + at["partial_o"], base + at["partial_sum"]) if at else (0, 0)
    return (*parts, 0, 0, 0, 0, 0)


def forward_addresses(problem: AttentionProblem, out: int, lse: int) -> tuple[int, ...]:
    """Those of a forward with these addresses of o and LSE, in the order of :data:`SLOTS`."""
    dropout = problem.dropout
    return (
        problem.q.ptr,
        problem.k.ptr,
        problem.v.ptr,
        out,
        lse,
        0 if problem.cu_seqlens_q is None else problem.cu_seqlens_q.ptr,
        0 if problem.cu_seqlens_k is None else problem.cu_seqlens_k.ptr,
        0 if problem.alibi_slopes is None else problem.alibi_slopes.ptr,
        0 if problem.learned_sink is None else problem.learned_sink.ptr,
        0 if dropout is None else dropout.rng.ptr,
    )


def key_of_request(request: Any) -> Key | None:
    """What requests have in common that share a plan; made with the request. None for one on the CPU, and of a class of the caller's.

    A class says ``PLAN_ATTRIBUTES``: the (hashable) attributes beside problem and ``out`` that its kernel depends on. It says so for itself
    alone, not for its subclasses.
    """
    problem: AttentionProblem = request.problem
    out: ArrayInfo | None = request.out_array
    attributes = _attributes_of(request, problem.q)
    if attributes is None:
        return None
    addresses = 0 if out is None else out.ptr
    return (*attributes, *_facts(problem, addresses), None if out is None else out.strides)


def key_of_backward_request(request: Any) -> Key | None:
    """The same of backward requests. Which of o, LSE and their gradients there are is told by strides and presence."""
    problem: BackwardProblem = request.problem
    written: GradientArrays = request.gradient_arrays
    attributes = _attributes_of(request, problem.forward.q)
    if attributes is None:
        return None
    arrays = (problem.out, problem.dout, *written)
    addresses = 0
    for array in arrays:
        addresses |= 0 if array is None else array.ptr
    strides = (None if array is None else array.strides for array in arrays)
    return (*attributes, *_facts(problem.forward, addresses), *strides, problem.deterministic)


def _attributes_of(request: Any, q: ArrayInfo) -> Key | None:
    """Class of a request and what it names; None where it has no key."""
    kind = type(request)
    names = vars(kind).get("PLAN_ATTRIBUTES")
    return None if names is None or q.device.kind == "cpu" else (kind, *(getattr(request, name) for name in names))


def _facts(problem: AttentionProblem, addresses: int) -> Key:
    """All that a plan depends on of a forward problem; ``addresses``: those of the call's other arrays, or-ed."""
    q, k, v, dropout = problem.q, problem.k, problem.v, problem.dropout
    return (
        *(q.device, q.dtype_name, (addresses | q.ptr | k.ptr | v.ptr) % VECTOR_BYTES),
        *(q.shape, q.strides, k.shape, k.strides, v.shape, v.strides),
        *(problem.seqlen_q, problem.seqlen_k, problem.softmax_scale, problem.softcap, problem.band),
        None if problem.alibi_slopes is None else _layout(problem.alibi_slopes),
        None if problem.learned_sink is None else _layout(problem.learned_sink),
        None if problem.cu_seqlens_q is None else _layout(problem.cu_seqlens_q),
        None if dropout is None else dropout.p,
        *(problem.num_splits, problem.batch_invariant, problem.step is not None),
        None if problem.cache is None else _facts_of_cache(problem.cache),
        None if problem.descales is None else _facts_of_fp8(problem, problem.descales),
    )


def _facts_of_fp8(problem: AttentionProblem, descales: Descales) -> Key:
    """Types of k, v and o, how P V is summed, and where the descales lie."""
    units = (None if each is None else (each.unit, *_layout(each.array)) for each in descales)
    return problem.k.dtype_name, problem.v.dtype_name, problem.out_dtype, problem.single_level, *units


def _facts_of_cache(cache: KvCache) -> Key:
    """Kind of a cache, and where its tables and new tokens lie; k and v themselves are among the others."""
    layouts = (None if each is None else (*_layout(each), each.dtype_name, each.ptr % VECTOR_BYTES) for each in arrays_of_cache(cache))
    rotary = None if cache.new is None or cache.new.rotary is None else cache.new.rotary.interleaved
    return cache.layout, rotary, 0 if cache.new is None else cache.new.longest, *layouts


def _layout(info: ArrayInfo) -> tuple[Any, ...]:
    return info.shape, info.strides


_plans: dict[Key, Plan] = {}


def _key_of(request: FaFwdDispatch | FaBwdDispatch) -> Key | None:
    """A request's own key, not that of another which it forwards attributes to."""
    key: Key | None = getattr(request, "plan_key", None)
    return None if key is None or key[0] is not type(request) or settings().debug else key


def find(request: FaFwdDispatch | FaBwdDispatch, *, dropout_mask: bool = False) -> Plan | None:
    """The plan of requests like this one, if there is one. In debug mode there is none, so that every launch is waited for."""
    key = _key_of(request)
    return None if key is None else _plans.get((key, dropout_mask))


def keep(request: FaFwdDispatch | FaBwdDispatch, plan: Plan, *, dropout_mask: bool = False) -> None:
    """Let further requests like this one go by ``plan``."""
    key = _key_of(request)
    if key is None:
        return
    if len(_plans) >= MAX_PLANS:
        clear()
    _plans[key, dropout_mask] = plan


def clear() -> None:
    """Forget all plans."""
    _plans.clear()
