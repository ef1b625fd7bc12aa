"""The backward benchmark: who takes part, what the calls are and how answers are checked.

Ours is a request that was made once, with o and LSE of a forward: each call makes the gradients
anew and launches all kernels of a backward. Peers differentiate a forward that was recorded once,
by torch's autograd. How it runs: :mod:`.measure`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..dispatch import lookup
from ..runtime.execute import run
from .autograd import GradientCall, backward_of, deterministic_algorithms, peak_bytes, training_step
from .cells import Cell, backward_cells, select
from .forward import chosen_peers
from .gradients import Differentiable, backward_request_of
from .inputs import GRADIENT_ERROR_LIMIT, Inputs, check_gradients, make_inputs
from .measure import Direction, Options, Report, Row, card, run_cells
from .peers import CudnnPeer, Ours, Peer, Refused, TorchFa2, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["Backward", "MemoryRow", "run_backward", "step_memory"]

MEMORY_CELLS: Final = frozenset(
    {"grid_d128_h16_causal_2k", "grid_d128_h16_causal_16k", "grid_d64_h32_causal_16k", "gqa_d128_h32x8_causal_8k"}
)


class Backward(Direction):
    """Gradients of q, k and v of each cell."""

    NAME = "backward"
    ERROR_LIMIT = GRADIENT_ERROR_LIMIT

    def cells(self, patterns: str | None) -> list[Cell]:
        """Those of the backward benchmark."""
        return select(patterns, backward_cells())

    def peers(self, options: Options) -> list[Peer]:
        """Those of the forward; ValueError with families, of which the backward has one."""
        if options.families:
            raise ValueError(f"got families {', '.join(options.families)}; the backward has one family, so leave them out")
        return chosen_peers(options)

    def inputs(self, cell: Cell, device: torch.device, l2_bytes: int, seed: int) -> list[Inputs]:
        """With a gradient of o."""
        return make_inputs(cell, device, l2_bytes=l2_bytes, seed=seed, dout=True)

    def prepare(self, peer: Peer, cell: Cell, inputs: Inputs) -> GradientCall:
        """A request of ours, the recorded forward of a peer."""
        if isinstance(peer, Ours):
            return _requested(cell, inputs)
        if cell.deterministic and not isinstance(peer, TorchFa2):
            raise Refused("of the peers only torch's FlashAttention-2 is asked for equal bits")
        return backward_of(peer, cell, inputs)

    @contextlib.contextmanager
    def context(self, peer: Peer, cell: Cell) -> Iterator[None]:
        """The peer's own, and torch's switch around deterministic cells."""
        with peer.context(), deterministic_algorithms() if cell.deterministic else contextlib.nullcontext():
            yield

    def error(self, cell: Cell, inputs: Inputs, answer: Sequence[torch.Tensor]) -> float:
        """Of a KV head and its query heads."""
        return check_gradients(cell, inputs, answer)

    def flops(self, cell: Cell) -> float:
        """Of five products."""
        return cell.backward_flops

    def kernel_name(self, cell: Cell, inputs: Inputs, options: Options) -> str:
        """That of the kernel between the one before and the one behind."""
        del options
        return lookup(backward_request_of(cell, inputs).dispatch_key()).kernel_name


def _requested(cell: Cell, inputs: Inputs) -> GradientCall:
    request = Differentiable.of(cell, inputs).request()

    def call() -> tuple[torch.Tensor, ...]:
        made = run(request)
        return made.dq, made.dk, made.dv

    return call


def run_backward(options: Options, progress: Callable[[Row], None] | None = None) -> Report:
    """Run the chosen cells on the current CUDA device, as :func:`~.measure.run_cells` says."""
    return run_cells(Backward(), options, progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Peak bytes of forward and backward beyond inputs and dO, by peer; a text for who refuses."""

    cell: str
    peak_bytes: dict[str, int | str]


def step_memory(report: Report) -> list[MemoryRow]:
    """Memory of a training step, ours and torch's, in those of a few cells that were measured."""
    measured = {row.cell for row in report.rows}
    return [_memory(cell) for cell in backward_cells() if str(cell) in MEMORY_CELLS & measured]


def _memory(cell: Cell) -> MemoryRow:
    device, _ = card()
    one = make_inputs(cell, device, l2_bytes=0, dout=True)[0]
    peaks: dict[str, int | str] = {}
    for peer in (Ours(), TorchFa2(), CudnnPeer()):
        try:
            with peer.context():
                peaks[peer.name] = peak_bytes(training_step(peer, cell, one))
        except (Refused, RuntimeError) as reason:
            peaks[peer.name] = first_line(reason)
    return MemoryRow(cell=str(cell), peak_bytes=peaks)
