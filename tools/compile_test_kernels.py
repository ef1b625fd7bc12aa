"""Compile the kernels that tests/gpu needs, for Hopper, without a card: ``python tools/compile_test_kernels.py FOLDER``.

The folder is a kernel cache like any other; carried to a machine with a card and the same build of NVRTC (torch brings one of its own) and
named by ATOMR_FLASHATTN_CACHE_DIR there, it saves the tests half their time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.dispatch import key_of_problem, lookup
from atomr_accel_flashattn.errors import FlashAttnError
from atomr_accel_flashattn.jit.compile import compile_many
from atomr_accel_flashattn.kernels.forward import ForwardSpec
from atomr_accel_flashattn.types import SmArch
from tests.case_lists import grid_cases, grouped_cases, hazard_cases, head_dim_cases, pairwise_cases
from tests.cases import GPU_DTYPES, Case, build
from tests.inputs import Layout, Poisoned
from tests.reference.running import problem_of


def cases() -> list[Case]:
    """Those of tests/gpu/test_grid.py, but for the random and the large ones."""
    lists = (grid_cases, head_dim_cases, pairwise_cases, hazard_cases, grouped_cases)
    return [case for list_of in lists for case in list_of(GPU_DTYPES)]


def specs_of(case: Case) -> Iterator[ForwardSpec]:
    """The kernels of both families that answer a case, with persistent blocks and without."""
    inputs = build(case)
    layout = Layout.ODD if inputs.q.strides[-2] % 16 else Layout.PADDED
    out = read_array(Poisoned.empty(inputs.out_shape, inputs.q.dtype, layout).view, "out")
    for arch in (SmArch.SM_90, SmArch.SM_90A):
        spec = lookup(key_of_problem(problem_of(inputs), arch, out))
        if not isinstance(spec, ForwardSpec):
            continue
        for persistent in {spec.persistent, False}:
            yield replace(spec, tile=replace(spec.tile, persistent=persistent))


def main() -> None:
    """Compile them all, as many at a time as there are cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    os.environ["ATOMR_FLASHATTN_CACHE_DIR"] = str(parser.parse_args().folder)
    specs = dict.fromkeys(spec for case in cases() for spec in specs_of(case))
    print(f"{len(specs)} kernels")
    for made in compile_many(specs):
        if isinstance(made, FlashAttnError):
            print(str(made)[:300])


if __name__ == "__main__":
    main()
