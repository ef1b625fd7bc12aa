"""Run a benchmark without the command line's dependencies: ``python tools/gpu_bench.py forward --cells grid_d128* --rounds 5``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from atomr_accel_flashattn.bench import HostOptions, LayerOptions, Options, main, main_backward, main_decode, main_host, main_layer


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["forward", "backward", "decode", "host", "layer"])
    parser.add_argument("--cells", help="comma-separated patterns of cell names")
    parser.add_argument(
        "--peers",
        help="comma-separated: ours, fa2, cudnn, flex, fa3, fa4, cudnn_fe, or all; default: those installed, not flex. "
        "Of decode: ours, fa3, fa4, fi, xqa, cudnn_fe",
    )
    parser.add_argument("--families", default="", help="of our kernels, comma-separated: fa2, fa3; the first is the column ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no further cell is begun")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="what the record calls the code")
    return parser.parse_args()


def run() -> int:
    """0 when everything was right and timed."""
    arguments = _arguments()
    if arguments.what == "host":
        main_host(HostOptions(), out=arguments.out, commit=arguments.commit)
        return 0
    peers = tuple(arguments.peers.split(",")) if arguments.peers else None
    if arguments.what == "layer":
        sides = LayerOptions(rounds=arguments.rounds) if peers is None else LayerOptions(rounds=arguments.rounds, peers=peers)
        record, _ = main_layer(sides, out=arguments.out, commit=arguments.commit)
        return 1 if record["failures"] else 0
    families = tuple(name for name in arguments.families.split(",") if name)
    options = Options(cells=arguments.cells, rounds=arguments.rounds, budget=arguments.budget, peers=peers, families=families)
    if arguments.what == "decode":
        found, _ = main_decode(options, out=arguments.out, commit=arguments.commit)
        return 1 if found.failures else 0
    report, _ = (main_backward if arguments.what == "backward" else main)(options, out=arguments.out, commit=arguments.commit)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(run())
