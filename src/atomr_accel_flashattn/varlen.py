"""Packed sequences of different lengths: CumulativeSeqlens says where each begins.

VarlenFwdRequest is one forward call on them, VarlenBwdRequest the gradients of one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .arrays.device_array import DeviceArray
from .arrays.read import read_array
from .arrays.streams import copy_to_host
from .dispatch import DispatchKey, best_arch, key_of_backward, key_of_problem
from .env import settings
from .errors import ArrayTypeError, CuSeqlensError, DeviceMismatchError, DTypeError, ShapeError
from .limits import MAX_LENGTH, as_integer
from .problem import ArrayInfo, AttentionProblem, BackwardProblem, GradientArrays, Strides
from .requests.backward import check_backward, check_before_forward
from .requests.checks import check_out, check_qkv, is_contiguous, read_dropout, read_learned_sink, read_qkv, read_slopes, steps
from .requests.copies import MadeAnew
from .requests.dense import DenseFwdRequest
from .requests.options import AttentionOptions, MaskKind, PositionBias, check_kinds
from .runtime.plan import Key, key_of_request
from .runtime.staleness import check_array
from .short_repr import ShortRepr
from .types import SmArch

__all__ = ["CumulativeSeqlens", "VarlenBwdRequest", "VarlenFwdRequest", "forward_request"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CumulativeSeqlens(MadeAnew, ShortRepr):
    """Where each of B packed sequences begins: sequence b is rows ``offsets[b]`` to ``offsets[b + 1]``.

    Values in host memory are checked here. Values on a GPU are checked only with ATOMR_FLASHATTN_DEBUG set, because reading them waits
    for the GPU.

    Attributes:
        offsets: int32 (B + 1,), starting at 0, never decreasing, ending at or before the number of rows.
        max_seqlen: length of the longest sequence (an upper bound will do); may be None for offsets in host memory. An array without
            dimensions is taken for its value; one on a GPU is waited for.
        array: the description of ``offsets`` (made, not given).

    Raises:
        CuSeqlensError: wrong rank, size, start, order, or a ``max_seqlen`` that a sequence exceeds.
        DTypeError: not int32.
    """

    offsets: Any
    max_seqlen: int | None = None
    array: ArrayInfo = field(init=False, repr=False)
    name: str = field(default="cu_seqlens", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        info = read_array(self.offsets, self.name)
        if info.dtype_name != "int32":
            raise DTypeError(f"{self.name}: got type {info.dtype_name}; allowed is int32; call .int() or .astype('int32')")
        if len(info.shape) != 1 or info.shape[0] < 1 or not is_contiguous(info):
            raise CuSeqlensError(
                f"{self.name}: got shape {info.shape} and strides {info.strides}; allowed is a contiguous array of shape (batch + 1,)"
            )
        object.__setattr__(self, "array", info)
        object.__setattr__(self, "max_seqlen", self._checked_max(self._longest()))

    def _longest(self) -> int | None:
        """The longest length after a look at the values; None when they stay unseen on a GPU."""
        if self.array.device.kind != "cpu" and not settings().debug:
            return None
        values = copy_to_host(self.array).astype(np.int64)
        if values[0] != 0:
            raise CuSeqlensError(f"{self.name}: got {values[0]} as its first value; allowed is 0")
        lengths = np.diff(values)
        if (lengths < 0).any():
            at = int(np.argmax(lengths < 0))
            raise CuSeqlensError(
                f"{self.name}: got {values[at]} followed by {values[at + 1]} at index {at}; allowed are values that never decrease"
            )
        return int(lengths.max(initial=0))

    def _checked_max(self, longest: int | None) -> int:
        given: Any = self.max_seqlen
        if given is None and longest is not None:
            return longest
        most = as_integer(given)
        if most is None or not 0 <= most <= MAX_LENGTH:
            raise CuSeqlensError(
                f"max_seqlen of {self.name}: got {given!r}; allowed is an integer in 0..{MAX_LENGTH} (None only for offsets in host memory)"
            )
        if longest is not None and longest > most:
            raise CuSeqlensError(
                f"max_seqlen of {self.name}: got {most}, and a sequence has {longest} rows; allowed is at least the longest length; "
                "check that the offsets are right"
            )
        return most

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | np.ndarray[Any, Any], *, like: Any = None) -> CumulativeSeqlens:
        """Offsets of sequences with the given lengths, in the library and on the device of ``like`` (None: NumPy).

        Raises:
            CuSeqlensError: a negative or non-integer length, or a total beyond int32.
            ArrayTypeError: a library that we cannot make arrays with.
        """
        try:
            values = np.asarray(lengths)
        except (ValueError, TypeError) as error:  # ragged, or memory of a GPU
            raise CuSeqlensError(f"lengths: got {lengths!r}; allowed is a flat sequence of integers >= 0 in host memory") from error
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu") or (values < 0).any():
            raise CuSeqlensError(f"lengths: got {lengths!r}; allowed is a flat sequence of integers >= 0")
        offsets = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise CuSeqlensError(
                f"lengths: got a total of {offsets[-1]} rows; allowed is at most {np.iinfo(np.int32).max}, because offsets are int32"
            )
        return cls(_offsets_like(offsets.astype(np.int32), like), int(values.max(initial=0)))

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.array.shape[0] - 1

    @property
    def longest(self) -> int:
        """``max_seqlen``, which is always known once this object exists."""
        assert self.max_seqlen is not None  # noqa: S101 - __post_init__ sets it
        return self.max_seqlen

    def check_total(self, rows: int) -> None:
        """The last offset is at most the number of rows; looked at only where the values may be read."""
        if self.array.device.kind != "cpu" and not settings().debug:
            return
        last = int(copy_to_host(self.array)[-1])
        if last > rows:
            raise CuSeqlensError(
                f"{self.name}: got {last} as its last value with {rows} rows in the packed array; allowed is at most the number of rows"
            )


def _offsets_like(offsets: np.ndarray[Any, Any], like: Any) -> Any:
    if like is None or isinstance(like, np.ndarray):
        return offsets
    info = read_array(like, "like")
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.from_numpy(offsets).to(like.device)
    if isinstance(like, DeviceArray):
        return DeviceArray.from_numpy(offsets, info.device.index)
    if cupy is not None and isinstance(like, cupy.ndarray):
        with cupy.cuda.Device(info.device.index):
            return cupy.asarray(offsets)
    raise ArrayTypeError(f"like: got {type(like).__qualname__}; allowed are torch tensors, NumPy and CuPy arrays, DeviceArray and None")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class VarlenFwdRequest(MadeAnew, ShortRepr):
    """Attention over packed sequences, forward; each query sees keys of its own sequence only. Meaning: docs/semantics.md.

    Rows of q past the last sequence get o = 0 and an LSE of -inf; those of k and v are not read.

    Attributes:
        q: (total_q, Hq, D).
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: where the sequences of q begin.
        cu_seqlens_k: where those of k and v begin, None is as q.
        mask, bias, sink_tokens, options: as in Fa2FwdRequest; slopes may be (B, Hq).
        out: (total_q, Hq, Dv) to be written, None for a new array of q's library.
        problem: the request in its normal form (made, not given).
        out_array: the description of ``out`` (made, not given).
        plan_key: what its plan is found by; None on the CPU (made, not given).

    Raises:
        ConstructionError: the subclass says which argument is wrong; nothing has been written.
        FeatureNotBuiltError: fp8, or torch tensors that want gradients.
        StaleArrayError: offsets that were freed, resized or given other data since their CumulativeSeqlens was made.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and out

    q: Any
    k: Any
    v: Any
    cu_seqlens_q: CumulativeSeqlens = field(kw_only=True)
    cu_seqlens_k: CumulativeSeqlens | None = field(default=None, kw_only=True)
    mask: MaskKind = field(default=MaskKind.full(), kw_only=True)
    bias: PositionBias = field(default=PositionBias.none(), kw_only=True)
    sink_tokens: int = field(default=0, kw_only=True)
    options: AttentionOptions = field(default=AttentionOptions(), kw_only=True)
    out: Any = field(default=None, kw_only=True)
    problem: AttentionProblem = field(init=False, repr=False)
    out_array: ArrayInfo | None = field(init=False, repr=False)
    plan_key: Key | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        q, k, v = read_qkv(self.q, self.k, self.v, layout="(total, heads, head dim)")
        check_qkv(q, k, v)
        check_kinds(self.mask, self.bias, self.options)
        if v.shape[0] != k.shape[0]:
            raise ShapeError(f"v: got {v.shape[0]} rows with {k.shape[0]} in k; allowed are equal numbers of rows of k and v")
        seqlens_q = self.cu_seqlens_q
        seqlens_k = seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k
        _check_seqlens(q, k, seqlens_q, seqlens_k)
        batch, heads, head_dim = seqlens_q.batch, q.shape[1], q.shape[2]
        problem = AttentionProblem(
            q=q,
            k=k,
            v=v,
            q_strides=Strides(0, *steps(q)),
            k_strides=Strides(0, *steps(k)),
            v_strides=Strides(0, *steps(v)),
            batch=batch,
            heads=heads,
            heads_kv=k.shape[1],
            seqlen_q=seqlens_q.longest,
            seqlen_k=seqlens_k.longest,
            head_dim=head_dim,
            v_head_dim=v.shape[2],
            softmax_scale=self.options.scale_for(head_dim),
            band=self.mask.band(self.sink_tokens),
            softcap=float(self.options.softcap),
            alibi_slopes=read_slopes(self.bias, q, batch=batch, heads=heads),
            learned_sink=read_learned_sink(self.options, q, heads=heads),
            cu_seqlens_q=seqlens_q.array,
            cu_seqlens_k=seqlens_k.array,
            dropout=read_dropout(self.options, q),
        )
        object.__setattr__(self, "problem", problem)
        object.__setattr__(self, "out_array", check_out(self.out, problem.out_shape, (q, k, v)))
        object.__setattr__(self, "plan_key", key_of_request(self))

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key of this request on ``arch``; None is the best one for the device of q."""
        return key_of_problem(self.problem, arch or best_arch(self.problem.q.device), self.out_array)


def _check_seqlens(q: ArrayInfo, k: ArrayInfo, seqlens_q: CumulativeSeqlens, seqlens_k: CumulativeSeqlens) -> None:
    for name, seqlens, array in (("cu_seqlens_q", seqlens_q, q), ("cu_seqlens_k", seqlens_k, k)):
        if not isinstance(seqlens, CumulativeSeqlens):
            raise ArrayTypeError(
                f"{name}: got {type(seqlens).__qualname__}; allowed is a CumulativeSeqlens; "
                "make one with CumulativeSeqlens(offsets, max_seqlen)"
            )
        if seqlens.array.device != q.device:
            raise DeviceMismatchError(
                f"{name}: got an array on {seqlens.array.device} with q on {q.device}; allowed is one device for all arrays; move {name}"
            )
        check_array(seqlens.array, name)
        seqlens.check_total(array.shape[0])
    if seqlens_q.batch == 0 and q.shape[0]:
        raise CuSeqlensError(f"cu_seqlens_q: got no sequences with {q.shape[0]} rows in q; allowed is one sequence at least")
    if seqlens_k.batch != seqlens_q.batch:
        raise CuSeqlensError(
            f"cu_seqlens_k: got {seqlens_k.batch} sequences with {seqlens_q.batch} in cu_seqlens_q; allowed are equal numbers of sequences"
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class VarlenBwdRequest(MadeAnew, ShortRepr):
    """Gradients of attention over packed sequences. Meaning: docs/semantics.md, Gradients.

    Rows that no sequence owns are not read, and their gradients are 0.

    Attributes:
        q: (total_q, Hq, D).
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        out: (total_q, Hq, Dv), o of the forward call.
        dout: (total_q, Hq, Dv), gradient of o; None is zero, with a ``dlse``.
        lse: float32 (Hq, total_q), row-major, LSE of the forward call.
        dlse: float32 (Hq, total_q), row-major, gradient of the LSE; None is zero.
        cu_seqlens_q: where the sequences of q begin.
        cu_seqlens_k: where those of k and v begin, None is as q.
        mask, bias, sink_tokens, options, recompute, deterministic: as in Fa2BwdRequest.
        dq, dk, dv: arrays like q, k and v to be written, None for new ones.
        problem: the request in its normal form (made, not given).
        gradient_arrays: the descriptions of dq, dk and dv (made, not given).
        plan_key: what its plan is found by; None on the CPU (made, not given).

    Raises:
        ConstructionError: the subclass says which argument is wrong; nothing has been written.
        FeatureNotBuiltError: fp8, torch tensors that want second derivatives, or forward-mode ones.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and gradient_arrays

    q: Any
    k: Any
    v: Any
    out: Any = None
    dout: Any = None
    lse: Any = None
    dlse: Any = field(default=None, kw_only=True)
    cu_seqlens_q: CumulativeSeqlens = field(kw_only=True)
    cu_seqlens_k: CumulativeSeqlens | None = field(default=None, kw_only=True)
    mask: MaskKind = field(default=MaskKind.full(), kw_only=True)
    bias: PositionBias = field(default=PositionBias.none(), kw_only=True)
    sink_tokens: int = field(default=0, kw_only=True)
    options: AttentionOptions = field(default=AttentionOptions(), kw_only=True)
    recompute: bool = field(default=False, kw_only=True)
    deterministic: bool = field(default=False, kw_only=True)
    dq: Any = field(default=None, kw_only=True)
    dk: Any = field(default=None, kw_only=True)
    dv: Any = field(default=None, kw_only=True)
    problem: BackwardProblem = field(init=False, repr=False)
    gradient_arrays: GradientArrays = field(init=False, repr=False)
    plan_key: Key | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_before_forward(self)
        forward = VarlenFwdRequest(
            self.q,
            self.k,
            self.v,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            mask=self.mask,
            bias=self.bias,
            sink_tokens=self.sink_tokens,
            options=self.options,
        )
        check_backward(self, forward.problem)

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key of this request on ``arch``; None is the best one for the device of q."""
        return key_of_backward(self.problem, self.gradient_arrays, arch or best_arch(self.problem.forward.q.device))


def forward_request(arrays: tuple[Any, ...], packing: tuple[Any, Any, Any, Any] | None, **asked: Any) -> DenseFwdRequest | VarlenFwdRequest:
    """The forward request of a functional call.

    Args:
        arrays: q, k and v.
        packing: offsets of q and of k, and their longest lengths; None for dense arrays.
        asked: what the request is told besides, by name.

    Raises:
        ConstructionError: as the request says.
    """
    if packing is None:
        return DenseFwdRequest(*arrays, **asked)
    seqlens_q = CumulativeSeqlens(packing[0], packing[2], name="cu_seqlens_q")
    seqlens_k = CumulativeSeqlens(packing[1], packing[3], name="cu_seqlens_k")
    return VarlenFwdRequest(*arrays, cu_seqlens_q=seqlens_q, cu_seqlens_k=seqlens_k, **asked)
