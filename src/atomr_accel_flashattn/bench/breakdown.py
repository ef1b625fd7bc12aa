"""Where the microseconds of a steady-state call go: its steps timed alone, and what is left of the whole."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

__all__ = ["call_breakdown"]

WARM_UP = 200


def call_breakdown(calls: int, repeats: int) -> dict[str, float]:
    """Microseconds by step of one small dense forward on torch tensors, bf16 (1, 64, 1, 64); the medians of ``repeats``.

    ``launch`` is one call of the prepared plan, with cuLaunchKernelEx inside it; ``rest`` is the Python between the steps. The key is
    built here as plans.py builds it, so that this step can be timed alone.
    """
    import torch

    from ..execute import execute
    from ..fa2 import Fa2FwdRequest
    from ..functional import flash_attn_func

    q, k, v = (torch.randn(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    device: int = q.device.index
    request = Fa2FwdRequest(q, k, v)
    _, made = execute(request, lse=False)
    if made is None:
        raise RuntimeError("the call made no launch")
    plan = made.kernel.plan(made.params, made.grid)
    raw_stream = torch._C._cuda_getCurrentRawStream  # noqa: SLF001 - what the package reads; the public way costs 8 us
    stream: int = raw_stream(device)
    out = torch.empty_like(q)
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0, 0, 0, 0, 0, 0)

    def build_key() -> tuple[object, ...]:
        bits = q.data_ptr() | k.data_ptr() | v.data_ptr()
        return (
            *(q.shape, q.stride(), q.dtype, q.get_device()),
            *(k.shape, k.stride(), k.dtype, k.get_device()),
            *(v.shape, v.stride(), v.dtype, v.get_device()),
            bits & 15,
            (0.0, None, False, (-1, -1), 0.0, 0, False),
        )

    key = build_key()
    plans = {key: plan}
    steps: dict[str, Callable[[], object]] = {
        "whole call": lambda: flash_attn_func(q, k, v),
        "build the key (addresses, shapes, ...)": build_key,
        "hash the key, find the plan": lambda: plans.get(key),
        "allocate the output": lambda: torch.empty_like(q),
        "read the current stream": lambda: raw_stream(device),
        "launch": lambda: plan.launch(stream, pointers),
    }
    found = {name: _cost_us(step, calls, repeats) for name, step in steps.items()}
    found["rest"] = found["whole call"] - sum(cost for name, cost in found.items() if name != "whole call")
    found["new request object"] = _cost_us(lambda: Fa2FwdRequest(q, k, v), calls, repeats)
    found["run(request), no plan kept"] = _cost_us(lambda: execute(request, lse=False), calls, repeats)
    return found


def _cost_us(step: Callable[[], object], calls: int, repeats: int) -> float:
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
