"""Small cases for compute-sanitizer: every pair of features, judged by the oracle as well. tools/sanitizer.py runs them under its tools.

``PYTHONPATH=src:. compute-sanitizer --tool memcheck --kernel-name kns=fa3_ python tools/sanitizer_cases.py --family fa3``. torch's caching
allocator is switched off, so that an access beyond an array is one beyond its allocation. ``--compile`` runs nothing: it compiles what the
cases need, on all cores, so that no tool watches a compiler.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import zlib
from types import SimpleNamespace
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch starts

import pytest

from atomr_accel_flashattn.jit.compile import CompiledKernel, compile_many
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec
from atomr_accel_flashattn.runtime import execute
from atomr_accel_flashattn.torch_ops import repeat
from tests.case_lists import grouped_cases, hazard_cases, pairwise_cases
from tests.cases import GPU_DTYPES, Case, build
from tests.check import check_case
from tests.gpu.families import FAMILIES, blocks_for, use_family
from tests.gpu.harness import make_call, run_inputs

MAX_SCORES = 200_000
GRACE = 30  # seconds from the end of the time for beginning cases to the end of the process, should a kernel hang


def cases() -> list[Case]:
    """The pairwise cases in both types, the others in one, those that are small; shuffled, so that a run cut short sees some of all."""
    chosen = [*pairwise_cases(GPU_DTYPES), *(case for others in (hazard_cases, grouped_cases) for case in others(GPU_DTYPES[:1]))]
    return sorted((case for case in chosen if case.score_count <= MAX_SCORES), key=lambda case: zlib.crc32(str(case).encode()))


def needed_specs(family: Family) -> list[KernelSpec]:
    """The kernels that the cases launch, found by running them without launching any."""
    specs: list[KernelSpec] = []

    def note(spec: KernelSpec, _device_index: int) -> Any:
        specs.append(spec)
        return SimpleNamespace(launch_of=lambda *_: SimpleNamespace(launch=lambda *_: None))

    for case in cases():
        with pytest.MonkeyPatch.context() as patch, use_family(family, patch, blocks_for(str(case))):
            patch.setattr(execute, "load_kernel", note)
            execute.run(make_call(build(case)).request, dropout_mask=True)
            repeat.clear()  # no later run finds these plans
    return specs


def compile_all(family: Family) -> int:
    """How many kernels did not compile, at most 125."""
    began = time.perf_counter()
    specs = list(dict.fromkeys(needed_specs(family)))
    wrong = [outcome for outcome in compile_many(specs) if not isinstance(outcome, CompiledKernel)]
    print(
        json.dumps(
            {"kernels": len(specs), "not_compiled": [str(error) for error in wrong], "seconds": round(time.perf_counter() - began, 1)}
        )
    )
    return min(len(wrong), 125)


def run_all(family: Family, seconds: float) -> int:
    """How many cases failed, at most 125. The last line of output is a JSON object with the numbers."""
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
    began, failed, done, chosen = time.perf_counter(), [], 0, cases()
    for case in chosen:
        if time.perf_counter() - began > seconds:
            break
        done += 1
        try:
            with pytest.MonkeyPatch.context() as patch, use_family(family, patch, blocks_for(str(case))):
                check_case(case, run_inputs)
        except Exception as error:  # noqa: BLE001 - every case is reported
            failed.append(f"{case}: {type(error).__name__}: {str(error)[:300]}")
    print(json.dumps({"cases": done, "of": len(chosen), "failed": failed, "seconds": round(time.perf_counter() - began, 1)}))
    return min(len(failed), 125)


def main() -> int:
    """Compile, or run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="stop beginning cases after this long")
    parser.add_argument("--family", choices=[family.value for family in FAMILIES], default=Family.FA2.value, help="of those the card has")
    parser.add_argument("--compile", action="store_true", help="compile and run nothing")
    arguments = parser.parse_args()
    family = Family(arguments.family)
    return compile_all(family) if arguments.compile else run_all(family, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
