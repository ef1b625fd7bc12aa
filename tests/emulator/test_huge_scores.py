"""Huge scores by both families on the emulator."""

from __future__ import annotations

from functools import partial

import pytest

from atomr_accel_flashattn.kernels.spec import Family
from tests.cases import Case
from tests.huge_scores import CONSTANT, RANDOM, check_constant, check_random

from .build import compiler
from .running import emulate

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler"),
    pytest.mark.parametrize("family", Family, ids=lambda family: family.name),
]


@pytest.mark.parametrize(("size", "case"), CONSTANT[::2], ids=str)
def test_constant_inputs(size: float, case: Case, family: Family):
    check_constant(size, case, partial(emulate, family=family))


@pytest.mark.parametrize(("size", "case"), RANDOM, ids=str)
def test_random_inputs(size: float, case: Case, family: Family):
    check_random(size, case, partial(emulate, family=family))
