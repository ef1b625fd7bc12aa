"""Packed sequences of different lengths: CumulativeSeqlens says where each begins.

VarlenFwdRequest is one forward call on them, VarlenBwdRequest the gradients of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import ShapeError
from .problem import AttentionProblem, Strides
from .requests.backward import BackwardRequest
from .requests.checks import check_qkv, read_qkv, steps
from .requests.dense import DenseFwdRequest
from .requests.forward import ForwardRequest
from .requests.seqlens import CumulativeSeqlens, check_batches, check_seqlens

__all__ = ["CumulativeSeqlens", "VarlenBwdRequest", "VarlenFwdRequest", "forward_request"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class VarlenFwdRequest(ForwardRequest):
    """Attention over packed sequences, forward; each query sees keys of its own sequence only. Meaning: docs/semantics.md.

    Rows of q past the last sequence get o = 0 and an LSE of -inf; those of k and v are not read.

    Attributes:
        q: (total_q, Hq, D).
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: where the sequences of q begin.
        cu_seqlens_k: where those of k and v begin, None is as q.
        mask, bias, sink_tokens, options, fp8, out, problem, out_array, plan_key: as in ForwardRequest.

    Raises:
        ConstructionError: the subclass says which argument is wrong; nothing has been written.
        FeatureNotBuiltError: torch tensors that want gradients.
        StaleArrayError: offsets that were freed, resized or given other data since their CumulativeSeqlens was made.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and out

    q: Any
    k: Any
    v: Any
    cu_seqlens_q: CumulativeSeqlens = field(kw_only=True)
    cu_seqlens_k: CumulativeSeqlens | None = field(default=None, kw_only=True)

    def _lowered(self) -> AttentionProblem:
        q, k, v = read_qkv(self.q, self.k, self.v, layout="(total, heads, head dim)")
        check_qkv(q, k, v)
        if v.shape[0] != k.shape[0]:
            raise ShapeError(f"v: got {v.shape[0]} rows with {k.shape[0]} in k; allowed are equal numbers of rows of k and v")
        seqlens_q = self.cu_seqlens_q
        seqlens_k = seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k
        check_seqlens(seqlens_q, "cu_seqlens_q", q, q)
        check_seqlens(seqlens_k, "cu_seqlens_k", q, k)
        check_batches(q, seqlens_q, seqlens_k)
        return AttentionProblem(
            q=q,
            k=k,
            v=v,
            q_strides=Strides(0, *steps(q)),
            k_strides=Strides(0, *steps(k)),
            v_strides=Strides(0, *steps(v)),
            heads_kv=k.shape[1],
            seqlen_q=seqlens_q.longest,
            seqlen_k=seqlens_k.longest,
            v_head_dim=v.shape[2],
            cu_seqlens_q=seqlens_q.array,
            cu_seqlens_k=seqlens_k.array,
            **self._options_for(q, seqlens_q.batch),
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class VarlenBwdRequest(BackwardRequest):
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

    cu_seqlens_q: CumulativeSeqlens = field(kw_only=True)
    cu_seqlens_k: CumulativeSeqlens | None = field(default=None, kw_only=True)

    def _forward(self) -> ForwardRequest:
        return VarlenFwdRequest(
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
