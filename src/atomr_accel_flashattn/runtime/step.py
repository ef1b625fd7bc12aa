"""What a StepPlan has on a GPU: the memory that its calls share, and the launch that writes the schedule into it."""

from __future__ import annotations

from ..arrays.new import empty_workspace
from ..arrays.streams import current_stream
from ..dispatch import best_arch, lookup
from ..dispatch.choice import key_of_step, step_blocks
from ..errors import ShapeError
from ..kernels.kvcache import row_blocks
from ..kernels.step import SCHEDULE_HEAD, ScheduledKvCacheSpec, StepParams, StepScheduleSpec, schedule_bytes
from ..launch.counters import clear
from ..launch.launcher import Launch, load_kernel
from ..limits import MAX_GRID
from ..problem import ArrayInfo, StepBuffers, StepShape
from .plan import Workspace

__all__ = ["prepare_step", "schedule_addresses"]


def prepare_step(shape: StepShape, like: ArrayInfo) -> tuple[StepBuffers, Launch]:
    """Memory in the library of ``like``, and the launch of one block that cuts the keys of a step.

    Raises:
        ShapeError: more work than a grid has blocks.
        RuntimeFlashAttnError: the kernel does not compile or load.
    """
    index = shape.device.index
    spec = lookup(key_of_step(shape, best_arch(shape.device)))
    assert isinstance(spec, ScheduledKvCacheSpec)  # noqa: S101 - on a GPU, what the key asks for
    blocks = step_blocks(shape.device, spec)
    rows = row_blocks(shape.seqlen_q * (shape.heads // shape.heads_kv), spec.tile)
    if shape.batch * rows * shape.heads_kv > MAX_GRID:
        raise ShapeError(
            f"batch: got {shape.batch} sequences of {shape.seqlen_q} queries and {shape.heads_kv} KV heads, "
            f"which makes {shape.batch * rows * shape.heads_kv} units of work; allowed are {MAX_GRID}"
        )
    memory = Workspace.of({**spec.workspace(blocks), "schedule": schedule_bytes(shape.batch, rows, blocks)})
    array = empty_workspace(like, memory.size, other_stream=False)
    at = {slot: array.ptr + offset for slot, offset in memory.offsets.items()}
    clear(index, at["schedule"], SCHEDULE_HEAD, current_stream(array))  # a schedule may be captured only, and never replayed
    cut = StepScheduleSpec.before(spec)
    launch = load_kernel(cut, index).launch_of(cut.pack_shape(shape, spec, blocks), 1, StepParams.SLOTS)
    return StepBuffers(array, at["schedule"], at["partial_o"], at["partial_sum"]), launch


def schedule_addresses(buffers: StepBuffers, arrays: dict[str, ArrayInfo | None]) -> tuple[int, ...]:
    """The addresses of that launch; ``arrays``: lengths and what else it reads, by slot."""
    at = {slot: array.ptr for slot, array in arrays.items() if array is not None} | {"schedule": buffers.schedule}
    return tuple(at.get(slot, 0) for slot in StepParams.SLOTS)
