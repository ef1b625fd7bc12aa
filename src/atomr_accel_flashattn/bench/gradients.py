"""Backward requests of a cell: what its forward left, and the requests that begin with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..dispatch import DispatchKey, FaBwdDispatch
from ..kernels.spec import Tile
from ..problem import BackwardProblem, GradientArrays
from ..requests.backward import DenseBwdRequest
from ..runtime.execute import run
from ..types import SmArch
from ..varlen import VarlenBwdRequest
from .families import options_of, request_of

if TYPE_CHECKING:
    import torch

    from .cells import Cell
    from .inputs import Inputs

__all__ = ["Differentiable", "backward_request_of"]


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A backward request that is answered with one tile."""

    request: FaBwdDispatch
    tile: Tile

    @property
    def problem(self) -> BackwardProblem:
        """The request's."""
        return self.request.problem

    @property
    def gradient_arrays(self) -> GradientArrays:
        """The request's."""
        return self.request.gradient_arrays

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The request's, with the tile demanded."""
        key = self.request.dispatch_key(arch)
        return replace(key, extras=replace(key.extras, tile=self.tile))


@dataclass(frozen=True, slots=True, eq=False)
class Differentiable:
    """Inputs with ``dout``, and what the forward made of them: o, and the LSE in float32."""

    cell: Cell
    inputs: Inputs
    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, cell: Cell, inputs: Inputs) -> Differentiable:
        """Run the forward that functional calls take."""
        output = run(request_of(cell, inputs))
        return cls(cell, inputs, output.out, output.lse)

    def request(self, *, tile: Tile | None = None, gradients: Sequence[Any] = (None, None, None)) -> FaBwdDispatch:
        """The backward request.

        Args:
            tile: None is that of users' calls.
            gradients: where dq, dk and dv go, None for new arrays.
        """
        dq, dk, dv = gradients
        request = _request(self.cell, self.inputs, out=self.out, lse=self.lse, dq=dq, dk=dk, dv=dv)
        return request if tile is None else _Held(request, tile)


def backward_request_of(cell: Cell, inputs: Inputs) -> FaBwdDispatch:
    """A request that runs the forward itself: enough to be asked for its key."""
    return _request(cell, inputs, recompute=True)


def _request(cell: Cell, inputs: Inputs, **given: Any) -> FaBwdDispatch:
    kind: Any = DenseBwdRequest if inputs.offsets is None else VarlenBwdRequest
    options = options_of(cell, inputs) | given
    request: FaBwdDispatch = kind(inputs.q, inputs.k, inputs.v, dout=inputs.dout, deterministic=cell.deterministic, **options)
    return request
