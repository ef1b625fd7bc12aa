"""Our kernels with the family chosen by hand: one more column beside the calls that users make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arrays.streams import current_stream
from ..dispatch import DispatchKey, FaFwdDispatch, best_arch, key_of_problem, lookup
from ..fa2 import MaskKind, PositionBias
from ..kernels.spec import Family, KernelSpec, Tile
from ..problem import ArrayInfo, AttentionProblem
from ..requests.dense import DenseFwdRequest
from ..requests.options import AttentionOptions, Fp8Options
from ..runtime.execute import execute, make_outputs
from ..runtime.plan import SLOTS, Plan, addresses_of
from ..types import SmArch
from ..varlen import CumulativeSeqlens, VarlenFwdRequest
from .peers import Call, Peer, Refused

if TYPE_CHECKING:
    import torch

    from .cells import Cell
    from .inputs import Inputs

__all__ = ["OfFamily", "OursSingleLevel", "options_of", "repeated", "request_of"]

_OUT = SLOTS.index("o")


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A request, dense or packed, that is answered by one family, or with one tile."""

    request: FaFwdDispatch
    family: Family | None
    tile: Tile | None

    @property
    def problem(self) -> AttentionProblem:
        """The request's."""
        return self.request.problem

    @property
    def out_array(self) -> ArrayInfo | None:
        """The request's."""
        return self.request.out_array

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """A key like the request's, with family and tile demanded, on an arch that has the family."""
        return key_of_problem(self.problem, arch or best_arch(self.problem.q.device), self.out_array, self.family, tile=self.tile)


def request_of(
    cell: Cell,
    inputs: Inputs,
    family: Family | None = None,
    *,
    tile: Tile | None = None,
    out: Any = None,
    fp8: Fp8Options | None = None,
) -> FaFwdDispatch:
    """The request of a cell; None takes the family, the tile, the kind of output and the options of fp8 that functional calls take."""
    kind: Any = DenseFwdRequest if inputs.offsets is None else VarlenFwdRequest
    request: FaFwdDispatch = kind(inputs.q, inputs.k, inputs.v, out=out, fp8=fp8, **options_of(cell, inputs))
    return request if family is None and tile is None else _Held(request, family, tile)


def options_of(cell: Cell, inputs: Inputs) -> dict[str, Any]:
    """What requests of a cell, forward or backward, are told beside arrays."""
    lengths = {} if inputs.offsets is None else {"cu_seqlens_q": CumulativeSeqlens(inputs.offsets, inputs.max_length)}
    return {
        "mask": MaskKind.window(*cell.bounds),
        "bias": PositionBias(inputs.slopes),
        "sink_tokens": cell.sink_tokens,
        "options": AttentionOptions(softcap=cell.softcap),
        **lengths,
    }


def repeated(plan: Plan, request: FaFwdDispatch) -> Call:
    """The plan once more, into a new output every time, as the functional calls do."""
    import torch

    stream = current_stream(request.problem.q)
    outputs = make_outputs(request, plan, lse=False)
    addresses, like = addresses_of(request.problem, outputs, plan.workspace), outputs.out.source
    before, after = addresses[:_OUT], addresses[_OUT + 1 :]

    def call(_held: object = outputs) -> torch.Tensor:
        out = torch.empty_like(like)
        plan.launch(stream, (*before, out.data_ptr(), *after))
        return out

    return call


def _prepared(request: FaFwdDispatch) -> Call:
    plan = execute(request, lse=False)[1]
    if plan is None or not plan.launches:
        raise Refused("nothing to launch")
    return repeated(plan, request)


class OfFamily(Peer):
    """This package with the family chosen: a plan that is repeated, with a new output every time, as the functional calls do."""

    def __init__(self, family: Family, name: str) -> None:
        self.family = family
        self.name = name

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Every cell, on a GPU that has the family."""
        request = request_of(cell, inputs, self.family)
        spec = lookup(request.dispatch_key())
        if not isinstance(spec, KernelSpec) or spec.family is not self.family:
            raise Refused(f"{self.family.value} resolves to {spec.kernel_name} here")
        return _prepared(request)


class OursSingleLevel(Peer):
    """This package with P V of fp8 in the accumulator of wgmma alone: what the float32 total costs."""

    name = "ours_single_level"

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Cells of fp8 that wgmma answers."""
        if not cell.dtype.is_fp8:
            raise Refused("it stands beside cells of fp8")
        request = request_of(cell, inputs, fp8=Fp8Options(single_level=True))
        if not getattr(lookup(request.dispatch_key()), "single_level", False):
            raise Refused("nothing but wgmma sums so")
        return _prepared(request)
