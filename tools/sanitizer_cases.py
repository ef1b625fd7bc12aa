"""Small cases for compute-sanitizer: every pair of features, forward, backward and over KV caches, judged by the oracle.

tools/sanitizer.py runs them:

``PYTHONPATH=src:. compute-sanitizer --tool memcheck --kernel-name kns=fa3_ python tools/sanitizer_cases.py --family fa3``. torch's caching
allocator is switched off, so that an access beyond an array is one beyond its allocation. ``--compile`` runs nothing: it compiles what the
cases need, on all cores, so that no tool watches a compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch starts

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.dispatch import best_arch
from atomr_accel_flashattn.jit.compile import CompiledKernel, compile_many
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec
from atomr_accel_flashattn.limits import BEFORE_FP8
from atomr_accel_flashattn.runtime import merging, plan, step
from atomr_accel_flashattn.runtime.execute import run
from atomr_accel_flashattn.torch_ops import repeat
from atomr_accel_flashattn.types import DType
from tests.case_lists import grouped_cases, hazard_cases, pairwise_cases
from tests.cases import GPU_DTYPES, Case, build
from tests.check import check_case, check_gradients
from tests.fp8_cases import BLOCK_TYPES, FP8_FEATURES, FP8_KINDS, Fp8Types
from tests.gpu.families import DEVICE, FAMILIES, blocks_for, use_family
from tests.gpu.fp8_calls import check as check_fp8
from tests.gpu.harness import Backward, make_call, run_inputs
from tests.kv_cache import cases
from tests.kv_cache.cases import CacheCase, check_cached, fill, request_of, with_plan
from tests.kv_cache.kernel_cases import (
    APPENDS,
    FP8_APPENDS,
    GRID,
    PLANNED,
    PREFILL,
    check_append,
    check_entries_outside,
    check_fp8_append,
    with_entries_outside,
    with_new_tokens,
)
from tests.kv_cache.test_fp8_cache import AXES as FP8_AXES, check_row
from tests.pairwise import covering_rows
from tests.upstream import build_upstream

MAX_SCORES = 200_000
ON_CACHES = {Family.FA2: (*GRID, *PLANNED[::3]), Family.FA3: tuple(PREFILL[::4])}
GRACE = 30  # seconds from the end of the time for beginning cases to the end of the process, should a kernel hang


class Check(NamedTuple):
    """One case in one direction: how it is judged, and how it is only launched."""

    name: str
    judge: Callable[[], object]
    launch: Callable[[], object]

    @classmethod
    def forward(cls, case: Case) -> Check:
        """o, LSE and dropout pattern."""
        launch = lambda: run(make_call(build(case)).request, dropout_mask=True)  # noqa: E731
        return cls(str(case), lambda: check_case(case, run_inputs), launch)

    @classmethod
    def backward(cls, case: Case) -> Check:
        """Gradients, of half of the cases in arrays that the call makes, and of half of each half deterministic."""
        kind = zlib.crc32(str(case).encode())
        backward = Backward(deterministic=bool(kind & 1), new_arrays=bool(kind & 2))

        def launch() -> object:
            inputs = build(case)
            return backward(inputs, build_upstream(case, inputs))

        return cls(f"gradients of {case}", lambda: check_gradients(case, backward), launch)

    @classmethod
    def cached(cls, case: CacheCase) -> Check:
        """O and LSE over a KV cache."""

        def launch() -> object:
            inputs = build(case.call)
            request = request_of(case, inputs, fill(case, inputs))[0]
            return run(with_plan(request) if case.planned else request)

        return cls(str(case), lambda: check_cached(case), launch)

    @classmethod
    def append(cls, name: str) -> Check:
        """New tokens."""
        asked = with_new_tokens(**APPENDS[name])

        def launch() -> object:
            on_device = {key: cases.upload(x) if isinstance(x, np.ndarray) else x for key, x in asked.items()}
            return fa.flash_attn_with_kvcache(**on_device)

        return cls(name, lambda: check_append(asked, causal=True), launch)

    @classmethod
    def outside(cls, queries: int, page: int, splits: int) -> Check:
        """Entries of a table that name no page."""

        def launch() -> object:
            arrays = map(cases.upload, with_entries_outside(queries, page))
            return run(fa.PagedAttentionRequest(*arrays, num_splits=splits))

        judge = lambda: check_entries_outside(queries=queries, page=page, num_splits=splits)  # noqa: E731
        return cls(f"{queries} queries, {splits} splits, entries outside of pages of {page}", judge, launch)

    @classmethod
    def fp8(cls, name: str, judge: Callable[[], object]) -> Check:
        """A check of fp8, which is launched by judging it: without a launch it is wrong, and that is not looked at."""

        def launch() -> None:
            with contextlib.suppress(AssertionError):
                judge()

        return cls(name, judge, launch)

    @classmethod
    def merge(cls, shape: tuple[int, ...]) -> Check:
        """Two states made one."""
        random = np.random.default_rng(0)
        lse_shape = (*shape[:-3], shape[-2], shape[-3])
        states = [(random.standard_normal(shape).astype(np.float16), random.standard_normal(lse_shape).astype(np.float32)) for _ in "ab"]

        def launch() -> tuple[Any, Any]:
            return fa.merge_states(*(cases.upload(x) for state in states for x in state))

        def judge() -> None:
            for made, expected in zip(launch(), fa.merge_states(*states[0], *states[1]), strict=True):
                np.testing.assert_allclose(cases.download(made).astype(np.float32), expected.astype(np.float32), rtol=2e-3, atol=2e-3)

        return cls(f"merge of {shape}", judge, launch)


QUERIES = {Family.FA2: 1, Family.FA3: 70}  # that the family answers over a KV cache
OUTSIDE = tuple((page, splits) for page in (8, 16, 24) for splits in (1, 3))
# Keys of plain K and V that the wgmma family splits, on a card of three SMs, too.
FEW = Case(label="few", dtype=GPU_DTYPES[0], heads=2, heads_kv=1, seqlen_q=16, seqlen_k=2500, right=0)
SPLIT = (
    FEW,
    replace(FEW, seqlen_q=3, left=2000, sink_tokens=70, learned_sink=True),
    replace(FEW, head_dim=40, v_head_dim=24, softcap=20.0),
    replace(FEW, lengths_q=(7, 0, 20), lengths_k=(2300, 30, 0), learned_sink=True),
)
FP8_NAMES = ("causal", "everything", "unseen_nan", "more queries than keys")
# Rows over fp8 caches; one that is batch-invariant, with factors of tokens, is refused.
FP8_ROWS = [row for row in covering_rows(FP8_AXES)[::5] if not (row["order"].get("batch_invariant") and fa.ScaleUnit.TOKEN in row.values())]
MERGED = ((3, 50, 4, 64), (1, 7, 3, 20), (70, 2, 8))


def fp8_checks(family: Family) -> list[Check]:
    """Plain K and V in a few features and types, and with mma.sync the rows of a cache and new tokens; none before sm_89."""
    if DEVICE != "cpu" and best_arch(fa.Device("cuda", 0)) in BEFORE_FP8:
        return []
    wgmma = family is Family.FA3
    kinds = (*FP8_KINDS, BLOCK_TYPES, *(() if wgmma else (Fp8Types(q=DType.BF16),)))
    made = []
    for n, types in enumerate(kinds):
        case = Case(label="fp8", **FP8_FEATURES[FP8_NAMES[n % len(FP8_NAMES)]])
        made.append(Check.fp8(f"{case} {types}", partial(check_fp8, case, types, wgmma=wgmma)))
    if not wgmma:
        made += [Check.fp8(f"fp8 cache {n}", partial(check_row, row)) for n, row in enumerate(FP8_ROWS)]
        made += [Check.fp8(f"fp8 append {name}", partial(check_fp8_append, **asked)) for name, asked in FP8_APPENDS.items()]
    return made


def checks(family: Family) -> list[Check]:
    """The pairwise cases in both types, the others in one, those that are small.

    The FA2 family has the backward, new tokens and states, the FA3 family splits of plain K and V. Shuffled, so that a run cut short sees
    some of all.
    """
    chosen = [*pairwise_cases(GPU_DTYPES), *(case for others in (hazard_cases, grouped_cases) for case in others(GPU_DTYPES[:1]))]
    small = [case for case in chosen if case.score_count <= MAX_SCORES]
    made = list(map(Check.forward, small))
    if family is Family.FA2:
        made += [*map(Check.backward, small), *map(Check.append, APPENDS), *map(Check.merge, MERGED)]
    else:
        made += map(Check.forward, SPLIT)
    made += map(Check.cached, ON_CACHES[family])
    made += fp8_checks(family)
    made += [Check.outside(QUERIES[family], page, splits) for page, splits in OUTSIDE]
    return sorted(made, key=lambda check: zlib.crc32(check.name.encode()))


@contextlib.contextmanager
def prepared(family: Family, check: Check) -> Iterator[pytest.MonkeyPatch]:
    """The family answers, and caches lie on the device, until the end of a check."""
    with pytest.MonkeyPatch.context() as patch, use_family(family, patch, blocks_for(check.name)):
        patch.setattr(cases, "DEVICE", DEVICE)
        yield patch


def needed_specs(family: Family) -> list[KernelSpec]:
    """The kernels that the cases launch, found by running them without launching any."""
    specs: list[KernelSpec] = []

    def note(spec: KernelSpec, _device_index: int) -> Any:
        specs.append(spec)
        return SimpleNamespace(launch_of=lambda *_: SimpleNamespace(launch=lambda *_: None))

    for check in checks(family):
        with prepared(family, check) as patch:
            for module in (plan, merging, step):
                patch.setattr(module, "load_kernel", note)
            patch.setattr(merging, "_launches", {})
            patch.setattr(plan, "LaunchSeries", lambda *_: SimpleNamespace(launch=lambda *_: None))
            check.launch()
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


def run_all(family: Family, seconds: float, part: int, parts: int) -> int:
    """How many of every ``parts``-th case, from number ``part`` on, failed, at most 125.

    The last line of output is a JSON object with the numbers.
    """
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
    began, failed, done, chosen = time.perf_counter(), [], 0, checks(family)[part::parts]
    for check in chosen:
        if time.perf_counter() - began > seconds:
            break
        done += 1
        try:
            with prepared(family, check):
                check.judge()
        except Exception as error:  # noqa: BLE001 - every case is reported
            failed.append(f"{check.name}: {type(error).__name__}: {str(error)[:300]}")
    print(json.dumps({"cases": done, "of": len(chosen), "failed": failed, "seconds": round(time.perf_counter() - began, 1)}))
    return min(len(failed), 125)


def main() -> int:
    """Compile, or run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="stop beginning cases after this long")
    parser.add_argument("--family", choices=[family.value for family in FAMILIES], default=Family.FA2.value, help="of those the card has")
    parser.add_argument("--compile", action="store_true", help="compile and run nothing")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth case from number I on")
    arguments = parser.parse_args()
    family = Family(arguments.family)
    return compile_all(family) if arguments.compile else run_all(family, arguments.seconds, *arguments.part)


if __name__ == "__main__":
    sys.exit(main())
