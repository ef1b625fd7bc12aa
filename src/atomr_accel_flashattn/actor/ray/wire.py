"""Serialisation: a forward request as plain values and NumPy arrays, and its answer.

bfloat16 travels as uint16: a worker reads NumPy arrays of built-in types where they lie, and copies
others.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays.device_array import DeviceArray
from ...arrays.read import as_numpy, numpy_dtype, read_array
from ...arrays.streams import copy_to_host
from ...errors import ArrayTypeError
from ...fa3 import Fa3FwdRequest
from ...problem import ArrayInfo
from ...requests.checks import is_contiguous
from ...requests.dense import DenseFwdRequest
from ...requests.options import AttentionOptions, PositionBias
from ...runtime.plan import Output
from ...types import Device
from ...varlen import CumulativeSeqlens, VarlenFwdRequest
from ..messages import FlashAttnMsg

__all__ = ["WireArray", "WireRequest", "from_wire", "to_wire"]


@dataclass(frozen=True, slots=True)
class WireArray:
    """An array whose element type NumPy may not have: ``bits`` are of a type that it has."""

    bits: np.ndarray[Any, Any]
    dtype_name: str

    def numpy(self) -> np.ndarray[Any, Any]:
        """As ml_dtypes has it."""
        return self.bits.view(numpy_dtype(self.dtype_name))


def to_wire(info: ArrayInfo) -> WireArray:
    """The array in host memory, copied only when it is on a GPU.

    Raises:
        ArrayTypeError: a GPU array with gaps, of a library that we cannot copy with.
    """
    torch = sys.modules.get("torch")
    if info.device.kind == "cpu":
        array = as_numpy(info)
    elif torch is not None and isinstance(info.source, torch.Tensor):
        array = as_numpy(read_array(info.source.detach().cpu(), "array"))
    elif is_contiguous(info):
        array = copy_to_host(info)
    else:
        raise ArrayTypeError(f"array: got strides {info.strides} on {info.device}; allowed are contiguous arrays; make a copy")
    return WireArray(array.view(np.uint16) if info.dtype_name == "bfloat16" else array, info.dtype_name)


@dataclass(frozen=True, slots=True, eq=False)
class WireRequest:
    """A Forward without its arrays, which :meth:`pack` returns beside it."""

    kind: type[DenseFwdRequest | VarlenFwdRequest]
    dtype_names: dict[str, str]
    max_seqlens: tuple[int, int] | None
    values: dict[str, Any]
    options: dict[str, float]
    lse: bool
    dropout_mask: bool

    @classmethod
    def pack(cls, message: FlashAttnMsg.Forward) -> tuple[WireRequest, list[np.ndarray[Any, Any]]]:
        """Of a message with a DenseFwdRequest, of either family or none, or a VarlenFwdRequest.

        Raises:
            ArrayTypeError: as :func:`to_wire`.
        """
        request: DenseFwdRequest | VarlenFwdRequest = message.request
        schedule = {"persistent": request.persistent} if isinstance(request, Fa3FwdRequest) else {}
        problem = request.problem
        dropout = problem.dropout
        infos = {name: getattr(problem, name) for name in ("q", "k", "v", "alibi_slopes", "learned_sink", "cu_seqlens_q", "cu_seqlens_k")}
        infos["rng"] = None if dropout is None else dropout.rng
        found = {name: to_wire(info) for name, info in infos.items() if info is not None}
        wire = cls(
            kind=type(request),
            dtype_names={name: array.dtype_name for name, array in found.items()},
            max_seqlens=(problem.seqlen_q, problem.seqlen_k) if problem.is_varlen else None,
            values={"mask": request.mask, "sink_tokens": request.sink_tokens, **schedule},
            options={
                "softmax_scale": problem.softmax_scale,
                "softcap": problem.softcap,
                "dropout_p": 0.0 if dropout is None else dropout.p,
            },
            lse=message.lse,
            dropout_mask=message.dropout_mask,
        )
        return wire, [array.bits for array in found.values()]

    def unpack(self, arrays: tuple[np.ndarray[Any, Any], ...], device: Device) -> FlashAttnMsg.Forward:
        """The message again, on the worker's device. Blocks for the copies to a GPU.

        Raises:
            ConstructionError: the request is not allowed there, as float32 on a GPU.
        """
        found: dict[str, Any] = {}
        for (name, dtype_name), bits in zip(self.dtype_names.items(), arrays, strict=True):
            array = WireArray(bits, dtype_name).numpy()
            found[name] = array if device.kind == "cpu" else DeviceArray.from_numpy(array, device.index)
        given: dict[str, Any] = {
            **self.values,
            "bias": PositionBias(found.get("alibi_slopes")),
            "options": AttentionOptions(**self.options, learned_sink=found.get("learned_sink"), rng=found.get("rng")),
        }
        for name, longest in zip(("cu_seqlens_q", "cu_seqlens_k"), self.max_seqlens or (), strict=False):
            given[name] = CumulativeSeqlens(found[name], longest)
        return FlashAttnMsg.Forward(self.kind(found["q"], found["k"], found["v"], **given), self.lse, self.dropout_mask)


def from_wire(message: FlashAttnMsg.Forward, answer: list[WireArray | None]) -> Output:
    """An answer in the library and on the device of q, or in the caller's ``out``.

    Callers of libraries other than torch get read-only NumPy arrays that lie in the object store.
    """
    request = message.request
    out, lse, mask = (None if array is None else _like(request.problem.q, array) for array in answer)
    target: ArrayInfo | None = request.out_array
    if target is None:
        return Output(out, lse, mask)
    if target.device.kind == "cpu":
        as_numpy(target)[...] = as_numpy(read_array(out, "out"))
    else:
        target.source[...] = out
    return Output(request.out, lse, mask)


def _like(q: ArrayInfo, array: WireArray) -> Any:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(q.source, torch.Tensor):
        return array.numpy()
    if array.dtype_name == "bfloat16":
        return torch.from_numpy(array.bits.view(np.int16).copy()).view(torch.bfloat16).to(q.source.device)
    return torch.from_numpy(array.bits.copy()).to(q.source.device)
