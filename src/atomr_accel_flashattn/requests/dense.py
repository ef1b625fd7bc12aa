"""DenseFwdRequest: one forward call on dense (B, S, H, D) arrays, checked once, when it is made. Base of the requests of each family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..dispatch import DispatchKey, best_arch, key_of_problem
from ..errors import ShapeError
from ..limits import MAX_LENGTH
from ..problem import ArrayInfo, AttentionProblem, Strides
from ..runtime.plan import Key, key_of_request
from ..short_repr import ShortRepr
from ..types import SmArch
from .checks import check_out, check_qkv, read_dropout, read_learned_sink, read_qkv, read_slopes, steps
from .copies import MadeAnew
from .options import AttentionOptions, MaskKind, PositionBias, check_kinds

__all__ = ["DenseFwdRequest"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DenseFwdRequest(MadeAnew, ShortRepr):
    """Attention of q over k and v, forward, by the kernel family that calls on the device take. Meaning: docs/semantics.md.

    Arrays of any library that :func:`~atomr_accel_flashattn.arrays.read_array` knows, on one device, last dimension contiguous, other
    strides free. On a GPU float16 or bfloat16 with head dims that are multiples of 8 up to 256; on the CPU float32 and float64 too.

    Attributes:
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hkv, D); Hq is a multiple of Hkv.
        v: (B, Sk, Hkv, Dv).
        mask: which keys a query sees.
        bias: ALiBi slopes, or none.
        sink_tokens: first keys that stay visible when a window has passed them.
        options: scale, softcap, learned sink, dropout.
        out: (B, Sq, Hq, Dv) to be written, None for a new array of q's library.
        problem: the request in its normal form (made, not given).
        out_array: the description of ``out`` (made, not given).
        plan_key: what its plan is found by; None on the CPU (made, not given).

    Raises:
        ConstructionError: the subclass says which argument is wrong; nothing has been written.
        FeatureNotBuiltError: fp8, or torch tensors that want gradients.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()  # what its plan depends on beside problem and out

    q: Any
    k: Any
    v: Any
    mask: MaskKind = field(default=MaskKind.full(), kw_only=True)
    bias: PositionBias = field(default=PositionBias.none(), kw_only=True)
    sink_tokens: int = field(default=0, kw_only=True)
    options: AttentionOptions = field(default=AttentionOptions(), kw_only=True)
    out: Any = field(default=None, kw_only=True)
    problem: AttentionProblem = field(init=False, repr=False)
    out_array: ArrayInfo | None = field(init=False, repr=False)
    plan_key: Key | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        q, k, v = read_qkv(self.q, self.k, self.v, layout="(batch, length, heads, head dim)")
        check_qkv(q, k, v)
        check_kinds(self.mask, self.bias, self.options)
        _check_sizes(q, k, v)
        batch, seqlen_q, heads, head_dim = q.shape
        problem = AttentionProblem(
            q=q,
            k=k,
            v=v,
            q_strides=Strides(*steps(q)),
            k_strides=Strides(*steps(k)),
            v_strides=Strides(*steps(v)),
            batch=batch,
            heads=heads,
            heads_kv=k.shape[2],
            seqlen_q=seqlen_q,
            seqlen_k=k.shape[1],
            head_dim=head_dim,
            v_head_dim=v.shape[3],
            softmax_scale=self.options.scale_for(head_dim),
            band=self.mask.band(self.sink_tokens),
            softcap=float(self.options.softcap),
            alibi_slopes=read_slopes(self.bias, q, batch=batch, heads=heads),
            learned_sink=read_learned_sink(self.options, q, heads=heads),
            dropout=read_dropout(self.options, q),
        )
        object.__setattr__(self, "problem", problem)
        object.__setattr__(self, "out_array", check_out(self.out, problem.out_shape, (q, k, v)))
        object.__setattr__(self, "plan_key", key_of_request(self))

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key of this request on ``arch``; None is the best one for the device of q."""
        return key_of_problem(self.problem, arch or best_arch(self.problem.q.device), self.out_array)


def _check_sizes(q: ArrayInfo, k: ArrayInfo, v: ArrayInfo) -> None:
    for name, info in (("k", k), ("v", v)):
        if info.shape[0] != q.shape[0]:
            raise ShapeError(f"{name}: got batch {info.shape[0]} with {q.shape[0]} in q; allowed are equal batches")
    if v.shape[1] != k.shape[1]:
        raise ShapeError(f"v: got length {v.shape[1]} with {k.shape[1]} in k; allowed are equal lengths of k and v")
    for name, info in (("q", q), ("k", k)):
        if info.shape[1] > MAX_LENGTH:
            raise ShapeError(f"{name}: got length {info.shape[1]}; allowed is at most {MAX_LENGTH} tokens")
