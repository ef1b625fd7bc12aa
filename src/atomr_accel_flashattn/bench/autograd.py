"""Gradients by torch's autograd, and what they take.

The backward of a recorded forward alone, and a training step of both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from .peers import Peer, Refused

if TYPE_CHECKING:
    import torch

    from .cells import Cell
    from .inputs import Inputs

__all__ = ["GradientCall", "backward_of", "deterministic_algorithms", "peak_bytes", "training_step"]

GradientCall: TypeAlias = Callable[[], tuple["torch.Tensor", ...]]


def training_step(peer: Peer, cell: Cell, inputs: Inputs) -> GradientCall:
    """A call that runs forward and backward of a peer and gives the gradients of q, k and v.

    Raises:
        Refused: the peer does not do the cell, or has no backward.
    """
    import torch

    leaves = _leaves(inputs)
    wanted = (leaves.q, leaves.k, leaves.v)
    with torch.enable_grad():
        forward = peer.prepare(cell, leaves)

    def step() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            out = forward()
        if not out.requires_grad:
            raise Refused("it has no backward")
        gradients: tuple[torch.Tensor, ...] = torch.autograd.grad(out, wanted, inputs.dout)
        return gradients

    return step


def backward_of(peer: Peer, cell: Cell, inputs: Inputs) -> GradientCall:
    """A call that runs the backward of one recorded forward of a peer; gradients of q, k and v.

    Raises:
        Refused: the peer does not do the cell, or has no backward.
    """
    import torch

    leaves = _leaves(inputs)
    wanted = (leaves.q, leaves.k, leaves.v)
    with torch.enable_grad():
        out = peer.prepare(cell, leaves)()
    if not out.requires_grad:
        raise Refused("it has no backward")
    return lambda: torch.autograd.grad(out, wanted, inputs.dout, retain_graph=True)


def _leaves(inputs: Inputs) -> Inputs:
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    return replace(inputs, q=q, k=k, v=v)


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes that a call takes at its peak beyond what was there; it runs once before."""
    import torch

    call()
    torch.cuda.synchronize()
    before: int = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak: int = torch.cuda.max_memory_allocated()
    return peak - before


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Ask torch for gradients of equal bits; new memory is not filled, which would be timed."""
    import torch
    from torch.utils import deterministic

    fills, were, warned = (
        deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(were, warn_only=warned)
        deterministic.fill_uninitialized_memory = fills
