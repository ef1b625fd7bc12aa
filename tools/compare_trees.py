"""Time two source trees of this package in turns on the card at hand: kernels, calls, and messages of the actor.

``python tools/compare_trees.py before/src src --cells 'grid_*,gqa*' --rounds 5 --out results``. Each tree runs in a process of its own that
stays; the two take turns within each round, in shuffled order, so that both meet the card and the cores in the same state. Written for the
question whether a change made anything slower: the ratios are of medians over the rounds, and under 3 % is a tie.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = 300  # of the host measurements, a repeat
REPEATS = 7
IN_FLIGHT = 8


def serve() -> None:
    """A tree's process: for each line of standard input one measurement, answered as a line of JSON."""
    import torch

    for line in sys.stdin:
        kind, name = json.loads(line)
        with torch.no_grad():
            answer = MEASURES[kind](name)
        print(json.dumps(answer), flush=True)


def kernel_ms(name: str) -> float:
    """Milliseconds of a benchmark cell by functional calls, inputs rotated beyond the L2 cache."""
    import contextlib

    import torch

    from atomr_accel_flashattn.bench.cells import select
    from atomr_accel_flashattn.bench.inputs import make_inputs
    from atomr_accel_flashattn.bench.peers import Ours
    from atomr_accel_flashattn.bench.timing import Contestant, measure_in_turns

    (cell,) = select(name)
    device = torch.device("cuda", 0)
    sets = make_inputs(cell, device, l2_bytes=torch.cuda.get_device_properties(device).L2_cache_size, seed=0)
    calls = [Ours().prepare(cell, inputs) for inputs in sets]
    return measure_in_turns({name: Contestant(calls, contextlib.nullcontext)}, rounds=1, seed=0)[name].ms


def call_us(name: str) -> float:
    """Microseconds of CPU to enqueue one small functional call, dense or packed: the median of some repeats."""
    import torch

    import atomr_accel_flashattn as fa

    heads, tokens = 4, 128
    q, k, v = (torch.randn(2, tokens, heads, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    offsets = torch.tensor([0, tokens, 2 * tokens], device="cuda", dtype=torch.int32)
    packed_q, packed_k, packed_v = (x.flatten(0, 1) for x in (q, k, v))

    def dense() -> Any:
        return fa.flash_attn_func(q, k, v, causal=True)

    def varlen() -> Any:
        return fa.flash_attn_varlen_func(packed_q, packed_k, packed_v, offsets, offsets, tokens, tokens, causal=True)

    return _median_us({"dense": dense, "packed": varlen}[name])


def actor_us(name: str) -> float:
    """Microseconds of a message: its round trip over a direct synchronised run, or one of a pipeline."""
    import torch

    import atomr_accel_flashattn as fa

    q, k, v = (torch.randn(1, n, 8, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 64, 64))
    request = fa.DenseFwdRequest(q, k, v)
    message = fa.FlashAttnMsg.Forward(request)

    def direct() -> None:
        fa.run(request)
        torch.cuda.synchronize()

    with fa.FlashAttnActor.start(fa.FlashAttnProps(device="cuda", max_in_flight=IN_FLIGHT)) as actor:
        if name == "round trip":
            return _median_us(lambda: actor.ask(message).result()) - _median_us(direct)
        costs = []
        for _ in range(REPEATS):
            waiting: list[Any] = []
            began = time.perf_counter()
            for _ in range(CALLS):
                if len(waiting) == IN_FLIGHT:
                    waiting.pop(0).result()
                waiting.append(actor.ask(message))
            for each in waiting:
                each.result()
            costs.append((time.perf_counter() - began) / CALLS * 1e6)
        return statistics.median(costs[1:])


MEASURES: dict[str, Callable[[str], float]] = {"kernel": kernel_ms, "call": call_us, "actor": actor_us}


def _median_us(call: Callable[[], object]) -> float:
    import torch

    costs = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        costs.append((time.perf_counter() - began) / CALLS * 1e6)
        torch.cuda.synchronize()
    return statistics.median(costs[1:])


class Tree:
    """One source tree and its process."""

    def __init__(self, source: Path) -> None:
        # A cache of its own: another tree's entries are of no use to it.
        cache = Path(os.environ.get("ATOMR_FLASHATTN_CACHE_DIR", "/tmp/atomr-flashattn-trees")) / source.resolve().parent.name  # noqa: S108
        path = os.pathsep.join([str(source.resolve()), os.environ.get("PYTHONPATH", "")])
        environ = {**os.environ, "PYTHONPATH": path, "ATOMR_FLASHATTN_CACHE_DIR": str(cache)}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)

    def measure(self, kind: str, name: str) -> float:
        """One measurement.

        Raises:
            RuntimeError: the process ended.
        """
        to, of = self.process.stdin, self.process.stdout
        if to is None or of is None:
            raise RuntimeError("the process of a tree has no pipes")
        to.write(json.dumps([kind, name]) + "\n")
        to.flush()
        answer = of.readline()
        if not answer:
            raise RuntimeError(f"the process of a tree ended while it measured {kind} {name}")
        return float(json.loads(answer))


def main() -> None:
    """Measure, print a line each, write a record."""
    from atomr_accel_flashattn.bench.cells import select
    from atomr_accel_flashattn.bench.record import make_record, write_record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--cells", default="grid_*", help="comma-separated patterns of benchmark cells, empty for none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which nothing further is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"))
    asked = parser.parse_args()
    tasks = [("call", "dense"), ("call", "packed"), ("actor", "round trip"), ("actor", "pipeline")]
    tasks += [("kernel", str(cell)) for cell in (select(asked.cells) if asked.cells else [])]
    trees = {"before": Tree(asked.before), "after": Tree(asked.after)}
    order, began, rows = random.Random(asked.seed), time.perf_counter(), []  # noqa: S311 - an order, not a secret
    load = os.getloadavg()
    for kind, name in tasks:
        if time.perf_counter() - began > asked.budget:
            print(f"out of time before {kind} {name}")
            break
        found: dict[str, list[float]] = {which: [] for which in trees}
        for tree in trees.values():
            tree.measure(kind, name)  # compiles, loads, warms up
        for _ in range(asked.rounds):
            for which in order.sample(sorted(trees), len(trees)):
                found[which].append(trees[which].measure(kind, name))
        before, after = (statistics.median(found[which]) for which in ("before", "after"))
        rows.append({"kind": kind, "name": name, **found, "ratio": after / before})
        print(f"{kind:7} {name:40} before {before:9.4f}  after {after:9.4f}  after / before {after / before:.3f}", flush=True)
    body = {
        "options": {"rounds": asked.rounds, "cells": asked.cells},
        "load_average": {"before": load, "after": os.getloadavg()},
        "rows": rows,
    }
    print(write_record(make_record("trees", body), asked.out).name)
    for tree in trees.values():
        tree.process.kill()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
