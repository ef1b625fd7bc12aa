"""What comes down to the backward of a case: gradients of o and of the LSE, the same on every machine."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from .inputs import NUMPY_DTYPE, place
from .oracle import Upstream

if TYPE_CHECKING:
    from .cases import Case
    from .inputs import Inputs

__all__ = ["build_upstream"]


def build_upstream(case: Case, inputs: Inputs) -> Upstream:
    """Standard normal; dout laid out as the case says; a gradient of the LSE in every other case.

    NaN stands where nothing may be read: in rows of dout and dlse without keys. A learned sink does count the dlse of such a row.
    """
    seed = zlib.crc32(f"upstream of {case}".encode())
    random = np.random.Generator(np.random.Philox(seed))
    dout = random.standard_normal(inputs.out_shape, dtype=np.float32).astype(NUMPY_DTYPE[case.dtype])
    dlse = random.standard_normal(inputs.lse_shape, dtype=np.float32) if seed & 1 else None
    placed = place(dout, case.layout)
    if not placed.flags.writeable:  # expanded: the poison of one row would be that of others
        return Upstream(placed, dlse)
    for sequence in inputs.sequences():
        first = len(sequence.q) if not len(sequence.k) else 0 if case.right is None else len(sequence.q) - len(sequence.k) - case.right
        placed[sequence.out_rows][: max(0, first)] = np.nan
        if dlse is not None and inputs.learned_sink is None:
            dlse[sequence.lse_rows][:, : max(0, first)] = np.nan
    return Upstream(placed, dlse)
