"""Time edited kernel headers, tiles and schedules against each other and against peers, in shuffled turns, on the card at hand.

``PYTHONPATH=src python tools/compare_variants.py variants.json --cells 'grid_d128*_2k' --peers cudnn,fa3 --out search.json``.
The file names the variants: ``{"as it is": {}, "turns": {"tile": {"ping_pong": true}}, "mine": {"headers": "folder"}}``. Each may
have ``headers`` (a copy of the folder cuda/), ``tile`` (fields of Tile that differ), ``family`` (fa3, or fa2),
``section_heads`` (of the scheduler), and ``head_dims`` (a list) and ``mask`` (full, causal, ...) to be left out elsewhere. All
kernels are compiled first, in parallel; one that does not compile or is wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from atomr_accel_flashattn.bench.cells import Cell, select
from atomr_accel_flashattn.bench.families import repeated, request_of
from atomr_accel_flashattn.bench.forward import chosen_peers
from atomr_accel_flashattn.bench.inputs import ERROR_LIMIT, Inputs, check_rows, make_inputs
from atomr_accel_flashattn.bench.measure import Options
from atomr_accel_flashattn.bench.peers import Refused
from atomr_accel_flashattn.bench.record import make_record
from atomr_accel_flashattn.bench.timing import Contestant, measure_in_turns
from atomr_accel_flashattn.dispatch import lookup
from atomr_accel_flashattn.errors import FlashAttnError
from atomr_accel_flashattn.jit import headers
from atomr_accel_flashattn.jit.compile import compile_many
from atomr_accel_flashattn.kernels.fa3_fwd import Fa3FwdParams
from atomr_accel_flashattn.kernels.forward import ForwardSpec
from atomr_accel_flashattn.kernels.spec import Family
from atomr_accel_flashattn.launch import launcher
from atomr_accel_flashattn.runtime.execute import execute
from atomr_accel_flashattn.runtime.plan import SLOTS, Plan


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the file."""

    headers: str | None = None
    tile: dict[str, Any] = field(default_factory=dict)
    family: str = "fa3"
    section_heads: int | None = None
    head_dims: tuple[int, ...] = ()
    mask: str | None = None

    def applies(self, cell: Cell) -> bool:
        """Whether it is wanted in this cell."""
        return cell.head_dim in (self.head_dims or (cell.head_dim,)) and cell.mask == (self.mask or cell.mask)

    def spec(self, cell: Cell, inputs: Inputs) -> ForwardSpec:
        """Its kernel."""
        spec = lookup(request_of(cell, inputs, Family(self.family)).dispatch_key())
        if not isinstance(spec, ForwardSpec):
            raise SystemExit("no GPU kernel for this cell")
        return replace(spec, tile=replace(spec.tile, **self.tile))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Kernels are compiled and loaded with its headers."""
        if self.headers is None:
            yield
            return
        folder = Path(self.headers).resolve()
        swapped: list[tuple[Any, str, Any]] = [
            (headers, "headers_dir", lambda: folder),
            (launcher, "_loaded", {}),
            (launcher, "_loading", {}),
        ]
        before = [getattr(place, name) for place, name, _ in swapped]
        for place, name, value in swapped:
            setattr(place, name, value)
        try:
            yield
        finally:
            for (place, name, _), value in zip(swapped, before, strict=True):
                setattr(place, name, value)

    def prepare(self, cell: Cell, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """A call with a new output every time."""
        request = request_of(cell, inputs, Family(self.family), tile=self.spec(cell, inputs).tile)
        plan = execute(request, lse=False)[1]
        if plan is None or not plan.launches:
            raise Refused("nothing to launch")
        (launch,) = plan.launches
        assert isinstance(launch, launcher.Launch)  # noqa: S101 - a forward has one kernel
        params: Any = launch.params
        forward = params.fwd if isinstance(params, Fa3FwdParams) else params
        forward.section_heads = self.section_heads or forward.section_heads
        again = launch.kernel.launch_of(params, launch.grid, SLOTS)
        return repeated(Plan((again,), plan.out_strides), request)


def compile_all(variants: dict[str, Variant], cells: list[Cell], device: torch.device) -> None:
    """Fill the kernel cache; says what does not compile, and what spills."""
    inputs = {cell: make_inputs(cell, device, l2_bytes=1)[0] for cell in cells}
    for name, variant in variants.items():
        with variant.in_use():
            specs = {variant.spec(cell, inputs[cell]) for cell in cells if variant.applies(cell)}
            for made in compile_many(specs):
                if isinstance(made, FlashAttnError):
                    print(f"{name}: {str(made)[:300]}")
                elif made.spill_bytes:
                    print(f"{name}: {made.spec.kernel_name} spills {made.spill_bytes} bytes")


def contestant(cell: Cell, sets: list[Inputs], variant: Variant) -> Contestant | str:
    """The calls of one variant after a look at their answer, or why there are none."""
    try:
        with variant.in_use():
            calls = [variant.prepare(cell, inputs) for inputs in sets]
        error = check_rows(cell, sets[0], calls[0]())
    except (FlashAttnError, Refused) as refusal:
        return str(refusal)[:200]
    return Contestant(calls, torch.no_grad) if error <= ERROR_LIMIT[cell.dtype] else f"WRONG: relative error {error:.3g}"


def compare(cell: Cell, variants: dict[str, Variant], peers: list[Any], rounds: int) -> dict[str, float | str]:
    """TFLOP/s by variant and peer, or why there are none, the fastest first."""
    device = torch.device("cuda", torch.cuda.current_device())
    sets = make_inputs(cell, device, l2_bytes=torch.cuda.get_device_properties(device).L2_cache_size)
    found: dict[str, Contestant | str] = {n: contestant(cell, sets, v) for n, v in variants.items() if v.applies(cell)}
    for peer in peers:
        try:
            found[peer.name] = Contestant([peer.prepare(cell, inputs) for inputs in sets], peer.context)
        except Refused as refusal:
            found[peer.name] = str(refusal)
    fit = {name: each for name, each in found.items() if isinstance(each, Contestant)}
    rates = {name: cell.flops / timing.ms * 1e-9 for name, timing in measure_in_turns(fit, rounds=rounds, seed=1).items()}
    return dict(sorted(rates.items(), key=lambda pair: -pair[1])) | {n: each for n, each in found.items() if isinstance(each, str)}


def main() -> None:
    """Compare in the chosen cells, one after the other; the record is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--cells", required=True, help="comma-separated patterns of cell names")
    parser.add_argument("--peers", default="cudnn", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no further cell is begun")
    parser.add_argument("--out", type=Path, default=Path("search.json"))
    arguments = parser.parse_args()
    described = json.loads(arguments.variants.read_text())
    variants = {name: Variant(**{**row, "head_dims": tuple(row.get("head_dims", ()))}) for name, row in described.items()}
    cells = select(arguments.cells)
    peers = [peer for peer in chosen_peers(Options(peers=("ours", *arguments.peers.split(",")))) if peer.name != "ours"]
    began, rates = time.perf_counter(), {}
    compile_all(variants, cells, torch.device("cuda", torch.cuda.current_device()))
    with torch.no_grad():
        for cell in cells:
            if time.perf_counter() - began > arguments.budget:
                break
            rates[str(cell)] = found = compare(cell, variants, peers, arguments.rounds)
            print(
                f"{cell}  " + "  ".join(f"{name} {rate if isinstance(rate, str) else f'{rate:.0f}'}" for name, rate in found.items()),
                flush=True,
            )
            record = make_record("search", {"variants": described, "tflops": rates})
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
