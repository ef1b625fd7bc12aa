"""Take the NumPy inputs of one call to a device with their memory layout, run them there into poisoned outputs.

The device is ``cuda:0``; ``ATOMR_FLASHATTN_TEST_DEVICE`` names another, and ``cpu`` runs the same tests on the CPU backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from atomr_accel_flashattn.fa2 import AttentionOptions, Fa2FwdRequest, MaskKind, PositionBias
from atomr_accel_flashattn.functional import flash_attn_func, flash_attn_varlen_func
from atomr_accel_flashattn.requests.backward import DenseBwdRequest
from atomr_accel_flashattn.requests.dense import DenseFwdRequest
from atomr_accel_flashattn.runtime.execute import run
from atomr_accel_flashattn.types import SmArch
from atomr_accel_flashattn.varlen import CumulativeSeqlens, VarlenBwdRequest, VarlenFwdRequest
from tests.check import Run
from tests.gpu.families import DEVICE
from tests.inputs import Inputs, Layout, place, storage_of
from tests.oracle import Gradients, Upstream

if TYPE_CHECKING:
    import pytest

Array = NDArray[Any]

DENSE: type[DenseFwdRequest] = Fa2FwdRequest  # tests/gpu/families.py puts another one here
Request = DenseFwdRequest | VarlenFwdRequest


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A tensor to be written, inside a buffer of NaN. No kernel but the one that is tested writes to it."""

    view: torch.Tensor
    storage: torch.Tensor

    @classmethod
    def like(cls, view: Array, device: str = DEVICE) -> Written:
        """One with the strides of a view of :func:`tests.inputs.place`, and its values."""
        flat, offset, strides = storage_of(view)
        storage = _flat_tensor(flat, device)
        return cls(torch.as_strided(storage, view.shape, strides, offset), storage)

    def alone(self) -> Array:
        """What it holds now. Fails when anything around it is no longer NaN."""
        around = download(self.storage).copy()
        steps = [step * around.itemsize for step in self.view.stride()]
        inside = np.lib.stride_tricks.as_strided(around[self.view.storage_offset() :], self.view.shape, steps)
        found = inside.copy()
        inside[...] = np.nan
        touched = np.flatnonzero(~np.isnan(around))
        assert len(touched) == 0, f"{len(touched)} elements outside the output were written, the first at element {touched[0]}"
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call on the device: its request, and its output."""

    request: Request
    out: Written


def upload(view: Array, device: str = DEVICE) -> torch.Tensor:
    """The same values with the same strides and the same offset from an aligned address, on the device."""
    storage, offset, strides = storage_of(view)
    return torch.as_strided(_flat_tensor(storage, device), view.shape, strides, offset)


def _flat_tensor(storage: Array, device: str) -> torch.Tensor:
    copy = storage.copy()
    if copy.dtype.name in {"float8_e4m3fn", "float8_e5m2"}:
        return torch.from_numpy(copy.view(np.int8)).to(device).view(getattr(torch, copy.dtype.name))
    if copy.dtype.name == "bfloat16":
        return torch.from_numpy(copy.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(copy).to(device)


def download(tensor: torch.Tensor) -> Array:
    """A NumPy copy; bf16 as ml_dtypes has it."""
    host = tensor.detach().cpu()
    if host.dtype is torch.bfloat16:
        return np.asarray(host.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(host.numpy())


def dense(*arrays: Any, **options: Any) -> DenseFwdRequest:
    """A dense request of the family that is tested."""
    return DENSE(*arrays, **options)


def make_call(inputs: Inputs, *, out_layout: Layout = Layout.PADDED, device: str = DEVICE) -> Call:
    """Upload everything and make the request; the output and all around it is filled with NaN.

    No kernel but the one that is tested writes anything: the sanitizer looks at that one alone, and at copies from the host.
    """
    out = Written.like(place(np.full(inputs.out_shape, np.nan, inputs.q.dtype), out_layout), device)
    return Call(make_request(inputs, device, out.view), out)


def make_request(inputs: Inputs, device: str = DEVICE, out: torch.Tensor | None = None) -> Request:
    """The request of a call, every array on the device."""
    arrays = [upload(x, device) for x in (inputs.q, inputs.k, inputs.v)]
    asked = asked_of(inputs, device)
    return VarlenFwdRequest(*arrays, **asked, out=out) if "cu_seqlens_q" in asked else dense(*arrays, **asked, out=out)


def asked_of(inputs: Inputs, device: str = DEVICE) -> dict[str, Any]:
    """The arguments of a request beside q, k and v that its direction does not change, every array on the device."""
    slopes, sink, rng = (None if x is None else upload(x, device) for x in (inputs.alibi_slopes, inputs.learned_sink, inputs.rng))
    asked: dict[str, Any] = {
        "mask": MaskKind(inputs.left, inputs.right),
        "bias": PositionBias.none() if slopes is None else PositionBias.alibi(slopes),
        "sink_tokens": inputs.sink_tokens,
        "options": AttentionOptions(
            softmax_scale=inputs.softmax_scale, softcap=inputs.softcap, learned_sink=sink, dropout_p=inputs.dropout_p, rng=rng
        ),
    }
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        asked["cu_seqlens_q"] = CumulativeSeqlens(upload(inputs.cu_seqlens_q, device), inputs.max_seqlen_q)
        asked["cu_seqlens_k"] = CumulativeSeqlens(upload(inputs.cu_seqlens_k, device), inputs.max_seqlen_k)
    return asked


@dataclass(frozen=True, slots=True)
class Backward:
    """How the gradients of a call are asked for."""

    recompute: bool = False
    deterministic: bool = False
    tiles_for: SmArch | None = None
    new_arrays: bool = False  # whether the call makes those of gradients; kernels keep statistics of rows in its dq then

    def __call__(self, inputs: Inputs, upstream: Upstream) -> Gradients:
        """Forward and backward on the device, into gradients full of NaN. Fails when anything around the caller's own was written."""
        arrays = [upload(x) for x in (inputs.q, inputs.k, inputs.v)]
        asked = asked_of(inputs)
        packed = "cu_seqlens_q" in asked
        done: Any = None
        if not self.recompute:
            done = run(VarlenFwdRequest(*arrays, **asked) if packed else dense(*arrays, **asked))
        layout = Layout.ODD if inputs.q.strides[-2] % 16 else Layout.PADDED
        like = () if self.new_arrays else (inputs.q, inputs.k, inputs.v)
        written = [Written.like(place(np.full(x.shape, np.nan, x.dtype), layout)) for x in like]
        dout, dlse = (None if x is None else upload(x) for x in upstream)
        kind: Any = VarlenBwdRequest if packed else DenseBwdRequest
        request = kind(
            *arrays,
            None if done is None else done.out,
            dout,
            None if done is None else done.lse,
            dlse=dlse,
            recompute=self.recompute,
            deterministic=self.deterministic,
            **dict(zip(("dq", "dk", "dv"), (each.view for each in written), strict=False)),
            **asked,
        )
        gradients = run(request, tiles_for=self.tiles_for)
        synchronize()
        made = (each.alone() for each in written) if written else map(download, (gradients.dq, gradients.dk, gradients.dv))
        dq, dk, dv = made
        return Gradients(dq, dk, dv, None if gradients.dsink is None else download(gradients.dsink))


def run_inputs(inputs: Inputs, tiles_for: SmArch | None = None) -> Run:
    """What :func:`tests.check.check_case` calls: one run on the device, with everything uploaded in its layout."""
    return execute(make_call(inputs), tiles_for)


def execute(call: Call, tiles_for: SmArch | None = None) -> Run:
    """Run the request and bring the results to the host. Fails when anything around the output was written."""
    output = run(call.request, dropout_mask=True, tiles_for=tiles_for)
    synchronize()
    assert output.out.data_ptr() == call.out.view.data_ptr(), "the output is not the tensor that was passed as out="
    assert output.lse is not None, "run() gave no LSE"
    keep = None if output.dropout_mask is None else download(output.dropout_mask)
    return Run(call.out.alone(), download(output.lse), keep)


def functional_call(inputs: Inputs, device: str = DEVICE) -> Callable[[], torch.Tensor]:
    """The same call, without dropout, through the flash-attn compatible functions (and so through the plan cache), on tensors made once."""
    q, k, v = (upload(x, device) for x in (inputs.q, inputs.k, inputs.v))
    extra = (inputs.alibi_slopes, inputs.learned_sink, inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    slopes, sink, offsets_q, offsets_k = (None if x is None else upload(x, device) for x in extra)
    options: dict[str, Any] = {
        "softmax_scale": inputs.softmax_scale,
        "window_size": tuple(-1 if side is None else side for side in (inputs.left, inputs.right)),
        "softcap": inputs.softcap,
        "alibi_slopes": slopes,
        "learned_sink": sink,
        "sink_tokens": inputs.sink_tokens,
    }
    if offsets_q is None:
        return lambda: flash_attn_func(q, k, v, **options)
    longest = inputs.max_seqlen_q, inputs.max_seqlen_k
    return lambda: flash_attn_varlen_func(q, k, v, offsets_q, offsets_k, *longest, **options)


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE != "cpu":
        torch.cuda.synchronize(DEVICE)


def poison_workspaces(monkeypatch: pytest.MonkeyPatch, module: Any, *others: str) -> None:
    """Every workspace that ``module`` takes is full of NaN first, and so is what the functions ``others`` of it make."""

    def poison(make: Any) -> Any:
        def poisoned(*arguments: Any, **options: Any) -> Any:
            made = make(*arguments, **options)
            made.source.fill_(float("nan"))
            return made

        return poisoned

    for name in ("empty_workspace", *others):
        monkeypatch.setattr(module, name, poison(getattr(module, name)))
