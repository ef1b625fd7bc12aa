"""The operators of torch: schemas, shapes, gradients. :func:`register` is called once torch is there; this module imports torch.

``torch.ops.atomr_accel_flashattn`` has three. ``attention`` is one call, dense or packed; ``attention_backward`` is its gradients;
``draw_seed`` draws the (seed, offset) of a dropout and alone has the tag of random operators. So ``attention`` is a function of its
arguments: what recomputes it (activation checkpointing, the partitioner of torch.compile) gets the same dropout for the same ``rng``.
That partitioner is told that equal draws are different ones.

An operator costs 8 to 22 us of host time, so eager calls do not take it. What records operations of torch (torch.compile, make_fx, export,
transforms of torch.func, dispatch modes) does: torch_ops/traced.py. Real kernels and the rules of vmap are loaded by the first call.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from ..arrays.new import empty_torch
from ..arrays.torch_hooks import (
    below_autograd,
    is_kept_by_compilers,
    is_random_to_compilers,
    may_have_tangents,
    once_flops_are_counted,
    one_level,
    tangent_of,
)
from ..errors import ShapeError
from ..limits import not_built

__all__ = ["NAMESPACE", "Operands", "register", "rows_contiguous"]

NAMESPACE: Final = "atomr_accel_flashattn"

_OPERANDS: Final = (
    "Tensor q, Tensor k, Tensor v, Tensor? learned_sink=None, Tensor? alibi_slopes=None, Tensor? rng=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, "
    "Tensor? longest_q=None, Tensor? longest_k=None, float? softmax_scale=None, int window_left=-1, int window_right=-1, "
    "float softcap=0.0, float dropout_p=0.0, int sink_tokens=0, bool deterministic=False"
)
_FORWARD: Final = f"({_OPERANDS}, bool return_pattern=False) -> (Tensor out, Tensor lse, Tensor pattern)"
_BACKWARD: Final = (
    f"(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_OPERANDS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlearned_sink)"
)
_GRADIENTS: Final = 4  # of q, k, v and the learned sink, which are the first operands
_SLOPES: Final = 4  # the place of the slopes among them


class Operands(NamedTuple):
    """The operands of ``attention``, in the order of its schema; those of ``attention_backward`` follow its first four.

    Attributes:
        q: (B, Sq, Hq, D), packed (total_q, Hq, D).
        k: (B, Sk, Hkv, D), packed (total_k, Hkv, D).
        v: (B, Sk, Hkv, Dv), packed (total_k, Hkv, Dv). A last stride of q, k or v that is another than 1 means a copy.
        learned_sink: float32 (Hq,).
        alibi_slopes: float32 (Hq,) or (B, Hq); they get no gradient.
        rng: int64 (2,), what ``draw_seed`` gave; None without dropout.
        cu_seqlens_q: int32 (B + 1,); None for dense arrays.
        cu_seqlens_k: likewise.
        max_seqlen_q: length of the longest sequence of q, or an upper bound.
        max_seqlen_k: likewise.
        longest_q: the same as an integer tensor without dimensions, which is read when the operator runs; None: ``max_seqlen_q`` counts.
        longest_k: likewise.
        softmax_scale: factor on q.k, None is 1 / sqrt(D).
        window_left: keys before the query's position, negative for all.
        window_right: keys after it.
        softcap: 0 is none.
        dropout_p: in [0, 1).
        sink_tokens: first keys that stay visible when the window has passed them.
        deterministic: whether gradients are to be bitwise equal from run to run.
        return_pattern: whether the third result is the dropout pattern, bool (B, Hq, Sq, Sk); else it has no elements.
    """

    q: Any
    k: Any
    v: Any
    learned_sink: Any = None
    alibi_slopes: Any = None
    rng: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    max_seqlen_q: Any = 0
    max_seqlen_k: Any = 0
    longest_q: Any = None
    longest_k: Any = None
    softmax_scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    sink_tokens: int = 0
    deterministic: bool = False
    return_pattern: bool = False


_TENSORS: Final = tuple(name for name in Operands._fields[:12] if not name.startswith("max_"))

_library: Any = None  # operators live as long as this


def register() -> None:
    """Define the operators, once. A torch without what that takes (before 2.4) is left as it is."""
    global _library  # noqa: PLW0603 - there is one dispatcher in a process
    if _library is not None or not hasattr(torch.library, "register_autograd"):
        return
    _library = library = torch.library.Library(NAMESPACE, "DEF")
    library.define("attention" + _FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
    library.define("attention_backward" + _BACKWARD, tags=(torch.Tag.pt2_compliant_tag,))
    library.define("draw_seed(Tensor q) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded))
    for name, shapes in (("attention", _shapes), ("attention_backward", _shapes_of_gradients), ("draw_seed", _shape_of_seed)):
        library.impl(name, _late("kernels", name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=library)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", _late("vmap_rules", name), lib=library)
    is_random_to_compilers(torch.ops.atomr_accel_flashattn.draw_seed)
    is_kept_by_compilers(f"{NAMESPACE}::draw_seed", library)
    once_flops_are_counted(_late("flop_counts", "register"))
    library.impl("attention", _recorded("attention", _Differentiable), "Autograd")
    library.impl("attention_backward", _recorded("attention_backward", _DifferentiatedOnce), "Autograd")


def _late(module: str, name: str) -> Any:
    """The function ``name`` of a module of this folder, which is loaded by its first call: it imports the rest of the library."""
    loaded: list[Any] = []

    def call(*arguments: Any) -> Any:
        if not loaded:
            from importlib import import_module

            loaded.append(getattr(import_module(f".{module}", __package__), name))
        return loaded[0](*arguments)

    return call


def rows_contiguous(x: Any) -> Any:
    """``x``, or where its last stride is another than 1 a row-major copy, as kernels take it."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _shapes(*operands: Any) -> tuple[Any, Any, Any]:
    """What ``attention`` gives, without values: o laid out as calls lay it out, a row-major LSE, a pattern or nothing."""
    call = Operands(*operands)
    q, packed = rows_contiguous(call.q), call.cu_seqlens_q is not None
    rank = 3 if packed else 4
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.ndim != rank:
            layout = "(total, heads, head dim)" if packed else "(batch, length, heads, head dim)"
            raise ShapeError(f"{name}: got shape {tuple(x.shape)} of rank {x.ndim}; allowed is rank {rank}, {layout}")
    heads = q.shape[-2]
    out = empty_torch(q, (*q.shape[:-1], call.v.shape[-1]), q.dtype)
    lse = q.new_empty((heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1]), dtype=torch.float32)
    if not (call.return_pattern and call.dropout_p > 0):
        return out, lse, q.new_empty((0,), dtype=torch.bool)
    lengths = (_length(call.max_seqlen_q, call.longest_q), _length(call.max_seqlen_k, call.longest_k))
    shape = (call.cu_seqlens_q.shape[0] - 1, heads, *lengths) if packed else (q.shape[0], heads, q.shape[1], call.k.shape[1])
    return out, lse, q.new_empty(shape, dtype=torch.bool)


def _length(length: Any, tensor: Any) -> Any:
    return length if tensor is None else torch.library.get_ctx().new_dynamic_size()


def _shapes_of_gradients(_dout: Any, _dlse: Any, _out: Any, _lse: Any, *operands: Any) -> tuple[Any, Any, Any, Any]:
    """What ``attention_backward`` gives, without values; without a sink its gradient has no elements."""
    call = Operands(*operands)
    dq, dk, dv = (empty_torch(x, x.shape, x.dtype) for x in map(rows_contiguous, call[:3]))
    return dq, dk, dv, call.q.new_empty((0 if call.learned_sink is None else call.q.shape[-2],), dtype=torch.float32)


def _shape_of_seed(q: Any) -> Any:
    return q.new_empty((2,), dtype=torch.int64)


class _Differentiable(torch.autograd.Function):  # type: ignore[misc] # torch is Any here
    """``attention`` as autograd and the transforms of torch.func record it."""

    @staticmethod
    def forward(*operands: Any) -> Any:
        """O, LSE and pattern."""
        return _below_autograd("attention", *operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any, Any]) -> None:
        """Keep what the backward reads, and refuse a gradient that it does not give."""
        call = Operands(*inputs)
        if any(ctx.needs_input_grad[_SLOPES:][:1]):
            raise not_built("slopes_gradient", "alibi_slopes requires grad and gradients are enabled")
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*(getattr(call, name) for name in _TENSORS), *output[:2])
        without: dict[str, Any] = dict.fromkeys(_TENSORS)
        ctx.numbers = call._replace(**without)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, _dpattern: Any) -> tuple[Any, ...]:
        """Gradients of the operands: of q, k, v and the learned sink, each where somebody wants it."""
        none = (None,) * len(ctx.needs_input_grad)  # operands at the end that have their defaults are not among the inputs
        wanted = (*ctx.needs_input_grad, False)[:_GRADIENTS]
        if (dout is None and dlse is None) or not any(wanted):
            return none
        *tensors, out, lse = ctx.saved_tensors
        call = ctx.numbers._replace(**dict(zip(_TENSORS, tensors, strict=True)))
        made = torch.ops.atomr_accel_flashattn.attention_backward(dout, dlse, out, lse, *call[:-1])
        gradients = tuple(each if want else None for each, want in zip(made, wanted, strict=True))
        return (*gradients, *none)[: len(none)]


class _DifferentiatedOnce(torch.autograd.Function):  # type: ignore[misc] # as above
    """``attention_backward``: whoever differentiates it is refused."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """dq, dk, dv and dsink."""
        return _below_autograd("attention_backward", *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(_ctx: Any, *_gradients: Any) -> Any:
        """There are no second derivatives."""
        raise not_built("double_backward", "a gradient of this call is differentiated once more")


def _recorded(name: str, function: Any) -> Any:
    """The kernel of an operator for autograd: refuses tangents, and goes through ``function`` where gradients are wanted.

    ``torch.library.register_autograd`` drops tangents, and its operators do not go through torch.func.grad. This one is an operation of
    autograd like those of torch, which transforms record in their own levels.
    """
    apply = super(torch.autograd.Function, function).apply  # not the one that hands on to torch.func, which brought us here

    def call(*arguments: Any) -> Any:
        if may_have_tangents() and any(isinstance(x, torch.Tensor) and tangent_of(x) is not None for x in arguments):
            raise not_built("forward_mode", f"an operand of {name} is a dual tensor")
        if not (torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)):
            return _below_autograd(name, *arguments)
        with one_level():
            return apply(*arguments)

    return call


def _below_autograd(name: str, *arguments: Any) -> Any:
    """What an operator gives below autograd."""
    with below_autograd():
        return getattr(torch.ops.atomr_accel_flashattn, name).default(*arguments)
