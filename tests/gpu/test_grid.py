"""The whole feature grid on the card against the float64 oracle: o (NaN before, in guarded memory), LSE and dropout pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

torch = pytest.importorskip("torch")

from tests.case_lists import (  # noqa: E402 - after the skip
    grid_cases,
    grouped_cases,
    hazard_cases,
    head_dim_cases,
    large_cases,
    pairwise_cases,
)
from tests.cases import GPU_DTYPES, Alibi, Case  # noqa: E402
from tests.check import check_case  # noqa: E402
from tests.gpu.harness import run_inputs  # noqa: E402
from tests.pairwise import covering_rows  # noqa: E402
from tests.strategies import random_cases, random_shapes  # noqa: E402

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

Record = Callable[[str, object], None]
RANDOM_RUNS, EXAMPLES = 12, 15
RANDOM_SHAPES = 1000  # over all kernels of KERNEL_AXES: compiling one takes longer than fifty runs
WIDTHS = ((64, 64), (128, 128), (32, 32), (96, 96), (256, 256), (192, 128), (56, 56), (120, 104), (64, 136))
EITHER = (False, True)
KERNEL_AXES: dict[str, tuple[Any, ...]] = {
    "dtype": GPU_DTYPES,
    "widths": WIDTHS,
    "varlen": EITHER,
    "left": EITHER,
    "right": EITHER,
    "sinks": EITHER,
    "learned_sink": EITHER,
    "alibi": tuple(Alibi),
    "softcap": EITHER,
    "dropout": EITHER,
    "negative": EITHER,
    "grouped": EITHER,
}


def check(case: Case, record_property: Record) -> None:
    report = check_case(case, run_inputs)
    record_property("dtype", case.dtype.value)
    record_property("ratio", round(report.ratio, 4))  # of the error to that of the plain evaluation in the same type
    record_property("share", round(report.error / report.bound, 4) if report.bound else 0.0)  # of what is allowed
    record_property("lse_error", float(f"{report.lse_error:.2e}"))


@pytest.mark.parametrize("case", grid_cases(GPU_DTYPES), ids=str)
def test_every_head_dim_with_every_mask(case: Case, record_property: Record) -> None:
    check(case, record_property)


@pytest.mark.parametrize("case", head_dim_cases(GPU_DTYPES), ids=str)
def test_every_head_dim_and_mixed_widths(case: Case, record_property: Record) -> None:
    check(case, record_property)


@pytest.mark.parametrize("case", pairwise_cases(GPU_DTYPES), ids=str)
def test_every_pair_of_features(case: Case, record_property: Record) -> None:
    check(case, record_property)


@pytest.mark.parametrize("case", hazard_cases(GPU_DTYPES), ids=str)
def test_hazard(case: Case, record_property: Record) -> None:
    check(case, record_property)


@pytest.mark.parametrize("case", grouped_cases(GPU_DTYPES), ids=str)
def test_query_heads_that_share_keys(case: Case, record_property: Record) -> None:
    check(case, record_property)


@pytest.mark.parametrize("case", large_cases(GPU_DTYPES), ids=str)
def test_large_on_sampled_rows(case: Case, record_property: Record) -> None:
    check(case, record_property)


def judge(number: int, examples: int, cases: SearchStrategy[Case]) -> None:
    """Judge some cases, always the same ones for one number."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # shrinking compiles a kernel a step
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def judge_one(case: Case) -> None:
        check_case(case, run_inputs)

    judge_one()


@pytest.mark.parametrize("run", range(RANDOM_RUNS))
def test_random_shapes_and_features(run: int) -> None:
    judge(run, EXAMPLES, random_cases(GPU_DTYPES))


def kernels() -> list[dict[str, Any]]:
    """All features in pairs, in few kernels."""
    rows = covering_rows(KERNEL_AXES)
    return [{**row, "head_dim": row["widths"][0], "v_head_dim": row["widths"][1]} for row in rows]


@pytest.mark.parametrize("number", range(len(kernels())))
def test_1000_random_shapes(number: int) -> None:
    chosen = kernels()
    judge(number, math.ceil(RANDOM_SHAPES / len(chosen)), random_shapes(chosen[number]))
