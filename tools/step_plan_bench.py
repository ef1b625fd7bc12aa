"""Decode steps with and without a StepPlan, in CUDA graphs: us a call, one JSON object a cell.

``PYTHONPATH=src:. python tools/step_plan_bench.py``. A cell is a batch of lengths; its layers share one schedule. Rounds
alternate the ways, so that both meet the same clocks, and the median counts.
"""

from __future__ import annotations

import json
import os
import statistics
from typing import Any

import torch

import atomr_accel_flashattn as fa

PAGE, LAYERS, ROUNDS, WIDTH = 64, 8, 15, 128
CELLS: dict[str, list[int]] = {
    "1 x 4k": [4096],
    "1 x 32k": [32768],
    "1 x 144k": [147456],
    "1 x 4k, 1023 empty": [4096] + [0] * 1023,
    "1 x 32k, 1023 empty": [32768] + [0] * 1023,
    "1 x 144k, 1023 empty": [147456] + [0] * 1023,
    "8 x 4k": [4096] * 8,
    "64 x 4k": [4096] * 64,
    "1 x 32k, 255 x 100": [32768] + [100] * 255,
    "64 x 100 to 8k": [100 + 127 * index for index in range(64)],
    "1024 x 200": [200] * 1024,
}


def step_of(lengths: list[int], heads: int, heads_kv: int, *, planned: bool) -> torch.cuda.CUDAGraph:
    """A graph of LAYERS calls, the schedule before them."""
    device = "cuda:0"
    entries = -(-max(lengths) // PAGE)
    pages = sum(-(-each // PAGE) for each in lengths) + 1
    table = torch.zeros(len(lengths), entries, dtype=torch.int32)
    first = 1
    for row, each in enumerate(lengths):
        count = -(-each // PAGE)
        table[row, :count] = torch.arange(first, first + count)
        first += count
    normal = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    k, v, q = normal(pages, PAGE, heads_kv, WIDTH), normal(pages, PAGE, heads_kv, WIDTH), normal(len(lengths), 1, heads, WIDTH)  # type: ignore[no-untyped-call]
    asked: dict[str, Any] = {"block_table": table.to(device), "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device)}
    out = torch.empty_like(q)
    plan = fa.StepPlan.of(fa.PagedAttentionRequest(q, k, v, **asked)) if planned else None
    request = fa.PagedAttentionRequest(q, k, v, **asked, plan=plan, out=out)

    def step() -> None:
        if plan is not None:
            plan.schedule(asked["seq_lens"])
        for _ in range(LAYERS):
            fa.run(request, lse=False)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    _kept.append((request, plan))
    return graph


_kept: list[Any] = []


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one call, the schedule's share in it; caches hold what the call before left there."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / LAYERS


def main() -> None:
    """Every cell at 32 / 8 heads."""
    for name, lengths in CELLS.items():
        graphs = {way: step_of(lengths, 32, 8, planned=way == "planned") for way in ("planned", "plain")}
        times: dict[str, list[float]] = {way: [] for way in graphs}
        for _ in range(ROUNDS):
            for way, graph in graphs.items():
                times[way].append(microseconds(graph))
        medians = {way: round(statistics.median(each[3:]), 2) for way, each in times.items()}
        print(json.dumps({"cell": name, **medians, "load": os.getloadavg()[0]}), flush=True)
        del graphs
        _kept.clear()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
