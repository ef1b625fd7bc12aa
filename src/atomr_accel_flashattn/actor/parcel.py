"""A forward request as plain values and NumPy arrays, to travel through Ray's object store, and its answer on the way back.

bfloat16 travels as uint16: NumPy arrays of built-in types are read by a worker where they lie, others are copied.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..arrays.device_array import DeviceArray
from ..arrays.read import as_numpy, numpy_dtype, read_array
from ..arrays.streams import copy_to_host
from ..errors import ArrayTypeError
from ..fa3 import Fa3FwdRequest
from ..problem import ArrayInfo
from ..requests.checks import is_contiguous
from ..requests.dense import DenseFwdRequest
from ..requests.options import AttentionOptions, PositionBias
from ..runtime.plan import Output
from ..types import Device
from ..varlen import CumulativeSeqlens, VarlenFwdRequest
from .messages import FlashAttnMsg

__all__ = ["Bits", "Parcel", "bring_home", "to_bits"]

_NAMES: Final = ("q", "k", "v", "slopes", "learned_sink", "rng", "offsets_q", "offsets_k")


@dataclass(frozen=True, slots=True)
class Bits:
    """An array whose element type NumPy may not have: ``array`` holds its bits."""

    array: np.ndarray[Any, Any]
    dtype_name: str

    def numpy(self) -> np.ndarray[Any, Any]:
        """As ml_dtypes has it."""
        return self.array.view(numpy_dtype(self.dtype_name))


def to_bits(info: ArrayInfo) -> Bits:
    """The array in host memory, copied only when it is on a GPU.

    Raises:
        ArrayTypeError: a GPU array with gaps, of a library that we cannot copy with.
    """
    torch = sys.modules.get("torch")
    if info.device.kind != "cpu":
        if torch is not None and isinstance(info.source, torch.Tensor):
            info = read_array(info.source.detach().cpu(), "array")
        elif not is_contiguous(info):
            raise ArrayTypeError(f"array: got strides {info.strides} on {info.device}; allowed are contiguous arrays; make a copy")
        else:
            return _bits_of(copy_to_host(info), info.dtype_name)
    return _bits_of(as_numpy(info), info.dtype_name)


def _bits_of(array: np.ndarray[Any, Any], name: str) -> Bits:
    return Bits(array.view(np.uint16) if name == "bfloat16" else array, name)


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """A Forward without its arrays. ``arrays`` of :meth:`pack` are sent beside it."""

    names: tuple[str, ...]
    dtype_names: tuple[str, ...]
    lengths: tuple[int, int] | None
    values: dict[str, Any]
    scale_cap_drop: tuple[float, float, float]
    lse: bool
    dropout_mask: bool
    kind: type[DenseFwdRequest | VarlenFwdRequest] = DenseFwdRequest

    @classmethod
    def pack(cls, message: FlashAttnMsg.Forward) -> tuple[Parcel, list[np.ndarray[Any, Any]]]:
        """Of a message whose request is a DenseFwdRequest, of either family or none, or a VarlenFwdRequest.

        Raises:
            ArrayTypeError: as :func:`to_bits`.
        """
        request: DenseFwdRequest | VarlenFwdRequest = message.request
        schedule = {"persistent": request.persistent} if isinstance(request, Fa3FwdRequest) else {}
        problem = request.problem
        rng = None if problem.dropout is None else problem.dropout.rng
        infos = (
            *(problem.q, problem.k, problem.v, problem.alibi_slopes, problem.learned_sink),
            *(rng, problem.cu_seqlens_q, problem.cu_seqlens_k),
        )
        found = {name: to_bits(info) for name, info in zip(_NAMES, infos, strict=True) if info is not None}
        parcel = cls(
            names=tuple(found),
            dtype_names=tuple(bits.dtype_name for bits in found.values()),
            lengths=(problem.seqlen_q, problem.seqlen_k) if problem.is_varlen else None,
            values={"mask": request.mask, "sink_tokens": request.sink_tokens, **schedule},
            scale_cap_drop=(problem.softmax_scale, problem.softcap, problem.dropout.p if problem.dropout else 0.0),
            lse=message.lse,
            dropout_mask=message.dropout_mask,
            kind=type(request),
        )
        return parcel, [bits.array for bits in found.values()]

    def unpack(self, arrays: tuple[np.ndarray[Any, Any], ...], device: Device) -> FlashAttnMsg.Forward:
        """The message again, on the worker's device. Blocks for the copies to a GPU.

        Raises:
            ConstructionError: the request is not allowed there, as float32 on a GPU.
        """
        found = {
            name: _place(Bits(array, dtype).numpy(), device)
            for name, dtype, array in zip(self.names, self.dtype_names, arrays, strict=True)
        }
        scale, softcap, p = self.scale_cap_drop
        options = AttentionOptions(
            softmax_scale=scale, softcap=softcap, dropout_p=p, learned_sink=found.get("learned_sink"), rng=found.get("rng")
        )
        common: dict[str, Any] = {**self.values, "bias": PositionBias(found.get("slopes")), "options": options}
        seqlens: dict[str, Any] = {
            f"cu_seqlens_{side}": CumulativeSeqlens(found[f"offsets_{side}"], length)
            for side, length in zip("qk", self.lengths or (), strict=self.lengths is not None)
        }
        request = self.kind(found["q"], found["k"], found["v"], **seqlens, **common)
        return FlashAttnMsg.Forward(request, self.lse, self.dropout_mask)


def _place(array: np.ndarray[Any, Any], device: Device) -> Any:
    return array if device.kind == "cpu" else DeviceArray.from_numpy(array, device.index)


def bring_home(message: FlashAttnMsg.Forward, answer: list[Bits | None]) -> Output:
    """An answer in the library and on the device of q, or in the caller's ``out``.

    NumPy callers get read-only arrays that lie in the object store; callers of libraries other than torch and NumPy get those too.
    """
    request = message.request
    out, lse, mask = (None if bits is None else _like(request.problem.q, bits) for bits in answer)
    target: ArrayInfo | None = request.out_array
    if target is None:
        return Output(out, lse, mask)
    if target.device.kind == "cpu":
        as_numpy(target)[...] = as_numpy(read_array(out, "out"))
    else:
        target.source[...] = out
    return Output(request.out, lse, mask)


def _like(q: ArrayInfo, bits: Bits) -> Any:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(q.source, torch.Tensor):
        return bits.numpy()
    if bits.dtype_name == "bfloat16":
        return torch.from_numpy(bits.array.view(np.int16).copy()).view(torch.bfloat16).to(q.source.device)
    return torch.from_numpy(bits.array.copy()).to(q.source.device)
