"""Serialisation: a message as plain values and NumPy arrays, and its answer.

bfloat16 travels as uint16, fp8 as uint8: a worker reads NumPy arrays of built-in types where they lie, and copies
others.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...arrays.device_array import DeviceArray
from ...arrays.new import copy_into
from ...arrays.read import as_numpy, numpy_dtype, read_array
from ...arrays.streams import copy_to_host
from ...errors import ArrayTypeError
from ...kernels.forward import DESCALE_SLOTS
from ...problem import ArrayInfo
from ...requests.checks import is_contiguous
from ...requests.options import AttentionOptions, Fp8Options, PositionBias
from ...types import Device, DType
from ...varlen import CumulativeSeqlens
from ..kinds import kind_of
from ..messages import FlashAttnMsg, Message

__all__ = ["WireArray", "WireRequest", "answer_from_wire", "answer_to_wire", "to_wire"]

_INPUTS: Final = ("q", "k", "v", "alibi_slopes", "learned_sink", "cu_seqlens_q", "cu_seqlens_k")
_UPSTREAM: Final = ("out", "lse", "dout", "dlse")  # what a backward reads beside them
_BITS: Final = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}
_VALUES: Final = ("mask", "sink_tokens", "persistent", "recompute", "deterministic")


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
    return WireArray(array.view(_BITS.get(info.dtype_name, array.dtype)), info.dtype_name)


@dataclass(frozen=True, slots=True, eq=False)
class WireRequest:
    """A message without its arrays, which :meth:`pack` returns beside it.

    Attributes:
        message: its class.
        wanted: what it asks for beside its request.
        request: the class of its request.
        dtype_names: element types of the arrays, by name, in their order.
        max_seqlens: the longest sequences of q and of k and v, where they are packed.
        values: arguments of the request that are neither arrays nor options.
        options: those of AttentionOptions that are numbers or flags.
        out_dtype: type of o of a call with fp8 k and v; None of others.
        single_level: of such a call.
    """

    message: type[Any]
    wanted: dict[str, bool]
    request: type[Any]
    dtype_names: dict[str, str]
    max_seqlens: tuple[int, int] | None
    values: dict[str, Any]
    options: dict[str, Any]
    out_dtype: DType | None
    single_level: bool

    @classmethod
    def pack(cls, message: Message[Any]) -> tuple[WireRequest, list[np.ndarray[Any, Any]]]:
        """Of a message with a request of this package.

        Raises:
            ArrayTypeError: as :func:`to_wire`.
        """
        request = message.request
        known = kind_of(message).forward(request)
        dropout = known.dropout
        infos = {name: getattr(known, name) for name in _INPUTS} | {"rng": None if dropout is None else dropout.rng}
        if known.descales is not None:
            infos |= {name: each and each.array for name, each in zip(DESCALE_SLOTS, known.descales, strict=True)}
        if isinstance(message, FlashAttnMsg.Backward):
            infos |= {name: getattr(request.problem, name) for name in _UPSTREAM}
        found = {name: to_wire(info) for name, info in infos.items() if info is not None}
        wire = cls(
            message=type(message),
            wanted={name: getattr(message, name) for name in ("lse", "dropout_mask") if hasattr(message, name)},
            request=type(request),
            dtype_names={name: array.dtype_name for name, array in found.items()},
            max_seqlens=(known.seqlen_q, known.seqlen_k) if known.is_varlen else None,
            values={name: getattr(request, name) for name in _VALUES if hasattr(request, name)},
            options={
                "softmax_scale": known.softmax_scale,
                "softcap": known.softcap,
                "dropout_p": 0.0 if dropout is None else dropout.p,
                "batch_invariant": known.batch_invariant,
            },
            out_dtype=known.out_dtype,
            single_level=known.single_level,
        )
        return wire, [array.bits for array in found.values()]

    def unpack(self, arrays: tuple[np.ndarray[Any, Any], ...], device: Device) -> Message[Any]:
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
            **{name: found[name] for name in _UPSTREAM if name in found},
            "bias": PositionBias(found.get("alibi_slopes")),
            "options": AttentionOptions(**self.options, learned_sink=found.get("learned_sink"), rng=found.get("rng")),
        }
        if self.out_dtype is not None:
            scales = {name: found.get(name) for name in DESCALE_SLOTS}
            given["fp8"] = Fp8Options(**scales, out_dtype=self.out_dtype, single_level=self.single_level)
        for name, longest in zip(("cu_seqlens_q", "cu_seqlens_k"), self.max_seqlens or (), strict=False):
            given[name] = CumulativeSeqlens(found[name], longest)
        message: Message[Any] = self.message(self.request(found["q"], found["k"], found["v"], **given), **self.wanted)
        return message


def answer_to_wire(message: Message[Any], answer: Any) -> list[WireArray | None]:
    """The arrays of an answer, None for those that it does not have."""
    arrays = [getattr(answer, name) for name in kind_of(message).answered]
    return [None if array is None else to_wire(read_array(array, "answer")) for array in arrays]


def answer_from_wire(message: Message[Any], answer: list[WireArray | None]) -> Any:
    """An answer in the library and on the device of q, or in the caller's own arrays.

    Callers of libraries other than torch get read-only NumPy arrays that lie in the object store.
    """
    kind, request = kind_of(message), message.request
    q = kind.forward(request).q
    arrays = [None if array is None else _like(q, array) for array in answer]
    for i, (name, target) in enumerate(zip(kind.written, kind.targets(request), strict=True)):
        if target is not None:
            arrays[i] = copy_into(target, arrays[i], getattr(request, name))
    return kind.answer(request, *arrays)


def _like(q: ArrayInfo, array: WireArray) -> Any:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(q.source, torch.Tensor):
        return array.numpy()
    if array.dtype_name == "bfloat16":
        return torch.from_numpy(array.bits.view(np.int16).copy()).view(torch.bfloat16).to(q.source.device)
    return torch.from_numpy(array.bits.copy()).to(q.source.device)
