"""ForwardRequest: what every forward request has, whatever its arrays look like."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

from ..dispatch import DispatchKey, best_arch, key_of_problem
from ..problem import ArrayInfo, AttentionProblem
from ..runtime.plan import Key, key_of_request
from ..runtime.staleness import arrays_beside
from ..short_repr import ShortRepr
from ..types import SmArch
from .checks import check_out, read_dropout, read_learned_sink, read_slopes
from .copies import MadeAnew
from .fp8 import with_fp8
from .options import AttentionOptions, Fp8Options, MaskKind, PositionBias, check_kinds

__all__ = ["ForwardRequest"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ForwardRequest(MadeAnew, ShortRepr):
    """Base of the forward requests: they read and check their arrays in ``_lowered``.

    Attributes:
        mask: which keys a query sees.
        bias: ALiBi slopes, or none.
        sink_tokens: first keys that stay visible when a window has passed them.
        options: scale, softcap, learned sink, dropout.
        fp8: descales and the type of o, of calls whose k and v are fp8; None for factors of 1.
        out: shaped like q, with v's head dim, to be written; None for a new array of q's library.
        problem: the request in its normal form (made, not given).
        out_array: the description of ``out`` (made, not given).
        plan_key: what its plan is found by; None on the CPU (made, not given).
    """

    mask: MaskKind = field(default=MaskKind.full(), kw_only=True)
    bias: PositionBias = field(default=PositionBias.none(), kw_only=True)
    sink_tokens: int = field(default=0, kw_only=True)
    options: AttentionOptions = field(default=AttentionOptions(), kw_only=True)
    fp8: Fp8Options | None = field(default=None, kw_only=True)
    out: Any = field(default=None, kw_only=True)
    problem: AttentionProblem = field(init=False, repr=False)
    out_array: ArrayInfo | None = field(init=False, repr=False)
    plan_key: Key | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        problem = with_fp8(self._lowered(), self.fp8)
        object.__setattr__(self, "problem", problem)
        new = None if problem.cache is None else problem.cache.new
        inputs = (problem.q, problem.k, problem.v, *(() if new is None else (new.k, new.v)))
        out = check_out(self.out, problem.out_shape, inputs, others=arrays_beside(problem), dtype=problem.out_dtype)
        object.__setattr__(self, "out_array", out)
        object.__setattr__(self, "plan_key", key_of_request(self))

    @abstractmethod
    def _lowered(self) -> AttentionProblem:
        """The request in its normal form, checked."""

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key of this request on ``arch``; None is the best one for the device of q."""
        return key_of_problem(self.problem, arch or best_arch(self.problem.q.device), self.out_array)

    def _options_for(self, q: ArrayInfo, batch: int, *, on_cache: bool = False) -> dict[str, Any]:
        """The fields of a problem that say what is computed, checked for ``batch`` sequences of queries; ``on_cache``: of a KV cache."""
        check_kinds(self.mask, self.bias, self.options)
        heads, head_dim = q.shape[-2:]
        return {
            "batch": batch,
            "heads": heads,
            "head_dim": head_dim,
            "softmax_scale": self.options.scale_for(head_dim),
            "band": self.mask.band(self.sink_tokens),
            "softcap": float(self.options.softcap),
            "alibi_slopes": read_slopes(self.bias, q, batch=batch, heads=heads, on_cache=on_cache),
            "learned_sink": read_learned_sink(self.options, q, heads=heads, on_cache=on_cache),
            "dropout": read_dropout(self.options, q),
            "batch_invariant": self.options.batch_invariant,
        }
