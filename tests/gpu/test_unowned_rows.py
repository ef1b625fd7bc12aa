"""Packed rows that no sequence owns."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.cases import Case  # noqa: E402 - after the skip
from tests.gpu.harness import run_inputs  # noqa: E402
from tests.unowned import UNOWNED, check_unowned  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


@pytest.mark.parametrize("case", UNOWNED, ids=str)
def test_rows_past_the_last_sequence(case: Case) -> None:
    check_unowned(case, run_inputs, rows=3000)
