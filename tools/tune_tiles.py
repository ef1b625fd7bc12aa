"""Time tiles of the mma.sync family against each other and against torch's FlashAttention-2, in shuffled turns, on the card at hand.

``PYTHONPATH=src python tools/tune_tiles.py --cells 'grid_d128*causal_[28]k' --tiles m128n64w4s1b2,m128n64w8s2b1 --out tune.json``. Without
``--tiles`` it tries every tile that fits. All candidates are compiled first, in parallel; one that spills much, does not compile or is
wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atomr_accel_flashattn.arrays import read_array
from atomr_accel_flashattn.bench.cells import Cell, select
from atomr_accel_flashattn.bench.inputs import ERROR_LIMIT, Inputs, check_rows, make_inputs
from atomr_accel_flashattn.bench.peers import TorchFa2
from atomr_accel_flashattn.bench.record import make_record
from atomr_accel_flashattn.bench.timing import Contestant, measure_in_turns
from atomr_accel_flashattn.dispatch import lookup
from atomr_accel_flashattn.errors import FlashAttnError
from atomr_accel_flashattn.fa2 import Fa2FwdRequest, MaskKind, PositionBias
from atomr_accel_flashattn.jit.compile import CompiledKernel, compile_many
from atomr_accel_flashattn.jit.launch import load_kernel
from atomr_accel_flashattn.jit.params import forward_grid, forward_pointers, pack_forward
from atomr_accel_flashattn.jit.spec import KernelSpec, Tile
from atomr_accel_flashattn.varlen import CumulativeSeqlens, VarlenFwdRequest

TILE = re.compile(r"m(\d+)n(\d+)w(\d+)s(\d+)(q?)(o?)b(\d+)")
_OVERLAP_STAGES = 2
REGISTERS = 224  # of accumulators and scores a thread may hold before nothing else fits


def parse_tile(text: str) -> Tile:
    """``m128n64w4s1b2`` as kernel names write it."""
    found = TILE.fullmatch(text)
    if found is None:
        raise SystemExit(f"no tile {text!r}: write m<rows>n<keys>w<warps>s<stages>[q][o]b<blocks>, as m128n64w4s1b2")
    m, n, w, s, q, o, b = found.groups()
    return Tile(block_m=int(m), block_n=int(n), warps=int(w), stages=int(s), q_in_registers=bool(q), overlap=bool(o), min_blocks=int(b))


def tiles_that_fit(spec: KernelSpec) -> Iterator[Tile]:
    """Every tile whose shared memory and registers fit as many blocks as it asks for."""
    axes = itertools.product((64, 128, 192, 256), (16, 32, 48, 64, 80, 96, 128), (4, 8), (1, 2, 3), (False, True), (False, True), (1, 2, 3))
    for m, n, w, s, q, o, b in axes:
        tile = Tile(block_m=m, block_n=n, warps=w, stages=s, q_in_registers=q, overlap=o, min_blocks=b)
        held = m * (spec.v_head_dim + (2 * n if o else n)) // tile.threads + (m * spec.head_dim // 2 // tile.threads if q else 0)
        fits = replace(spec, tile=tile).shared_memory * b <= spec.arch.shared_memory_per_sm - 1024 * b
        if m % (16 * w) == 0 and (s == _OVERLAP_STAGES or not o) and fits and held <= min(REGISTERS, 65536 // (tile.threads * b)):
            yield tile


def request_of(cell: Cell, inputs: Inputs, out: torch.Tensor) -> Fa2FwdRequest | VarlenFwdRequest:
    """The request of a cell."""
    mask = MaskKind.sliding_causal(cell.window) if cell.window else MaskKind.causal() if cell.causal else MaskKind.full()
    bias = PositionBias(inputs.slopes)
    if inputs.offsets is not None:
        lengths = CumulativeSeqlens(inputs.offsets, inputs.max_length)
        return VarlenFwdRequest(inputs.q, inputs.k, inputs.v, cu_seqlens_q=lengths, mask=mask, bias=bias, out=out)
    return Fa2FwdRequest(inputs.q, inputs.k, inputs.v, mask=mask, bias=bias, out=out)


def launcher(cell: Cell, inputs: Inputs, spec: KernelSpec) -> tuple[Callable[[], None], torch.Tensor]:
    """A call that launches the kernel on these inputs, and the tensor it writes."""
    out = torch.full_like(inputs.q, float("nan"))
    problem = request_of(cell, inputs, out).problem
    kernel = load_kernel(spec, out.get_device())
    info = read_array(out, "out")
    plan = kernel.plan(pack_forward(problem, info, None, spec.tile), forward_grid(problem, spec.tile))
    pointers = forward_pointers(problem, info, None)
    stream = torch.cuda.current_stream().cuda_stream
    return (lambda: plan.launch(stream, pointers)), out


def contestant(cell: Cell, sets: list[Inputs], spec: KernelSpec, row: dict[str, Any]) -> Contestant | None:
    """The calls of one tile after a look at their answer; None when it may not be timed, with the reason in the row."""
    try:
        calls = [launcher(cell, inputs, spec) for inputs in sets]
        calls[0][0]()
        row["error"] = check_rows(cell, sets[0], calls[0][1], with_alibi=cell.alibi)
    except FlashAttnError as refusal:
        row["refused"] = str(refusal)[:300]
        return None
    if row["error"] > ERROR_LIMIT[cell.dtype]:
        row["refused"] = f"WRONG: relative error {row['error']:.3g}"
        return None
    return Contestant([call for call, _ in calls], torch.no_grad)


def tune(cell: Cell, tiles: list[Tile] | None, rounds: int, max_spill: int) -> list[dict[str, Any]]:
    """Rows of one cell, the fastest first."""
    device = torch.device("cuda", torch.cuda.current_device())
    sets = make_inputs(cell, device, l2_bytes=torch.cuda.get_device_properties(device).L2_cache_size)
    base = lookup(request_of(cell, sets[0], torch.empty_like(sets[0].q)).dispatch_key())
    if not isinstance(base, KernelSpec):
        raise SystemExit("no GPU kernel for this cell")
    candidates = list(dict.fromkeys([base.tile, *(tiles or tiles_that_fit(base))]))
    rows: dict[str, dict[str, Any]] = {"fa2": {"tile": "fa2"}}
    peer = TorchFa2()
    contestants = {"fa2": Contestant([peer.prepare(cell, inputs) for inputs in sets], peer.context)}
    for tile, made in zip(candidates, compile_many([replace(base, tile=tile) for tile in candidates]), strict=True):
        row = rows[str(tile)] = {"tile": str(tile), "in_use": tile == base.tile}
        if not isinstance(made, CompiledKernel):
            row["refused"] = str(made)[:300]
            continue
        row |= {"registers": made.registers, "spill_bytes": made.spill_bytes}
        if made.spill_bytes > max_spill and tile != base.tile:
            row["refused"] = f"spills {made.spill_bytes} bytes"
        elif found := contestant(cell, sets, made.spec, row):
            contestants[str(tile)] = found
    for name, timing in measure_in_turns(contestants, rounds=rounds, seed=0).items():
        rows[name] |= {"ms": timing.ms, "tflops": cell.flops / timing.ms * 1e-9, "spread": timing.spread}
    return sorted(rows.values(), key=lambda row: row.get("ms", float("inf")))


def show(rows: list[dict[str, Any]], top: int) -> None:
    """The fastest tiles, the one in use, FlashAttention-2, and what was wrong."""
    fa2 = next(row["ms"] for row in rows if row["tile"] == "fa2")
    for n, row in enumerate(rows):
        if "ms" in row and (n < top or row.get("in_use") or row["tile"] == "fa2"):
            figures = f"{row['ms']:.4f} ms {row['tflops']:6.1f} TFLOP/s  {fa2 / row['ms']:.3f} of fa2"
            compiled = f"{row['registers']} registers, {row['spill_bytes']} spilled" if "registers" in row else ""
            print(f"  {row['tile']:18} {figures}  {compiled}{'  <- in use' if row.get('in_use') else ''}")
        elif not row.get("refused", "").startswith("spills"):
            print(f"  {row['tile']:18} {row['refused']}")


def main() -> None:
    """Tune the chosen cells one after the other; the record is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", required=True, help="comma-separated patterns of cell names")
    parser.add_argument("--tiles", help="comma-separated, as m128n64w4s1b2; without, every tile that fits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-spill", type=int, default=64, help="bytes per thread above which a tile is not timed")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no further cell is begun")
    parser.add_argument("--top", type=int, default=10, help="rows printed per cell")
    parser.add_argument("--out", type=Path, default=Path("tune.json"))
    arguments = parser.parse_args()
    tiles = [parse_tile(text) for text in arguments.tiles.split(",")] if arguments.tiles else None
    began, found = time.perf_counter(), {}
    for cell in select(arguments.cells):
        if time.perf_counter() - began > arguments.budget:
            break
        with torch.no_grad():
            rows = found[str(cell)] = tune(cell, tiles, arguments.rounds, arguments.max_spill)
        print(f"{cell}: {len(rows)} tiles, {time.perf_counter() - began:.0f} s so far")
        show(rows, arguments.top)
        record = make_record("tune", {"cells": found}, commit=os.environ.get("ATOMR_FLASHATTN_COMMIT"))
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
