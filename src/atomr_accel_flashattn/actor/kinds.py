"""Kind: all that forward, paged and backward requests differ in, for an actor and for a pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Final

from ..arrays.read import user_array
from ..cached import CachedFwdRequest
from ..dispatch import FaBwdDispatch, FaFwdDispatch, FaPagedFwdDispatch
from ..errors import UnknownMessageError
from ..fa2 import Fa2BwdRequest, Fa2FwdRequest
from ..fa3 import Fa3FwdFp8Request, Fa3FwdRequest
from ..paged import PagedAttentionRequest
from ..prefill import ChunkedPrefillRequest
from ..problem import ArrayInfo, AttentionProblem
from ..requests.backward import DenseBwdRequest
from ..requests.dense import DenseFwdRequest
from ..runtime.execute import fill, make_outputs
from ..runtime.gradients import GradientOutputs, Gradients, fill_gradients, make_gradients
from ..runtime.plan import Output, Outputs, Plan, find
from ..runtime.staleness import Fingerprint
from ..varlen import VarlenBwdRequest, VarlenFwdRequest
from .messages import FlashAttnMsg, Message

__all__ = ["Kind", "kind_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What is done with the requests of one kind of message.

    Attributes:
        name: of the message.
        protocol: what its requests satisfy.
        fits: what else a request has to be.
        own: our classes of such requests: to ask the protocol takes longer than a launch.
        forward: the forward problem of a request.
        fingerprint: the arrays of a request, looked at once.
        find: the plan of a message, None where there is none yet.
        make: the arrays that a message writes, given its plan, if that is known.
        fill: do a request into them: ``fill(request, outputs, plan, stream=...)``.
        written: arguments of a request that name arrays to be written.
        targets: the descriptions of these arrays, None for new ones.
        answered: arrays of an answer, those of ``written`` first.
        answer: an answer made of these arrays, and of the request.
        work: floating-point operations, relative to a forward.
    """

    name: str
    protocol: type
    own: tuple[type, ...]
    forward: Callable[[Any], AttentionProblem]
    fingerprint: Callable[[Any], Fingerprint]
    find: Callable[[Any], Plan | None]
    make: Callable[[Any, Plan | None], Outputs | GradientOutputs]
    fill: Callable[..., Plan | None]
    written: tuple[str, ...]
    targets: Callable[[Any], tuple[ArrayInfo | None, ...]]
    answered: tuple[str, ...]
    answer: Callable[..., Output | Gradients]
    work: float
    fits: Callable[[Any], bool] = lambda _request: True

    def takes(self, request: Any) -> bool:
        """Whether ``request`` is one of this kind."""
        return isinstance(request, self.protocol) and not isinstance(request, type) and self.fits(request)

    def check(self, request: Any) -> None:
        """Raise UnknownMessageError unless ``request`` is one of this kind."""
        if self.takes(request):
            return
        *others, last = (each.__name__ for each in self.own)
        fitting = next((kind for kind in _KINDS.values() if kind.takes(request)), None)
        hint = "" if fitting is None else f"; send it as FlashAttnMsg.{fitting.name}"
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise UnknownMessageError(f"message: got a {self.name} with {type(request).__qualname__}; allowed is a {allowed}{hint}")


def _plan_of_forward(message: FlashAttnMsg.Forward) -> Plan | None:
    return None if message.dropout_mask else find(message.request)


def _make_outputs(message: FlashAttnMsg.Forward, plan: Plan | None) -> Outputs:
    return make_outputs(message.request, plan, lse=message.lse, dropout_mask=message.dropout_mask)


def _make_gradients(message: FlashAttnMsg.Backward, plan: Plan | None) -> GradientOutputs:
    return make_gradients(message.request, plan)


def _output(request: FaFwdDispatch, out: Any, lse: Any, dropout_mask: Any) -> Output:
    dropout = request.problem.dropout
    return Output(out, lse, dropout_mask, dropout and user_array(dropout.rng))


def _gradients(_request: FaBwdDispatch, *arrays: Any) -> Gradients:
    return Gradients(*arrays)


_FORWARD: Final = Kind(
    name="Forward",
    protocol=FaFwdDispatch,
    own=(DenseFwdRequest, Fa2FwdRequest, Fa3FwdRequest, Fa3FwdFp8Request, VarlenFwdRequest, CachedFwdRequest, ChunkedPrefillRequest),
    forward=attrgetter("problem"),
    fingerprint=Fingerprint.of,
    find=_plan_of_forward,
    make=_make_outputs,
    fill=fill,
    written=("out",),
    targets=lambda request: (request.out_array,),
    answered=("out", "lse", "dropout_mask"),
    answer=_output,
    work=1.0,
)
_BACKWARD: Final = Kind(
    name="Backward",
    protocol=FaBwdDispatch,
    own=(DenseBwdRequest, Fa2BwdRequest, VarlenBwdRequest),
    forward=attrgetter("problem.forward"),
    fingerprint=Fingerprint.of_backward,
    find=lambda message: find(message.request),
    make=_make_gradients,
    fill=fill_gradients,
    written=("dq", "dk", "dv"),
    targets=attrgetter("gradient_arrays"),
    answered=("dq", "dk", "dv", "dsink"),
    answer=_gradients,
    work=2.5,  # five products instead of two
)


_PAGED: Final = replace(
    _FORWARD,
    name="PagedForward",
    protocol=FaPagedFwdDispatch,
    own=(PagedAttentionRequest,),
    fits=lambda request: request.problem.cache is not None and request.problem.cache.paged,
    find=lambda message: find(message.request),
    make=lambda message, plan: make_outputs(message.request, plan, lse=message.lse),
)
_KINDS: Final[dict[type[Message[Any]], Kind]] = {
    FlashAttnMsg.PagedForward: _PAGED,
    FlashAttnMsg.Forward: _FORWARD,
    FlashAttnMsg.Backward: _BACKWARD,
}


def kind_of(message: Message[Any]) -> Kind:
    """That of a message."""
    return _KINDS.get(type(message)) or next(kind for each, kind in _KINDS.items() if isinstance(message, each))
