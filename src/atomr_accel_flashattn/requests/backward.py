"""DenseBwdRequest: the gradients of one call on dense (B, S, H, D) arrays, checked once, when it is made.

A backward request makes the forward request of its call, so what that refuses is refused in the same words.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

from ..arrays.read import read_array, share_memory
from ..dispatch import DispatchKey, best_arch, key_of_backward
from ..errors import (
    ArrayTypeError,
    DropoutError,
    DTypeError,
    OutputError,
    ShapeError,
    StrideError,
    UnsupportedArgumentError,
)
from ..limits import not_built
from ..problem import ArrayInfo, AttentionProblem, BackwardProblem, GradientArrays
from ..runtime.plan import Key, key_of_backward_request
from ..short_repr import ShortRepr
from ..types import DType, SmArch
from .checks import check_device, check_out, is_contiguous, refuse_gradients
from .copies import MadeAnew
from .dense import DenseFwdRequest
from .forward import ForwardRequest
from .options import AttentionOptions, MaskKind, PositionBias

__all__ = ["BackwardRequest", "DenseBwdRequest"]

_READ = ("q", "k", "v", "out", "dout", "lse", "dlse")
_WRITTEN = ("dq", "dk", "dv")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BackwardRequest(MadeAnew, ShortRepr):
    """What backward requests share. Subclasses say what the forward call was; attributes: as in DenseBwdRequest."""

    q: Any
    k: Any
    v: Any
    out: Any = None
    dout: Any = None
    lse: Any = None
    dlse: Any = field(default=None, kw_only=True)
    mask: MaskKind = field(default=MaskKind.full(), kw_only=True)
    bias: PositionBias = field(default=PositionBias.none(), kw_only=True)
    sink_tokens: int = field(default=0, kw_only=True)
    options: AttentionOptions = field(default=AttentionOptions(), kw_only=True)
    recompute: bool = field(default=False, kw_only=True)
    deterministic: bool = field(default=False, kw_only=True)
    dq: Any = field(default=None, kw_only=True)
    dk: Any = field(default=None, kw_only=True)
    dv: Any = field(default=None, kw_only=True)
    problem: BackwardProblem = field(init=False, repr=False)
    gradient_arrays: GradientArrays = field(init=False, repr=False)
    plan_key: Key | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_before_forward(self)
        _check_backward(self, self._forward().problem)

    @abstractmethod
    def _forward(self) -> ForwardRequest:
        """The forward request of the call, which checks what they share."""

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key of this request on ``arch``; None is the best one for the device of q."""
        return key_of_backward(self.problem, self.gradient_arrays, arch or best_arch(self.problem.forward.q.device))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DenseBwdRequest(BackwardRequest):
    """Gradients of attention by the kernel family that calls on the device take. Meaning: docs/semantics.md, Gradients.

    ``run`` gives the gradients of sum(o * dout) + sum(lse * dlse). Arrays as in DenseFwdRequest.

    Attributes:
        q: (B, Sq, Hq, D), as k, v, mask, bias, sink_tokens and options that of the forward call.
        k: (B, Sk, Hkv, D).
        v: (B, Sk, Hkv, Dv).
        out: (B, Sq, Hq, Dv), o of the forward call.
        dout: (B, Sq, Hq, Dv), gradient of o; None is zero, with a ``dlse``.
        lse: float32 (B, Hq, Sq), row-major, LSE of the forward call.
        dlse: float32 (B, Hq, Sq), row-major, gradient of the LSE; None is zero.
        mask: which keys a query sees.
        bias: ALiBi slopes, or none; they get no gradient.
        sink_tokens: first keys that stay visible when a window has passed them.
        options: scale, softcap, learned sink, dropout; with dropout ``options.rng`` is ``Output.rng`` of the forward call.
        recompute: whether the forward runs first; ``out`` and ``lse`` are then not given.
        deterministic: whether gradients are to be bitwise equal from run to run. Those of the CPU backend always are.
        dq: (B, Sq, Hq, D) to be written, None for a new array of q's library; so are dk and dv.
        dk: (B, Sk, Hkv, D).
        dv: (B, Sk, Hkv, Dv).
        problem: the request in its normal form (made, not given).
        gradient_arrays: the descriptions of dq, dk and dv (made, not given).
        plan_key: what its plan is found by; None on the CPU (made, not given).

    Raises:
        ConstructionError: the subclass says which argument is wrong; nothing has been written.
        FeatureNotBuiltError: fp8, torch tensors that want second derivatives, or forward-mode ones.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and gradient_arrays

    def _forward(self) -> ForwardRequest:
        return DenseFwdRequest(self.q, self.k, self.v, mask=self.mask, bias=self.bias, sink_tokens=self.sink_tokens, options=self.options)


def _check_before_forward(request: Any) -> None:
    """What a forward request would let pass, or would name otherwise: second derivatives, and a seed that is drawn anew.

    Raises:
        FeatureNotBuiltError: an array wants a derivative of the gradients.
        DropoutError: dropout without the seed of the forward call.
        UnsupportedArgumentError: ``batch_invariant``, which is of the forward alone.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.is_grad_enabled():
        for name in _READ:
            array = getattr(request, name)
            if isinstance(array, torch.Tensor) and array.requires_grad:
                raise not_built(
                    "double_backward", f"{name} requires grad and gradients are enabled; use torch.no_grad() or {name}.detach()"
                )
    options = request.options
    if isinstance(options, AttentionOptions) and options.batch_invariant:
        raise UnsupportedArgumentError(
            "batch_invariant: got True with a backward request, whose sums run over the batch; allowed is False; "
            "deterministic=True gives gradients that are equal from run to run"
        )
    if isinstance(options, AttentionOptions) and options.dropout_p > 0 and options.rng is None:
        raise DropoutError(
            f"rng: got None with dropout_p {options.dropout_p}; allowed is the (seed, offset) array of the forward call; "
            "pass its Output.rng in the options"
        )


def _check_backward(request: Any, forward: AttentionProblem) -> None:
    """Check what a backward request has beside its forward one, and write its normal form into it.

    Raises:
        ConstructionError: the subclass says which argument is wrong.
    """
    if forward.descales is not None:
        raise not_built("fp8_backward", f"q, k and v have types {forward.q.dtype_name}, {forward.k.dtype_name}, {forward.v.dtype_name}")
    for name in ("recompute", "deterministic"):
        if not isinstance(getattr(request, name), bool):
            raise UnsupportedArgumentError(f"{name}: got {getattr(request, name)!r}; allowed are True and False")
    for name in ("out", "lse"):
        given = getattr(request, name) is not None
        if given and request.recompute:
            raise UnsupportedArgumentError(
                f"{name}: got an array with recompute=True, which would not be looked at; allowed is None, or recompute=False"
            )
        if not (given or request.recompute):
            raise ArrayTypeError(f"{name}: got None; allowed is the array that the forward call made, or recompute=True")
    if request.dout is None and request.dlse is None:
        raise ArrayTypeError("dout: got None, and no dlse; allowed is the gradient of o, of the LSE, or both")
    out, dout = (_like_out(getattr(request, name), name, forward) for name in ("out", "dout"))
    lse, dlse = (_like_lse(getattr(request, name), name, forward) for name in ("lse", "dlse"))
    problem = BackwardProblem(forward=forward, out=out, lse=lse, dout=dout, dlse=dlse, deterministic=request.deterministic)
    object.__setattr__(request, "problem", problem)
    object.__setattr__(request, "gradient_arrays", _written(request, problem))
    object.__setattr__(request, "plan_key", key_of_backward_request(request))


def _like_out(x: Any, name: str, forward: AttentionProblem) -> ArrayInfo | None:
    """o, or its gradient."""
    if x is None:
        return None
    info, q = read_array(x, name), forward.q
    refuse_gradients(info, name)
    if info.shape != forward.out_shape:
        raise ShapeError(f"{name}: got shape {info.shape}; allowed is that of o, {forward.out_shape}")
    if info.dtype is not q.dtype:
        raise DTypeError(f"{name}: got type {info.dtype_name} with {q.dtype_name} in q; allowed is the type of q; convert {name}")
    check_device(info, name, q)
    if info.shape[-1] > 1 and info.strides[-1] != 1:
        raise StrideError(
            f"{name}: got strides {info.strides}; allowed is a last stride of 1; call .contiguous() or numpy.ascontiguousarray"
        )
    return info


def _like_lse(x: Any, name: str, forward: AttentionProblem) -> ArrayInfo | None:
    """The LSE, or its gradient."""
    if x is None:
        return None
    info = read_array(x, name)
    refuse_gradients(info, name)
    if info.shape != forward.lse_shape:
        raise ShapeError(f"{name}: got shape {info.shape}; allowed is that of the LSE, {forward.lse_shape}")
    if info.dtype is not DType.F32:
        raise DTypeError(f"{name}: got type {info.dtype_name}; allowed is float32; call .float() or .astype('float32')")
    check_device(info, name, forward.q)
    if not is_contiguous(info):
        raise StrideError(f"{name}: got strides {info.strides} for shape {info.shape}; allowed is a row-major array; call .contiguous()")
    return info


def _written(request: Any, problem: BackwardProblem) -> GradientArrays:
    """The caller's own arrays for gradients: none of them may lie where something is read, or where another one lies."""
    forward = problem.forward
    others = (problem.out, problem.lse, problem.dout, problem.dlse, forward.alibi_slopes, forward.learned_sink)
    inputs = (forward.q, forward.k, forward.v, *(each for each in others if each is not None))
    shapes = (forward.q.shape, forward.k.shape, forward.v.shape)
    made = GradientArrays(
        *(
            check_out(getattr(request, name), shape, inputs, name=name, taken="an input")
            for name, shape in zip(_WRITTEN, shapes, strict=True)
        )
    )
    for (one, first), (other, second) in combinations(zip(_WRITTEN, made, strict=True), 2):
        if first is not None and second is not None and share_memory(first, second):
            raise OutputError(f"{other}: got memory of {one}; allowed is an array of its own; pass a copy")
    return made
