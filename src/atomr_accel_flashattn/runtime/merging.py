"""merge_states on a GPU: one launch for two states of attention, on the current stream of their library."""

from __future__ import annotations

from typing import Any

from ..arrays.streams import current_stream
from ..dispatch import best_arch, key_of_merge, lookup
from ..env import settings
from ..kernels.merge_states import MergeStatesParams, MergeStatesSpec, States
from ..launch.launcher import Launch, load_kernel
from .plan import MAX_PLANS

__all__ = ["merge_on_gpu"]

_launches: dict[tuple[Any, ...], Launch] = {}


def merge_on_gpu(states: States) -> None:
    """Write the merged state. Arrays have been checked; nothing waits, so it can be captured in a CUDA graph after first use.

    Raises:
        RuntimeFlashAttnError: no driver, no compiler, a kernel that does not compile or launch.
    """
    key = key_of_merge(states, best_arch(states.out.device))
    facts = (key, states.out.device, *((each.shape, each.strides) for each in states))
    launch = None if settings().debug else _launches.get(facts)
    if launch is None:
        spec = lookup(key)
        assert isinstance(spec, MergeStatesSpec)  # noqa: S101 - as the key asks
        blocks = spec.work_tiles(states)
        if not blocks:
            return
        if len(_launches) >= MAX_PLANS:
            _launches.clear()
        kernel = load_kernel(spec, states.out.device.index)
        launch = _launches[facts] = kernel.launch_of(spec.pack(states, states.out), blocks, MergeStatesParams.SLOTS)
    o1, lse1, o2, lse2, out, lse = (each.ptr for each in states)
    launch.launch(current_stream(states.o1), (o1, o2, lse1, lse2, out, lse))
