"""What is compared: the calls of this package, and what torch carries (its FlashAttention-2, cuDNN).

A peer that cannot do a cell raises :class:`Refused` with the reason; the row then says so instead of holding a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from .cells import Cell
    from .inputs import Inputs

__all__ = ["UNBOUNDED", "Call", "CudnnPeer", "Ours", "OursBf16", "Peer", "Refused", "TorchFa2", "first_line", "tried"]

Call = Callable[[], "torch.Tensor"]
UNBOUNDED = -1


class Refused(Exception):  # noqa: N818 - no error: the reason why a column is empty
    """The peer does not do this cell; the text says why."""


class Peer(Protocol):
    """One column. ``prepare`` does everything that is not to be timed; the call it returns does the work once."""

    name: str

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """A call that returns o laid out as q is. Raises Refused."""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around every call: nothing, but for peers that have a backend to choose."""
        return contextlib.nullcontext()

    def computed(self, cell: Cell) -> Cell:
        """What the calls that were prepared for a cell really compute: the cell, but for peers that are timed without a feature of it."""
        return cell


def tried(call: Call) -> Call:
    """``call`` after one go, so that another package's refusals, whatever their type, become a reason in its column and do not end the run.

    Raises:
        Refused: the call raised; the text has the type and the first line of what.
    """
    try:
        call()
    except Exception as error:  # another package's errors derive from anything: cuDNN's from Exception, FlashAttention-4's are assertions
        raise Refused(first_line(error)) from error
    return call


def first_line(error: Exception) -> str:
    """``Type: first line of the message``, at most 300 characters."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


class Ours(Peer):
    """This package through its flash-attn compatible calls: what a user pays, allocation included."""

    name = "ours"

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """``flash_attn_func`` or ``flash_attn_varlen_func``."""
        from ..functional import flash_attn_func, flash_attn_varlen_func

        window = (UNBOUNDED, UNBOUNDED) if cell.window is None else (cell.window - 1, 0)
        q, k, v, offsets, longest = inputs.q, inputs.k, inputs.v, inputs.offsets, inputs.max_length
        options: dict[str, Any] = {"causal": cell.causal, "window_size": window, "softcap": cell.softcap}
        options |= {"alibi_slopes": inputs.slopes, "sink_tokens": cell.sink_tokens}
        if cell.packed:
            return lambda: flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, **options)
        return lambda: flash_attn_func(q, k, v, **options)


class OursBf16(Ours):
    """This package in bf16 on the numbers of an fp8 cell: its column says what fp8 gains, and where it does not pay."""

    name = "ours_bf16"

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Cells of fp8."""
        if not cell.dtype.is_fp8:
            raise Refused("it stands beside cells of fp8")
        import torch

        q, k, v = (x.to(torch.bfloat16) for x in (inputs.q, inputs.k, inputs.v))
        return Ours.prepare(self, cell, replace(inputs, q=q, k=k, v=v))


class _Sdpa(Peer):
    """torch.nn.functional.scaled_dot_product_attention held to one backend."""

    name = ""
    backend = ""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Hold SDPA to the backend."""
        from torch.nn import attention

        held: contextlib.AbstractContextManager[Any] = attention.sdpa_kernel([getattr(attention.SDPBackend, self.backend)])
        return held

    def sdpa(self, cell: Cell, inputs: Inputs) -> Call:
        """The dense call; torch wants (B, H, S, D), which is a view. A causal mask is aligned to the first key."""
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        causal, gqa = cell.causal, cell.heads != cell.heads_kv
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa).transpose(1, 2)


class CudnnPeer(_Sdpa):
    """cuDNN's attention through SDPA."""

    name = "cudnn"
    backend = "CUDNN_ATTENTION"

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Dense, full or causal, GQA."""
        if cell.dtype.is_fp8:
            raise Refused("SDPA has no fp8")
        if cell.packed or cell.window is not None or cell.features:
            raise Refused("SDPA has no packed sequences, window, ALiBi, softcap or sink tokens")
        if cell.length_k is not None and cell.causal:
            raise Refused("SDPA aligns a causal mask to the first key, not to the last")
        return self.sdpa(cell, inputs)


class TorchFa2(_Sdpa):
    """The FlashAttention-2 that torch carries: SDPA for dense cells, ``varlen_attn`` for packed ones, else its operator.

    The operator has no softcap and no sink tokens, nor has a torch that was built without ALiBi the bias: such cells are timed without, the
    same products and less other work, a bar that is a little too high.
    """

    name = "fa2"
    backend = "FLASH_ATTENTION"

    def __init__(self) -> None:
        self._has_alibi = False

    def computed(self, cell: Cell) -> Cell:
        """Without softcap and sink tokens; without ALiBi where this torch was found not to take slopes when the cell was prepared."""
        return replace(cell, alibi=cell.alibi and self._has_alibi, softcap=0.0, sink_tokens=0)

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Every cell but those of fp8."""
        if cell.dtype.is_fp8:
            raise Refused("the FlashAttention-2 of torch has no fp8")
        if cell.packed:
            return self._varlen(cell, inputs)
        if cell.window is not None or cell.length_k is not None:
            return self._operator(cell, inputs)
        return self._alibi(cell, inputs) if cell.alibi else self.sdpa(cell, inputs)

    def _alibi(self, cell: Cell, inputs: Inputs) -> Call:
        call = self._operator(cell, inputs)
        try:
            call()
        except (RuntimeError, NotImplementedError):
            self._has_alibi = False
            return self.sdpa(cell, inputs)
        self._has_alibi = True
        return call

    @staticmethod
    def _varlen(cell: Cell, inputs: Inputs) -> Call:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise Refused("this torch has no varlen_attn") from error
        q, k, v, offsets, longest = inputs.q, inputs.k, inputs.v, inputs.offsets, inputs.max_length
        window = (UNBOUNDED, 0) if cell.causal else (UNBOUNDED, UNBOUNDED)
        attend: Any = varlen_attn
        return lambda: attend(q, k, v, offsets, offsets, longest, longest, window_size=window)

    @staticmethod
    def _operator(cell: Cell, inputs: Inputs) -> Call:
        import torch

        # SDPA passes neither a window nor slopes on, and aligns a causal mask to the first key
        operator: Any = torch.ops.aten._flash_attention_forward  # noqa: SLF001
        q, k, v, causal = inputs.q, inputs.k, inputs.v, cell.causal and cell.window is None
        s, keys = max(cell.lengths), max(cell.keys)
        options: dict[str, Any] = {}
        if cell.window is not None:
            options |= {"window_size_left": cell.window - 1, "window_size_right": 0}
        if inputs.slopes is not None:
            options["alibi_slopes"] = inputs.slopes
        return lambda: operator(q, k, v, None, None, s, keys, 0.0, causal, False, **options)[0]
