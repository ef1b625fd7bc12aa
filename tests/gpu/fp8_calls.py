"""Dense and packed fp8 calls on the device: their requests, and how they are judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from atomr_accel_flashattn.requests.dense import DenseFwdRequest
from atomr_accel_flashattn.requests.options import Fp8Options
from atomr_accel_flashattn.runtime.execute import run
from atomr_accel_flashattn.types import DType
from atomr_accel_flashattn.varlen import VarlenFwdRequest
from tests.cases import Case
from tests.check import Run
from tests.fp8 import DTYPES, Quantised, check_fp8
from tests.fp8_cases import E4M3_TYPES, Fp8Types, fp8_call
from tests.gpu.harness import Written, asked_of, download, synchronize, upload
from tests.inputs import Layout, place

__all__ = ["check", "request_of"]


def request_of(call: Quantised, out_dtype: DType, out: Any = None) -> DenseFwdRequest | VarlenFwdRequest:
    """The request of a call, every array on the device."""
    arrays = [upload(x) for x in (call.q, call.k, call.v)]
    options = Fp8Options(**{name: upload(x) for name, x in call.descales.items()}, out_dtype=out_dtype)
    asked = asked_of(call.meant) | {"fp8": options, "out": out}
    return VarlenFwdRequest(*arrays, **asked) if "cu_seqlens_q" in asked else DenseFwdRequest(*arrays, **asked)


def check(case: Case, types: Fp8Types = E4M3_TYPES, *, wgmma: bool = True) -> None:
    """One run on the device, into an output of NaN, compared with the oracle. ``wgmma``: the family that answers."""
    call = fp8_call(case, types)
    out = Written.like(place(np.full(call.meant.out_shape, np.nan, DTYPES[types.out]), Layout.PADDED))
    output = run(request_of(call, types.out, out.view))
    synchronize()
    check_fp8(f"{case} {types}", call, Run(out.alone(), download(output.lse)), types.out, wgmma=wgmma)
