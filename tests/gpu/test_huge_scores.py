"""Huge scores."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.cases import Case  # noqa: E402 - after the skip
from tests.gpu.harness import run_inputs  # noqa: E402
from tests.huge_scores import CONSTANT, RANDOM, check_constant, check_random  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


@pytest.mark.parametrize(("size", "case"), CONSTANT, ids=str)
def test_constant_inputs(size: float, case: Case) -> None:
    check_constant(size, case, run_inputs)


@pytest.mark.parametrize(("size", "case"), RANDOM, ids=str)
def test_random_inputs(size: float, case: Case) -> None:
    check_random(size, case, run_inputs)
