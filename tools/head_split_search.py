"""Time the backward of an MQA or GQA cell with other splits over query heads and other orders of blocks, each forced in turn.

``PYTHONPATH=src:. python tools/head_split_search.py --cells gqa_d128_h16x1_causal_8k``. Prints a line of milliseconds for each variant.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch

from atomr_accel_flashattn.bench.backward import Backward
from atomr_accel_flashattn.bench.cells import backward_cells, select
from atomr_accel_flashattn.bench.inputs import make_inputs
from atomr_accel_flashattn.bench.peers import Ours
from atomr_accel_flashattn.kernels import backward
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec
from atomr_accel_flashattn.runtime import plan


def main() -> None:
    """Each number of splits with each width of a section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", default="gqa_d128_h16x1_causal_8k")
    parser.add_argument("--splits", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--sections", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="pairs side by side")
    parser.add_argument("--runs", type=int, default=20)
    asked = parser.parse_args()
    for cell in select(asked.cells, backward_cells()):
        inputs = make_inputs(cell, torch.device("cuda"), l2_bytes=0, dout=True)[0]
        for splits in (n for n in asked.splits if cell.heads // cell.heads_kv % n == 0):
            pairs = cell.batch * cell.heads_kv * splits
            for section in sorted({min(each, pairs) for each in asked.sections}):
                forced = patch.object(Fa2BackwardSpec, "head_splits", lambda *_, n=splits: n)
                with forced, patch.object(backward, "_section_pairs", lambda *_, n=section, **__: n):
                    plan.clear()
                    call = Backward().prepare(Ours(), cell, inputs)
                    for _ in range(3):
                        call()
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    for _ in range(asked.runs):
                        call()
                    end.record()
                    end.synchronize()
                    print(f"{cell} splits {splits:2} section {section:2}: {begin.elapsed_time(end) / asked.runs:.3f} ms", flush=True)
        plan.clear()


if __name__ == "__main__":
    main()
