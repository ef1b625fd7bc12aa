"""The forward benchmark: who takes part, what the calls are and how answers are checked.

How it runs: :mod:`.measure`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..dispatch import lookup
from ..kernels.spec import Family
from .cells import Cell, select
from .families import OfFamily, OursSingleLevel, request_of
from .inputs import ERROR_LIMIT, Inputs, check_rows
from .measure import OURS, Direction, Options, Report, Row, run_cells
from .other_peers import importable_peers, named_peers
from .peers import Call, CudnnPeer, Ours, Peer, TorchFa2

if TYPE_CHECKING:
    import torch

__all__ = ["Forward", "chosen_peers", "run_forward"]

EVERY_PEER = "all"


class Forward(Direction):
    """O of each cell, by calls that allocate it."""

    NAME = "forward"
    ERROR_LIMIT = ERROR_LIMIT

    def cells(self, patterns: str | None) -> list[Cell]:
        """Those of the forward benchmark."""
        return select(patterns)

    def peers(self, options: Options) -> list[Peer]:
        """:func:`chosen_peers`."""
        return chosen_peers(options)

    def prepare(self, peer: Peer, cell: Cell, inputs: Inputs) -> Call:
        """The peer's own call."""
        return peer.prepare(cell, inputs)

    def error(self, cell: Cell, inputs: Inputs, answer: torch.Tensor) -> float:
        """Of sampled rows."""
        return check_rows(cell, inputs, answer)

    def flops(self, cell: Cell) -> float:
        """Of two products."""
        return cell.flops

    def kernel_name(self, cell: Cell, inputs: Inputs, options: Options) -> str:
        """That of the first family that is asked for, else of users' calls."""
        family = _family(options.families[0]) if options.families else None
        return lookup(request_of(cell, inputs, family).dispatch_key()).kernel_name


def run_forward(options: Options, progress: Callable[[Row], None] | None = None) -> Report:
    """Run the chosen cells on the current CUDA device, as :func:`~.measure.run_cells` says."""
    return run_cells(Forward(), options, progress)


def chosen_peers(options: Options) -> list[Peer]:
    """Ours first, then those asked for; with none named, those that are installed; FlexAttention compiles for seconds a cell.

    Raises:
        ValueError: a name that is no peer or no family.
    """
    families = [_family(name) for name in options.families]
    ours: list[Peer] = [OfFamily(family, f"{OURS}_{family.value}" if n else OURS) for n, family in enumerate(families)] or [Ours()]
    there: list[Peer] = [*ours, TorchFa2(), CudnnPeer()]
    there += importable_peers() if options.peers is None else [*named_peers(), OursSingleLevel()]
    if options.peers is None or EVERY_PEER in options.peers:
        return there
    known = [peer.name for peer in there]
    unknown = sorted(set(options.peers) - set(known))
    if unknown:
        raise ValueError(f"no peer named {', '.join(unknown)}; there are {', '.join(known)}, and {EVERY_PEER}")
    return [peer for peer in there if peer.name in options.peers]


def _family(name: str) -> Family:
    known = [family.value for family in Family]
    if name not in known:
        raise ValueError(f"no family named {name}; there are {', '.join(known)}")
    return Family(name)
