"""Packed arrays that are longer than their sequences: the same call with rows past the last one, which nobody owns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .cases import Case, build
from .check import Run
from .inputs import Inputs

__all__ = ["UNOWNED", "check_unowned", "run_with_unowned"]

_PACKED = Case(lengths_q=(30, 0, 21), lengths_k=(25, 4, 21), heads=4, heads_kv=2, head_dim=64, v_head_dim=64, right=0)
UNOWNED = (
    _PACKED,
    replace(_PACKED, label="sink", learned_sink=True, left=9, v_head_dim=40),
    replace(_PACKED, label="no_queries", lengths_q=(0, 0, 0)),
    replace(_PACKED, label="long", lengths_q=(5, 150), lengths_k=(5, 90), heads=2, heads_kv=1),
)


def check_unowned(case: Case, run: Callable[[Inputs], Run], rows: int = 300) -> None:
    """Rows that a sequence owns have the bits they have without the others."""
    inputs = build(case)
    owned, found = run(inputs), run_with_unowned(inputs, run, rows)
    np.testing.assert_array_equal(found.out, owned.out)
    np.testing.assert_array_equal(found.lse, owned.lse)


def run_with_unowned(inputs: Inputs, run: Callable[[Inputs], Run], rows: int = 300) -> Run:
    """The rows that a sequence owns, of a run with more of them, which get o = 0 and an LSE of -inf; NaN there is not read."""
    total = len(inputs.q)
    found = run(replace(inputs, q=_longer(inputs.q, rows), k=_longer(inputs.k, rows), v=_longer(inputs.v, rows)))
    assert found.lse is not None
    assert found.out[total:].shape[0] == rows
    assert not found.out[total:].any()
    assert np.isneginf(found.lse[:, total:]).all()
    return Run(found.out[:total], found.lse[:, :total])


def _longer(array: Any, rows: int) -> Any:
    return np.concatenate([array, np.full((rows, *array.shape[1:]), np.nan, array.dtype)])
