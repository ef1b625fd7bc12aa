"""DenseFwdRequest: one forward call on dense (B, S, H, D) arrays, checked once, when it is made. Base of the requests of each family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ShapeError
from ..limits import MAX_LENGTH
from ..problem import ArrayInfo, AttentionProblem, Strides
from .checks import check_qkv, read_qkv, steps
from .forward import ForwardRequest

__all__ = ["DenseFwdRequest"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DenseFwdRequest(ForwardRequest):
    """Attention of q over k and v, forward, by the kernel family that calls on the device take. Meaning: docs/semantics.md.

    Arrays of any library that :func:`~atomr_accel_flashattn.arrays.read_array` knows, on one device, last dimension contiguous, other
    strides free. On a GPU float16 or bfloat16 with head dims that are multiples of 8 up to 256; on the CPU float32 and float64 too.
    k and v may be fp8, with fp8 or 16 bits in q and head dims that are multiples of 16.

    Attributes:
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hkv, D); Hq is a multiple of Hkv.
        v: (B, Sk, Hkv, Dv).
        mask, bias, sink_tokens, options, out, problem, out_array, plan_key: as in ForwardRequest.

    Raises:
        ConstructionError: the subclass says which argument is wrong; nothing has been written.
        FeatureNotBuiltError: torch tensors that want gradients.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and out

    q: Any
    k: Any
    v: Any

    def _lowered(self) -> AttentionProblem:
        q, k, v = read_qkv(self.q, self.k, self.v, layout="(batch, length, heads, head dim)")
        check_qkv(q, k, v)
        _check_sizes(q, k, v)
        return AttentionProblem(
            q=q,
            k=k,
            v=v,
            q_strides=Strides(*steps(q)),
            k_strides=Strides(*steps(k)),
            v_strides=Strides(*steps(v)),
            heads_kv=k.shape[2],
            seqlen_q=q.shape[1],
            seqlen_k=k.shape[1],
            v_head_dim=v.shape[3],
            **self._options_for(q, q.shape[0]),
        )


def _check_sizes(q: ArrayInfo, k: ArrayInfo, v: ArrayInfo) -> None:
    for name, info in (("k", k), ("v", v)):
        if info.shape[0] != q.shape[0]:
            raise ShapeError(f"{name}: got batch {info.shape[0]} with {q.shape[0]} in q; allowed are equal batches")
    if v.shape[1] != k.shape[1]:
        raise ShapeError(f"v: got length {v.shape[1]} with {k.shape[1]} in k; allowed are equal lengths of k and v")
    for name, info in (("q", q), ("k", k)):
        if info.shape[1] > MAX_LENGTH:
            raise ShapeError(f"{name}: got length {info.shape[1]}; allowed is at most {MAX_LENGTH} tokens")
