"""One tile on one shape: compiled, launched into poisoned arrays, checked, and then timed."""

from __future__ import annotations

import contextlib
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ..arrays.streams import current_stream
from ..bench.cache_cells import CacheCell
from ..bench.cache_inputs import CacheInputs, check_cache_rows
from ..bench.cache_requests import cache_request
from ..bench.cells import Cell
from ..bench.families import request_of
from ..bench.gradients import Differentiable
from ..bench.graphs import Clock
from ..bench.inputs import ERROR_LIMIT, GRADIENT_ERROR_LIMIT, Inputs, check_gradients, check_rows, out_dtype
from ..bench.peers import first_line
from ..bench.timing import Contestant
from ..errors import CompileError, DeviceLostError, FlashAttnError
from ..jit.compile import CompiledKernel
from ..kernels.attention import AttentionSpec
from ..kernels.spec import KernelSpec, Tile
from ..problem import ArrayInfo
from ..runtime.execute import execute, fill, make_outputs
from ..runtime.gradients import GradientOutputs, fill_gradients, gradient_addresses, make_gradients
from ..runtime.on_cache import cache_addresses
from ..runtime.plan import Plan, addresses_of
from ..types import DType

if TYPE_CHECKING:
    import torch

__all__ = ["BackwardStand", "CacheStand", "ForwardStand", "Shape", "Stand", "Trial"]

Shape: TypeAlias = Cell | CacheCell


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


class Stand(ABC):
    """A shape's inputs and answers on the card, and what was launched on them.

    Args:
        cell: the shape.
        sets: inputs, together more than the L2 cache holds.
        spec: the kernel whose tiles are compared.
        short_q: whether the key of the shape says so.
        cache_rows: of a shape over a KV cache, what its key says; else 0.

    Attributes:
        calls_at_once: how many calls a contestant makes in what is timed as one.
    """

    ERROR_LIMIT: ClassVar[Mapping[DType, float]]

    def __init__(self, cell: Shape, sets: Sequence[Any], spec: AttentionSpec, *, short_q: bool = False, cache_rows: int = 0) -> None:
        self.cell: Shape = cell
        self.sets: Sequence[Any] = sets
        self.spec, self.short_q, self.cache_rows = spec, short_q, cache_rows
        self.calls_at_once = 1
        self._launched: dict[tuple[tuple[KernelSpec, int], ...], Tile] = {}

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
            trial.refused = first_line(refusal)
            return None
        if trial.refused is not None:
            return None
        try:
            unwritten = any(bool(array.isnan().any()) for n in range(len(self.sets)) for array in self._answer(n))
        except RuntimeError as error:  # torch's own: it is the first to wait for the kernel
            raise DeviceLostError(
                f"the tile {trial.tile} failed on {self.cell}: {error}. Restart, and leave it out with --tiles",
                kernel_name=self.spec.kernel_name,
            ) from error
        trial.error, limit = self._error(), self.ERROR_LIMIT[self.cell.dtype]
        if unwritten:
            trial.refused = "wrong: it leaves rows unwritten, or NaN in them"
        elif trial.error > limit:
            trial.refused = f"wrong: relative error {trial.error:.3g}, at most {limit:g} allowed"
        return None if trial.refused is not None else self._contestant(calls)

    def clear(self) -> None:
        """Let go of inputs, answers and launches."""
        self.sets = ()
        self._launched.clear()

    def _contestant(self, calls: Sequence[Callable[[], None]]) -> Contestant:
        return Contestant(calls, contextlib.nullcontext)

    def _calls(self, trial: Trial) -> list[Callable[[], None]]:
        calls = []
        for n in range(len(self.sets)):
            for array in self._answer(n):
                array.fill_(float("nan"))
            plan, repeated = self._run(n, trial.tile)
            if plan is None or not plan.launches:
                trial.refused = "nothing to launch"
                return []
            launches = tuple(step for launch in plan.launches for step in launch.steps)
            same = self._launched.setdefault(launches, trial.tile)
            if same != trial.tile:
                trial.same_as, trial.refused = same, f"the same launch as {same} here"
                return []
            calls.append(repeated)
        return calls

    @abstractmethod
    def _answer(self, n: int) -> tuple[torch.Tensor, ...]:
        """The arrays that calls on input set ``n`` write."""

    @abstractmethod
    def _run(self, n: int, tile: Tile) -> tuple[Plan | None, Callable[[], None]]:
        """Answer input set ``n`` with a tile: the plan, None without a GPU, and a call that repeats it."""

    @abstractmethod
    def _error(self) -> float:
        """Relative error of the answer to the first input set."""


class ForwardStand(Stand):
    """O of a shape."""

    ERROR_LIMIT = ERROR_LIMIT
    cell: Cell

    def __init__(self, cell: Cell, sets: Sequence[Inputs], spec: AttentionSpec, *, short_q: bool, cache_rows: int = 0) -> None:
        super().__init__(cell, sets, spec, short_q=short_q, cache_rows=cache_rows)
        self._outs = [x.q.new_empty((*x.q.shape[:-1], cell.value_dim), dtype=out_dtype(cell.dtype)) for x in sets]

    def clear(self) -> None:
        """Let go of the outputs too."""
        super().clear()
        self._outs = []

    def _answer(self, n: int) -> tuple[torch.Tensor, ...]:
        return (self._outs[n],)

    def _run(self, n: int, tile: Tile) -> tuple[Plan | None, Callable[[], None]]:
        request = request_of(self.cell, self.sets[n], self.spec.family, tile=tile, out=self._outs[n])
        plan, problem = execute(request, lse=False)[1], request.problem
        if plan is None:
            return None, _nothing
        outputs = make_outputs(request, lse=False)
        return plan, _repeated(plan, problem.q, addresses_of(problem, outputs, plan.workspace), outputs)

    def _error(self) -> float:
        return check_rows(self.cell, self.sets[0], self._outs[0])


class BackwardStand(Stand):
    """Gradients of a shape, whose forward runs once. All launches of a backward are timed."""

    ERROR_LIMIT = GRADIENT_ERROR_LIMIT
    cell: Cell

    def __init__(self, cell: Cell, sets: Sequence[Inputs], spec: AttentionSpec, *, short_q: bool) -> None:
        super().__init__(cell, sets, spec, short_q=short_q)
        self._forwards = [Differentiable.of(cell, inputs) for inputs in sets]
        self._gradients = [tuple(x.new_empty(x.shape) for x in (inputs.q, inputs.k, inputs.v)) for inputs in sets]
        self._outputs: dict[int, GradientOutputs] = {}  # tiles share the largest workspace

    def clear(self) -> None:
        """Let go of what the forward made, gradients and workspaces too."""
        super().clear()
        self._forwards, self._gradients = [], []
        self._outputs.clear()

    def _answer(self, n: int) -> tuple[torch.Tensor, ...]:
        return self._gradients[n]

    def _run(self, n: int, tile: Tile) -> tuple[Plan | None, Callable[[], None]]:
        request = self._forwards[n].request(tile=tile, gradients=self._gradients[n])
        key = request.dispatch_key()
        outputs = make_gradients(request, key=key)
        if n in self._outputs and _workspace_bytes(self._outputs[n]) >= _workspace_bytes(outputs):
            outputs = self._outputs[n]
        self._outputs[n] = outputs
        plan, problem = fill_gradients(request, outputs, key=key), request.problem
        if plan is None or plan.workspace is None:
            return None, _nothing
        return plan, _repeated(plan, problem.forward.q, gradient_addresses(problem, outputs, plan.workspace), outputs)

    def _error(self) -> float:
        return check_gradients(self.cell, self.sets[0], self._gradients[0])


class CacheStand(Stand):
    """O of a shape over a KV cache. Calls are as short as their enqueue, so what is timed is a graph of some."""

    ERROR_LIMIT = ERROR_LIMIT
    cell: CacheCell

    def __init__(
        self, cell: CacheCell, sets: Sequence[CacheInputs], spec: AttentionSpec, *, short_q: bool, cache_rows: int, clock: Clock
    ) -> None:
        super().__init__(cell, sets, spec, short_q=short_q, cache_rows=cache_rows)
        self._clock = clock
        self._outs = [x.q.new_empty(x.q.shape, dtype=out_dtype(cell.type_of_q)) for x in sets]

    def clear(self) -> None:
        """Let go of the outputs too."""
        super().clear()
        self._outs = []

    def _contestant(self, calls: Sequence[Callable[[], None]]) -> Contestant:
        contestant, self.calls_at_once = self._clock.ready(self.cell, calls)
        return contestant

    def _answer(self, n: int) -> tuple[torch.Tensor, ...]:
        return (self._outs[n],)

    def _run(self, n: int, tile: Tile) -> tuple[Plan | None, Callable[[], None]]:
        request = cache_request(self.cell, self.sets[n], tile=tile, out=self._outs[n])
        key, problem = request.dispatch_key(), request.problem
        outputs = make_outputs(request, lse=False, key=key)
        plan = fill(request, outputs, key=key)
        if plan is None or plan.workspace is None:
            return None, _nothing
        addresses = cache_addresses(problem, outputs, plan.workspace)

        def call(_held: object = (request, outputs)) -> None:
            plan.launch(current_stream(problem.q), addresses)  # that of a capture, too

        return plan, call

    def _error(self) -> float:
        return check_cache_rows(self.cell, self.sets[0], self._outs[0])


def _workspace_bytes(outputs: GradientOutputs) -> int:
    return 0 if outputs.workspace is None else prod(outputs.workspace.shape)


def _repeated(plan: Plan, q: ArrayInfo, addresses: tuple[int, ...], held: object) -> Callable[[], None]:
    """The plan once more, on the same arrays; ``held`` owns those that nobody else does."""
    stream = current_stream(q)

    def call(_held: object = held) -> None:
        plan.launch(stream, addresses)

    return call


def _nothing() -> None:
    """The call of a plan that is none."""
