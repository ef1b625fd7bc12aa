"""Small cases for compute-sanitizer: every pair of features, judged by the oracle as well. Run it once without the tool to compile.

``PYTHONPATH=src:. compute-sanitizer --tool memcheck --kernel-name kns=fa3_ python tools/sanitizer_cases.py --family fa3``. torch's caching
allocator is switched off, so that an access beyond an array is one beyond its allocation.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch starts

import pytest

from atomr_accel_flashattn.jit.spec import Family
from tests.case_lists import hazard_cases, pairwise_cases
from tests.cases import GPU_DTYPES, Case
from tests.check import check_case
from tests.gpu.families import FAMILIES, use_family
from tests.gpu.harness import run_inputs

MAX_SCORES = 200_000


def cases() -> list[Case]:
    """The pairwise cases in both types and the hazards in one, those that are small."""
    chosen = [*pairwise_cases(GPU_DTYPES), *hazard_cases(GPU_DTYPES[:1])]
    return [case for case in chosen if case.score_count <= MAX_SCORES]


def main() -> int:
    """The number of cases that failed, at most 125."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop beginning cases after this long")
    parser.add_argument("--family", choices=[family.value for family in FAMILIES], default=Family.FA2.value, help="of those the card has")
    arguments = parser.parse_args()
    began, failed, done = time.perf_counter(), [], 0
    for case in cases():
        if time.perf_counter() - began > arguments.seconds:
            break
        done += 1
        try:
            with pytest.MonkeyPatch.context() as patch, use_family(Family(arguments.family), str(case), patch):
                check_case(case, run_inputs)
        except Exception as error:  # noqa: BLE001 - every case is reported
            failed.append(case)
            print(f"FAIL {case}: {type(error).__name__}: {str(error)[:300]}")
    print(f"{done} of {len(cases())} cases run, {len(failed)} failed, {time.perf_counter() - began:.1f} s")
    return min(len(failed), 125)


if __name__ == "__main__":
    sys.exit(main())
