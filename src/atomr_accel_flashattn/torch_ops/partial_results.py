"""What a shortcut launches whose plan splits the keys: such a plan has a workspace, which each call makes anew."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..arrays.torch_hooks import NewTensor, empty_at
from ..runtime.plan import Plan, partial_addresses

__all__ = ["with_partial_results"]


def with_partial_results(plan: Plan, device_index: int) -> Callable[[int, tuple[int, ...]], None]:
    """Launches a plan that splits the keys, with memory for the parts on the current stream of torch."""
    workspace, float32 = plan.workspace, sys.modules["torch"].float32
    assert workspace is not None  # noqa: S101 - the caller has looked
    array: NewTensor = (workspace.size // 4,), (1,), float32

    def launch(stream: int, addresses: tuple[int, ...]) -> None:
        room = empty_at(device_index, array)
        plan.launch(stream, (*addresses, *partial_addresses(workspace, room.data_ptr())))

    return launch
