"""Packed rows that no sequence owns, by both families on the emulator."""

from __future__ import annotations

from functools import partial

import pytest

from atomr_accel_flashattn.kernels.spec import Family
from tests.cases import Case
from tests.unowned import UNOWNED, check_unowned

from .build import compiler
from .running import emulate

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")


@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
@pytest.mark.parametrize("case", UNOWNED, ids=str)
def test_rows_past_the_last_sequence(case: Case, family: Family):
    check_unowned(case, partial(emulate, family=family))
