"""Where the microseconds of a steady-state call go, by kernel family: its steps timed alone, and what is left of the whole."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arrays.torch_hooks import guard_of, hooks
from ..dispatch import FaFwdDispatch, lookup
from ..fa2 import Fa2FwdRequest
from ..fa3 import Fa3FwdRequest
from ..kernels.spec import Family, KernelSpec
from ..launch.driver import launch_function
from ..launch.launcher import Launch
from ..launch.tensor_map import TENSOR_MAP_ALIGNMENT, TENSOR_MAP_BYTES, encode, move
from ..runtime.execute import execute, make_outputs, run
from ..runtime.plan import Outputs, Plan, addresses_of
from ..torch_ops import repeat as plans
from .families import request_of
from .peers import Call, Ours, Refused

if TYPE_CHECKING:
    from .cells import Cell
    from .inputs import Inputs

__all__ = ["Steady", "call_breakdown", "cost_us", "launch_costs", "steady"]

WARM_UP = 200
_OTHERS = (None, None, None)  # no slopes, no learned sink, no out

Step = Callable[[], object]


@dataclass(frozen=True, slots=True, eq=False)
class Steady:
    """``call`` is a functional call on ``inputs`` that goes by ``plan``, of the family that was asked for."""

    inputs: Inputs
    request: FaFwdDispatch
    call: Call
    plan: Plan
    outputs: Outputs

    @property
    def addresses(self) -> tuple[int, ...]:
        """What the call brings, into ``outputs``."""
        return addresses_of(self.request.problem, self.outputs, self.plan.workspace)

    @property
    def launch(self) -> Launch:
        """The one launch of the plan."""
        (launch,) = self.plan.launches
        assert isinstance(launch, Launch)  # noqa: S101 - a forward has one kernel
        return launch


def steady(cell: Cell, inputs: Inputs, family: Family) -> Steady:
    """A functional call without bias and window that takes ``family``, whatever is the best one here, until plans are cleared.

    Raises:
        Refused: this GPU has no such family, or there is nothing to launch.
    """
    request = request_of(cell, inputs, family)
    spec = lookup(request.dispatch_key())
    if not isinstance(spec, KernelSpec) or spec.family is not family:
        raise Refused(f"{family.value} resolves to {spec.kernel_name} here")
    packing = None if inputs.offsets is None else (inputs.offsets, inputs.offsets, inputs.max_length, inputs.max_length)
    plans.clear()
    key, _ = plans.repeat(inputs.q, inputs.k, inputs.v, packing, (0.0, None, cell.causal, (-1, -1), 0.0, 0, False), _OTHERS)
    output, plan = execute(request, lse=False)
    if key is None or plan is None or not plan.launches:
        raise Refused("a call that leaves no plan")
    plans.remember(key, plan, output)
    return Steady(inputs, request, Ours().prepare(cell, inputs), plan, make_outputs(request, lse=False))


def call_breakdown(held: Steady, calls: int, repeats: int) -> dict[str, float]:
    """Microseconds by step of one steady-state call; the medians of ``repeats``.

    ``launch`` is one call of the prepared plan, of which ``cuLaunchKernelEx`` is the driver's part, with the arguments as they are;
    ``rest`` is the Python between the steps.
    """
    inputs = held.inputs
    q, k, v = inputs.q, inputs.k, inputs.v
    tensors = (q, k, v) if inputs.offsets is None else (q, k, v, inputs.offsets)
    device = q.get_device()
    plan = held.plan
    stream, addresses = hooks.raw_stream(device), held.addresses
    parts: dict[str, Step] = {
        "recognise the call": _recognise(tensors),
        "read the addresses": lambda: [tensor.data_ptr() for tensor in tensors],
        "allocate the output": _allocate(q),
        "read the current device and stream": lambda: (hooks.current_device(), hooks.raw_stream(device)),
        "launch": lambda: plan.launch(stream, addresses),
    }
    found = {"whole call": cost_us(held.call, calls, repeats)}
    found |= {name: cost_us(step, calls, repeats) for name, step in parts.items()}
    found["rest"] = found["whole call"] - sum(found[name] for name in parts)
    found["of the launch: cuLaunchKernelEx"] = cost_us(_bare_launch(held, stream), calls, repeats)
    return found


def launch_costs(few: Steady, many: Steady, calls: int, repeats: int) -> dict[str, float]:
    """Microseconds of launches into an output that is there, in the FA3 family of what tensor maps add to them, and of requests.

    Both are dense. ``many`` has more tiles than the GPU has SMs: the FA3 family counts them, and asks for the counters of a
    side stream.
    """
    import torch

    side = torch.cuda.Stream()
    found = {}
    for tiles, held in (("few", few), ("many", many)):
        for name, stream in (("", 0), (", side stream", side.cuda_stream)):
            found[f"further launch, {tiles} tiles{name}"] = cost_us(_launch_of(held, stream), calls, repeats)
    family = few.launch.kernel.spec.family
    if family is Family.FA3:
        found |= _map_costs(few, calls, repeats)
    kind, inputs = Fa3FwdRequest if family is Family.FA3 else Fa2FwdRequest, few.inputs
    request = kind(inputs.q, inputs.k, inputs.v)
    found["request object"] = cost_us(lambda: kind(inputs.q, inputs.k, inputs.v), calls, repeats)
    found["run(request)"] = cost_us(lambda: run(request, lse=False), calls, repeats)
    found["run(request), the first of its kind"] = cost_us(lambda: _anew(request), calls, repeats)
    return found


def _anew(request: FaFwdDispatch) -> None:
    plans.clear()
    run(request, lse=False)


def _launch_of(held: Steady, stream: int) -> Step:
    plan, addresses = held.plan, held.addresses
    return lambda: plan.launch(stream, addresses)


def _map_costs(held: Steady, calls: int, repeats: int) -> dict[str, float]:
    """A map that is made, and one that follows an array to another address."""
    first, *_ = held.launch.params.tensor_maps
    index = held.launch.kernel.device_index
    room = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    place = -(-ctypes.addressof(room) // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
    ctypes.memmove(place, encode(first, index), TENSOR_MAP_BYTES)
    return {
        "new tensor map": cost_us(lambda: encode(first, index), calls, repeats),
        "tensor map of another address": cost_us(lambda: move(place, first.ptr, index), calls, repeats),
    }


def _allocate(q: Any) -> Step:
    shape, strides, dtype, make = tuple(q.shape), q.stride(), q.dtype, hooks.empty_on_current
    return (lambda: q.new_empty_strided(shape, strides)) if make is None else (lambda: make(shape, strides, dtype))


def _bare_launch(held: Steady, stream: int) -> Step:
    """The driver's part of a launch: cuLaunchKernelEx into an output that is there, with arguments that exist already."""
    held.launch.launch(stream, held.addresses)
    arguments, function = held.launch.arguments(), launch_function()
    return lambda: function(*arguments)


def _recognise(tensors: tuple[Any, ...]) -> Step:
    """What torch_ops/repeat.py does before it knows the plan: a guard in a dict, or a key where this torch has no guards."""
    numbers = (0.0, None, False, (-1, -1), 0.0, 0, False)
    if hooks.guard is None:
        keys = {numbers: 0}
        return lambda: (keys.get(numbers), *((tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()) for tensor in tensors))
    guards = {numbers: guard_of(hooks.guard, tensors)}
    return lambda: guards[numbers](*tensors)


def cost_us(step: Step, calls: int, repeats: int) -> float:
    """Median CPU microseconds of one step, an empty loop subtracted; the device is waited for before each repeat."""
    import torch

    for _ in range(WARM_UP):
        step()
    costs = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            step()
        middle = time.perf_counter()
        for _ in range(calls):
            pass
        costs.append((2 * middle - began - time.perf_counter()) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(costs)
