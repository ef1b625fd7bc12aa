"""One tile on one shape: compiled, launched into poisoned outputs, checked against float32, and only then fit to be timed."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..arrays.streams import current_stream
from ..bench.families import request_of
from ..bench.inputs import ERROR_LIMIT, Inputs, check_rows
from ..bench.timing import Contestant
from ..dispatch import FaFwdDispatch
from ..errors import CompileError, DeviceLostError, FlashAttnError
from ..jit.compile import CompiledKernel
from ..kernels.forward import ForwardSpec
from ..kernels.spec import KernelSpec, Tile
from ..runtime.execute import execute, make_outputs
from ..runtime.plan import Plan, addresses_of

if TYPE_CHECKING:
    import torch

    from ..bench.cells import Cell

__all__ = ["Stand", "Trial"]


@dataclass(slots=True, kw_only=True)
class Trial:
    """What is known of a tile on a shape. Without ``rounds`` it was not timed, and ``refused`` says why.

    Attributes:
        tile: how the work is cut.
        in_use: whether calls take it now.
        registers: per thread.
        spill_bytes: stored plus loaded, per thread.
        error: relative, of sampled rows against float32.
        rounds: milliseconds per call, one entry per round.
        finalist: whether it was timed in every round, or only screened.
        refused: why it was not timed.
        same_as: a tile that makes the same launch on this shape, whose time is this one's too.
    """

    tile: Tile
    in_use: bool = False
    registers: int | None = None
    spill_bytes: int | None = None
    error: float | None = None
    rounds: list[float] = field(default_factory=list)
    finalist: bool = False
    refused: str | None = None
    same_as: Tile | None = None

    @property
    def ms(self) -> float | None:
        """Median of the rounds."""
        return statistics.median(self.rounds) if self.rounds else None

    def note_compiled(self, made: CompiledKernel | CompileError, max_spill: int) -> None:
        """Keep what the compiler said; refuse what failed, and what spills more than ``max_spill`` bytes unless it is in use."""
        if isinstance(made, CompileError):
            self.refused = "does not compile: " + str(made).split("\n")[0][:300]
            return
        self.registers, self.spill_bytes = made.registers, made.spill_bytes
        if made.spill_bytes > max_spill and not self.in_use:
            self.refused = f"spills {made.spill_bytes} bytes"


class Stand:
    """A shape's inputs and outputs on the card, and what was launched on them.

    Args:
        cell: the shape.
        sets: inputs, together more than the L2 cache holds.
        spec: the kernel whose tiles are compared.
        short_q: whether the key of the shape says so.
    """

    def __init__(self, cell: Cell, sets: Sequence[Inputs], spec: ForwardSpec, *, short_q: bool) -> None:
        self.cell = cell
        self.sets: Sequence[Inputs] = sets
        self.spec, self.short_q = spec, short_q
        self._outs = [_output(cell, inputs) for inputs in sets]
        self._launched: dict[tuple[KernelSpec, int], Tile] = {}

    def enter(self, trial: Trial) -> Contestant | None:
        """The calls of a tile that gave the right answer; None when it may not be timed, with the reason in ``trial``.

        Raises:
            DeviceLostError: a kernel took the device down; nothing can be timed in this process any more.
        """
        try:
            calls = self._calls(trial)
        except DeviceLostError:
            raise
        except FlashAttnError as refusal:
            trial.refused = f"{type(refusal).__name__}: {refusal}".split("\n")[0][:300]
            return None
        if trial.refused is not None:
            return None
        try:
            unwritten = any(bool(out.isnan().any()) for out in self._outs)
        except RuntimeError as error:  # torch's own: it is the first to wait for the kernel
            raise DeviceLostError(
                f"the tile {trial.tile} failed on {self.cell}: {error}. Restart, and leave it out with --tiles",
                kernel_name=self.spec.kernel_name,
            ) from error
        trial.error = check_rows(self.cell, self.sets[0], self._outs[0])
        if unwritten:
            trial.refused = "wrong: it leaves rows unwritten, or NaN in them"
        elif trial.error > ERROR_LIMIT[self.cell.dtype]:
            trial.refused = f"wrong: relative error {trial.error:.3g}, at most {ERROR_LIMIT[self.cell.dtype]:g} allowed"
        return None if trial.refused is not None else Contestant(calls, contextlib.nullcontext)

    def clear(self) -> None:
        """Let go of inputs, outputs and launches."""
        self.sets, self._outs = (), []
        self._launched.clear()

    def _calls(self, trial: Trial) -> list[Callable[[], None]]:
        calls = []
        for inputs, out in zip(self.sets, self._outs, strict=True):
            out.fill_(float("nan"))
            request = request_of(self.cell, inputs, self.spec.family, tile=trial.tile, out=out)
            plan = execute(request, lse=False)[1]
            if plan is None or not plan.launches:
                trial.refused = "nothing to launch"
                return []
            (launch,) = plan.launches
            same = self._launched.setdefault((launch.kernel.spec, launch.grid), trial.tile)
            if same != trial.tile:
                trial.same_as, trial.refused = same, f"the same launch as {same} here"
                return []
            calls.append(_repeated(plan, request))
        return calls


def _output(cell: Cell, inputs: Inputs) -> torch.Tensor:
    return inputs.q.new_empty((*inputs.q.shape[:-1], cell.value_dim))


def _repeated(plan: Plan, request: FaFwdDispatch) -> Callable[[], None]:
    """The plan once more, on the same arrays."""
    stream, addresses = current_stream(request.problem.q), addresses_of(request.problem, make_outputs(request, lse=False))
    return lambda: plan.launch(stream, addresses)
