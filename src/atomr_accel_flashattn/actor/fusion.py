"""Several small decodes as one packed launch.

Fused are dense requests of a few queries over little K and V that agree in everything but their lengths, and that bring neither ``out``
(a later one could read what an earlier one writes) nor dropout (its pattern depends on the batch index). K and V are copied side by side,
so more than a little of them would cost more than a launch saves. On the CPU backend the answers are equal bit for bit, because every
sequence is computed alone; on a GPU the packed kernel is another kernel than the dense one, and answers agree within the tolerance of
docs/semantics.md.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Final

import numpy as np

from ..dispatch import DispatchKey, best_arch, key_of_problem
from ..fa2 import Fa2FwdRequest
from ..kernels.spec import Family
from ..problem import ArrayInfo
from ..requests.dense import DenseFwdRequest
from ..runtime.execute import fill, make_outputs
from ..runtime.plan import Outputs
from ..types import SmArch
from ..varlen import CumulativeSeqlens, VarlenFwdRequest
from .messages import FlashAttnMsg, Message

__all__ = ["MAX_FUSED", "fuse_key", "launch_fused"]

MAX_FUSED: Final = 64
_MAX_QUERIES: Final = 8
_MAX_KV_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _PackedFa2(VarlenFwdRequest):
    """Packed requests that asked for the mma.sync family, and get it."""

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        return key_of_problem(self.problem, arch or best_arch(self.problem.q.device), self.out_array, Family.FA2)


# What can be fused, and into what.
_PACKED: Final[dict[type, type[VarlenFwdRequest]]] = {DenseFwdRequest: VarlenFwdRequest, Fa2FwdRequest: _PackedFa2}


def fuse_key(message: Message) -> Hashable | None:
    """Equal keys may be fused; None: not this one."""
    if not isinstance(message, FlashAttnMsg.Forward) or type(message.request) not in _PACKED or message.dropout_mask:
        return None
    request: DenseFwdRequest = message.request
    problem = request.problem
    arrays = (problem.q, problem.k, problem.v)
    if request.out_array is not None or problem.dropout is not None or not 1 <= problem.seqlen_q <= _MAX_QUERIES or problem.batch == 0:
        return None
    if problem.alibi_slopes is not None and len(problem.alibi_slopes.shape) == 2:
        return None
    if sum(prod(array.shape) * (array.dtype.itemsize if array.dtype else 1) for array in arrays[1:]) > _MAX_KV_BYTES:
        return None
    library = _library(arrays)
    if library is None:
        return None
    per_head = [None if array is None else array.ptr for array in (problem.alibi_slopes, problem.learned_sink)]
    shape = (problem.heads, problem.heads_kv, problem.head_dim, problem.v_head_dim, problem.q.dtype_name, problem.q.device)
    return (type(request), library, *shape, problem.softmax_scale, problem.softcap, problem.band, *per_head, message.lse)


def _library(arrays: Sequence[ArrayInfo]) -> str | None:
    torch = sys.modules.get("torch")
    if all(type(array.source) is np.ndarray for array in arrays):
        return "numpy"
    if torch is not None and all(isinstance(array.source, torch.Tensor) for array in arrays):
        return "torch"
    return None


def launch_fused(calls: Sequence[tuple[Message, Outputs]], *, stream: int | None) -> object:
    """Do all calls, whose fuse keys are equal, as one packed one.

    Args:
        calls: messages, and where their answers go.
        stream: raw CUDA stream; None on the CPU.

    Returns:
        what has to live until the device is done.
    """
    requests: list[DenseFwdRequest] = [message.request for message, _ in calls]
    with _quiet(requests[0].problem.q, stream):
        packed = _pack(requests)
        outputs = make_outputs(packed, lse=calls[0][1].lse is not None)
        fill(packed, outputs, stream=stream)
        _unpack(outputs, [outputs for _, outputs in calls])
    return packed, outputs


@contextlib.contextmanager
def _quiet(q: ArrayInfo, stream: int | None) -> Any:
    """Torch without gradients, on the actor's stream."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(q.source, torch.Tensor):
        yield
        return
    on = contextlib.nullcontext() if stream is None else torch.cuda.stream(torch.cuda.ExternalStream(stream, device=q.device.index))
    with torch.no_grad(), on:
        yield


def _pack(requests: Sequence[DenseFwdRequest]) -> VarlenFwdRequest:
    first = requests[0]
    q, k, v = (_rows([getattr(request, name) for request in requests]) for name in "qkv")
    problems = [request.problem for request in requests]
    lengths = [[length for p in problems for length in [getattr(p, side)] * p.batch] for side in ("seqlen_q", "seqlen_k")]
    seqlens_q, seqlens_k = _seqlens(lengths, q)
    return _PACKED[type(first)](
        q,
        k,
        v,
        cu_seqlens_q=seqlens_q,
        cu_seqlens_k=seqlens_k,
        mask=first.mask,
        bias=first.bias,
        sink_tokens=first.sink_tokens,
        options=first.options,
    )


def _seqlens(lengths: Sequence[list[int]], like: Any) -> list[CumulativeSeqlens]:
    """Offsets in the library and on the device of ``like``; on a GPU by one copy that nobody waits for."""
    if isinstance(like, np.ndarray) or not like.is_cuda:
        return [CumulativeSeqlens.from_lengths(each, like=like) for each in lengths]
    offsets = np.zeros((len(lengths), len(lengths[0]) + 1), np.int32)
    np.cumsum(lengths, axis=1, out=offsets[:, 1:])
    there = sys.modules["torch"].from_numpy(offsets).pin_memory().to(like.device, non_blocking=True)
    return [CumulativeSeqlens(row, max(each)) for row, each in zip(there.unbind(0), lengths, strict=True)]


def _rows(arrays: Sequence[Any]) -> Any:
    """(B, S, H, D) each -> (sum of B S, H, D), a copy."""
    flat = [array if len(array) == 1 else array.reshape(1, -1, *array.shape[2:]) for array in arrays]
    return np.concatenate(flat, 1)[0] if isinstance(flat[0], np.ndarray) else sys.modules["torch"].cat(flat, 1)[0]


def _unpack(packed: Outputs, outputs: Sequence[Outputs]) -> None:
    """Copy each call's part of the packed answer to where the caller expects it."""
    shapes = [each.out.shape[:3] for each in outputs]
    sizes = [batch * length for batch, length, _ in shapes]
    parts = _split(packed.out.source[None], sizes, 1)  # (1, B S, H, Dv) each
    _copy(
        [
            (each.out.source, part if len(part) == each.out.shape[0] else part.reshape(each.out.shape))
            for each, part in zip(outputs, parts, strict=True)
        ]
    )
    if packed.lse is None:
        return
    pairs = []
    for each, part, (batch, length, heads) in zip(outputs, _split(packed.lse.source[None], sizes, 2), shapes, strict=True):
        assert each.lse is not None  # noqa: S101 - calls with equal keys all want it
        pairs.append((each.lse.source, part if batch == 1 else part.reshape(heads, batch, length).swapaxes(0, 1)))
    _copy(pairs)


def _split(array: Any, sizes: list[int], axis: int) -> Sequence[Any]:
    return np.split(array, np.cumsum(sizes)[:-1], axis) if isinstance(array, np.ndarray) else array.split(sizes, axis)


def _copy(pairs: Sequence[tuple[Any, Any]]) -> None:
    if isinstance(pairs[0][0], np.ndarray):
        for target, part in pairs:
            target[...] = part
        return
    targets, parts = zip(*pairs, strict=True)
    sys.modules["torch"]._foreach_copy_(targets, parts)
