"""StepPlan: one schedule and one workspace for all calls of a step that read the same lengths, as those of a model's layers do."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any, Final, NoReturn, Self

import numpy as np

from ..arrays.read import read_array
from ..arrays.streams import copy_to_host, current_stream, raw_stream
from ..env import settings
from ..errors import ArrayTypeError, SeqLensError, StepPlanError
from ..limits import HEAD_DIM_STEP, MAX_HEAD_DIM, MAX_LENGTH, as_integer
from ..problem import ArrayInfo, AttentionProblem, StepBuffers, StepShape
from ..reference.cache import check_lengths
from ..runtime.staleness import check_array
from ..runtime.step import prepare_step, schedule_addresses
from ..types import Device
from .arguments import flag
from .checks import check_device, read_int32
from .options import MaskKind
from .seqlens import CumulativeSeqlens

__all__ = ["PLAN_NAMES", "StepPlan"]

PLAN_NAMES: Final = "plan (step_plan of flash_attn_with_kvcache)"  # the argument that messages name: of requests, and of that call


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StepPlan:
    """Cuts the keys of a decoding step into equal parts on the GPU, once for all layers, without waiting for it.

    ``num_splits`` and the grid of a call without a plan follow from bounds. With a plan, a kernel reads the lengths on the device, and a
    fixed number of blocks share all keys of all sequences equally, whether a thousand sequences are short or one is long. Its memory is
    two partial results a block: no length is too long for it. In a CUDA graph every replay follows the lengths of then.

    Make it once; in each step call :meth:`schedule`, then run requests that were given ``plan=``. A plan serves one stream at a time:
    the calls of a step write to its memory one after the other. It outlives the work that it is used in, graphs included. On the CPU it
    does its checks and nothing else: lengths fit, and a schedule comes before the calls.

    Attributes:
        like: any array of the library and device of q; nothing of it is read or kept.
        batch: sequences of each call.
        heads: of q.
        heads_kv: of the cache.
        head_dim: of q and k.
        capacity: slots that a sequence may have: entries of the block table times the block size, or the slots of a contiguous cache.
        v_head_dim: of v; None is that of q and k.
        seqlen_q: queries of each sequence, of a packed q at most.
        packed_q: whether calls have a ``cu_seqlens_q``.
        mask: which keys a query sees.
        sink_tokens: first keys that stay visible when a window has passed them.
        new_tokens: of each sequence, that calls write to the cache; None for packed ones, as a ChunkedPrefillRequest has them.
        left_pad: whether calls have a ``cache_leftpad``.
        shape: all of these in their normal form (made, not given).

    Raises:
        StepPlanError: a number outside its range.
        ShapeError: more work than a grid has blocks.
        ConstructionError: another subclass says which argument is wrong.
    """

    like: InitVar[Any]
    batch: int = field(kw_only=True)
    heads: int = field(kw_only=True)
    heads_kv: int = field(kw_only=True)
    head_dim: int = field(kw_only=True)
    capacity: int = field(kw_only=True)
    v_head_dim: int | None = field(default=None, kw_only=True)
    seqlen_q: int = field(default=1, kw_only=True)
    packed_q: bool = field(default=False, kw_only=True)
    mask: MaskKind = field(default=MaskKind.full(), kw_only=True)
    sink_tokens: int = field(default=0, kw_only=True)
    new_tokens: int | None = field(default=0, kw_only=True)
    left_pad: bool = field(default=False, kw_only=True)
    shape: StepShape = field(init=False)
    _buffers: StepBuffers = field(init=False)
    _launch: Any = field(init=False, default=None)

    def __post_init__(self, like: Any) -> None:
        info = read_array(like, "like")
        shape = self._checked_shape(info.device)
        buffers, launch = StepBuffers(replace(info, source=None), 0, 0, 0), None
        if shape.device.kind != "cpu":
            for name in ("head_dim", "v_head_dim"):
                if getattr(shape, name) % HEAD_DIM_STEP:
                    raise StepPlanError(f"{name}: got {getattr(shape, name)}; allowed on a GPU is a multiple of {HEAD_DIM_STEP}")
            buffers, launch = prepare_step(shape, info)
        for name, value in {"shape": shape, "_buffers": buffers, "_launch": launch}.items():
            object.__setattr__(self, name, value)

    def _checked_shape(self, device: Device) -> StepShape:
        if not isinstance(self.mask, MaskKind):
            raise ArrayTypeError(f"mask: got {type(self.mask).__qualname__}; allowed is a MaskKind")
        shape = StepShape(
            device=device,
            batch=_in_range("batch", self.batch, 0),
            heads=_in_range("heads", self.heads, 1),
            heads_kv=_in_range("heads_kv", self.heads_kv, 1),
            head_dim=_in_range("head_dim", self.head_dim, 1, MAX_HEAD_DIM),
            v_head_dim=_in_range("v_head_dim", self.head_dim if self.v_head_dim is None else self.v_head_dim, 1, MAX_HEAD_DIM),
            seqlen_q=_in_range("seqlen_q", self.seqlen_q, 0),
            packed_q=flag(self.packed_q, "packed_q"),
            band=self.mask.band(self.sink_tokens),
            capacity=_in_range("capacity", self.capacity, 0),
            new_tokens=None if self.new_tokens is None else _in_range("new_tokens", self.new_tokens, 0),
            left_pad=flag(self.left_pad, "left_pad"),
        )
        if shape.heads % shape.heads_kv:
            raise StepPlanError(f"heads: got {shape.heads} with {shape.heads_kv} KV heads; allowed is a multiple of those")
        return shape

    @classmethod
    def of(cls, request: Any) -> Self:
        """One for calls like ``request`` (a PagedAttentionRequest, CachedFwdRequest or ChunkedPrefillRequest)."""
        problem = _problem_of(request)
        shape = StepShape.of(problem)
        numbers = ("batch", "heads", "heads_kv", "head_dim", "v_head_dim", "seqlen_q", "packed_q", "capacity", "new_tokens", "left_pad")
        band: Any = shape.band
        return cls(
            problem.q,
            mask=MaskKind(band.left, band.right),
            sink_tokens=band.sink_tokens,
            **{name: getattr(shape, name) for name in numbers},
        )

    def schedule(
        self,
        seq_lens: Any,
        *,
        cu_seqlens_q: CumulativeSeqlens | None = None,
        cache_leftpad: Any = None,
        cu_seqlens_new: CumulativeSeqlens | None = None,
        stream: Any = None,
    ) -> None:
        """Enqueue the kernel that reads the lengths and cuts the keys; it may be captured in a CUDA graph. The calls of the step follow.

        Args:
            seq_lens: as the calls get them: int32 (B,), or a CumulativeSeqlens. New tokens that the calls write come on top.
            cu_seqlens_q: of a packed q.
            cache_leftpad: int32 (B,), with ``left_pad``.
            cu_seqlens_new: of packed new tokens.
            stream: the CUDA stream of the calls; None is the current one of the library of ``like``.

        Raises:
            StepPlanError: an array that the plan was not made for, or one that is missing.
            SeqLensError: lengths in host memory that are negative, shorter than their padding, or beyond ``capacity``.
            ConstructionError: an array that does not fit.
        """
        shape, like, batch = self.shape, self._buffers.array, (self.shape.batch,)
        for name, given, wanted in (
            ("cu_seqlens_q", cu_seqlens_q, shape.packed_q),
            ("cache_leftpad", cache_leftpad, shape.left_pad),
            ("cu_seqlens_new", cu_seqlens_new, shape.new_tokens is None),
        ):
            if (given is not None) is not wanted:
                got, allowed = ("None", "an array") if wanted else ("an array", "None")
                raise StepPlanError(f"{name}: got {got}; allowed is {allowed}, as the plan was declared")
        arrays: dict[str, ArrayInfo | None] = {
            "cu_seqlens_q": self._offsets(cu_seqlens_q, "cu_seqlens_q"),
            "cu_seqlens_new": self._offsets(cu_seqlens_new, "cu_seqlens_new"),
        }
        if cu_seqlens_q is not None and cu_seqlens_q.longest > shape.seqlen_q:
            raise StepPlanError(f"cu_seqlens_q: got up to {cu_seqlens_q.longest} queries; allowed are {shape.seqlen_q}, as declared")
        if isinstance(seq_lens, CumulativeSeqlens):
            arrays["cu_seqlens_k"] = self._offsets(seq_lens, "seq_lens")
        else:
            arrays["cache_lengths"] = read_int32(seq_lens, "seq_lens", batch, like, SeqLensError)
        if cache_leftpad is not None:
            arrays["left_pad"] = read_int32(cache_leftpad, "cache_leftpad", batch, like, SeqLensError)
        if shape.device.kind == "cpu" or settings().debug:
            self._check_lengths(arrays)
        self._enqueue(arrays, stream)

    def _check_lengths(self, arrays: dict[str, ArrayInfo | None]) -> None:
        """Look at the values: what requests check of theirs."""
        values = {name: copy_to_host(array).astype(np.int64) for name, array in arrays.items() if array is not None}
        before = values["cache_lengths"] if "cache_lengths" in values else np.diff(values["cu_seqlens_k"])
        new = self.shape.new_tokens
        check_lengths(
            before,
            np.diff(values["cu_seqlens_new"]) if new is None else np.full_like(before, new),
            values.get("left_pad", np.zeros_like(before)),
            name="seq_lens",
            capacity=self.shape.capacity,
            advice=", as the plan was declared",
        )

    def schedule_for(self, request: Any, *, stream: Any = None) -> None:
        """The same with the lengths of a request, which the plan has to fit.

        Raises:
            StepPlanError: it does not.
            StaleArrayError: an array of it was freed, resized or given other data.
        """
        problem = _problem_of(request)
        self.check(problem)
        cache = problem.cache
        assert cache is not None  # noqa: S101 - _problem_of has looked
        arrays = {
            "cache_lengths": cache.lengths,
            "left_pad": cache.left_pad,
            "cu_seqlens_new": None if cache.new is None else cache.new.cu_seqlens,
            "cu_seqlens_q": problem.cu_seqlens_q,
            "cu_seqlens_k": problem.cu_seqlens_k,
        }
        for name, array in arrays.items():
            if array is not None:
                check_array(array, name)
        self._enqueue(arrays, stream)

    def _enqueue(self, arrays: dict[str, ArrayInfo | None], stream: Any) -> None:
        buffers = self._buffers
        if self._launch is not None:
            check_array(buffers.array, "plan")
            raw = current_stream(buffers.array) if stream is None else raw_stream(stream)
            if self.shape.batch:
                self._launch.launch(raw, schedule_addresses(buffers, arrays))
        buffers.scheduled = True

    def check(self, problem: AttentionProblem) -> None:
        """Whether a call has what the plan was made for.

        Raises:
            StepPlanError: it differs, or asks for another way to cut its keys.
        """
        if problem.num_splits or problem.batch_invariant:
            name, got = ("batch_invariant", True) if problem.batch_invariant else ("num_splits", problem.num_splits)
            raise StepPlanError(
                f"{PLAN_NAMES}: got a StepPlan with {name}={got}; allowed is one of the two, because the plan cuts keys by lengths"
            )
        asked = StepShape.of(problem)
        if asked.packed_q and asked.seqlen_q < self.shape.seqlen_q:
            asked = replace(asked, seqlen_q=self.shape.seqlen_q)
        if asked == self.shape:
            return
        given, made = _arguments_of(asked), _arguments_of(self.shape)
        misfits = [name for name in made if given[name] != made[name]]
        raise StepPlanError(
            f"{PLAN_NAMES}: got a call with {_listed(given, misfits)} and a StepPlan made with {_listed(made, misfits)}; "
            "allowed are calls of the shape and mask that it was made for; make a plan for each kind of layer"
        )

    def adopt(self, problem: AttentionProblem) -> AttentionProblem:
        """The call with the plan; arguments and errors: :meth:`check`."""
        self.check(problem)
        return replace(problem, step=self._buffers, seqlen_q=self.shape.seqlen_q if self._launch is not None else problem.seqlen_q)

    def _offsets(self, seqlens: CumulativeSeqlens | None, name: str) -> ArrayInfo | None:
        if seqlens is None:
            return None
        if not isinstance(seqlens, CumulativeSeqlens):
            raise ArrayTypeError(f"{name}: got {type(seqlens).__qualname__}; allowed is a CumulativeSeqlens")
        check_device(seqlens.array, name, self._buffers.array)
        check_array(seqlens.array, name)
        if seqlens.batch != self.shape.batch:
            raise StepPlanError(f"{name}: got {seqlens.batch} sequences; allowed are {self.shape.batch}, as declared")
        return seqlens.array

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Copies of requests share it: it is scratch memory."""
        return self

    def __reduce__(self) -> NoReturn:
        raise StepPlanError("plan: got a StepPlan to be pickled; allowed is its own process; make one there")

    def __repr__(self) -> str:
        values = ", ".join(f"{each.name}={getattr(self.shape, each.name)}" for each in fields(StepShape))
        return f"StepPlan({values})"


def _problem_of(request: Any) -> AttentionProblem:
    problem = getattr(request, "problem", None)
    if not isinstance(problem, AttentionProblem) or problem.cache is None:
        raise StepPlanError(f"request: got {type(request).__qualname__}; allowed is a request on a KV cache")
    return problem


def _arguments_of(shape: StepShape) -> dict[str, Any]:
    """The arguments of a StepPlan of this shape, as a caller writes them."""
    arguments = {each.name: getattr(shape, each.name) for each in fields(shape)}
    band = arguments.pop("band")
    return arguments | {"mask": _spelled(band.left, band.right), "sink_tokens": band.sink_tokens}


def _spelled(left: int | None, right: int | None) -> str:
    """The call that makes a MaskKind."""
    if left is None and right in {None, 0}:
        return "MaskKind.full()" if right is None else "MaskKind.causal()"
    if right == 0 and left is not None:
        return f"MaskKind.sliding_causal({left + 1})"
    return f"MaskKind.window({-1 if left is None else left}, {-1 if right is None else right})"


def _listed(arguments: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={arguments[name]}" for name in names)


def _in_range(name: str, given: Any, least: int, most: int = MAX_LENGTH) -> int:
    number = as_integer(given)
    if number is None or not least <= number <= most:
        raise StepPlanError(f"{name}: got {given!r}; allowed is an integer in {least}..{most}")
    return number
