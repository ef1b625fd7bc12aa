"""Peers that are no part of every torch installation's SDPA: FlexAttention, and the packages of FlashAttention-3 and -4 where they are."""

from __future__ import annotations

import contextlib
import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from .peers import Call, Peer, Refused

if TYPE_CHECKING:
    import torch

    from .cells import Cell
    from .inputs import Inputs

__all__ = ["FlashAttnPackage", "FlexPeer", "importable_peers"]

# Names of columns, and the modules that the packages install.
_PACKAGES: Final = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


class FlashAttnPackage:
    """A package with ``flash_attn_func`` and ``flash_attn_varlen_func`` of the FlashAttention authors."""

    def __init__(self, name: str, module: str) -> None:
        self.name = name
        self._module = module

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to choose."""
        return contextlib.nullcontext()

    def adds_alibi(self, cell: Cell) -> bool:
        """Never: these two have no ALiBi."""
        del cell
        return False

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Every cell but ALiBi."""
        if cell.alibi:
            raise Refused(f"{self._module} has no ALiBi")
        package = importlib.import_module(self._module)
        options: dict[str, Any] = {"causal": cell.causal}
        if cell.window is not None:
            options["window_size"] = (cell.window - 1, 0)
        q, k, v, offsets, longest = inputs.q, inputs.k, inputs.v, inputs.offsets, inputs.max_length
        if cell.packed:
            lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
            return lambda: _first(package.flash_attn_varlen_func(q, k, v, **lengths, **options))
        return lambda: _first(package.flash_attn_func(q, k, v, **options))


def _first(result: Any) -> torch.Tensor:
    """Without the LSE, which some versions return beside o."""
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


class FlexPeer:
    """torch's FlexAttention, compiled for the cell (seconds each, and so only when it is asked for by name)."""

    name = "flex"

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to choose."""
        return contextlib.nullcontext()

    def adds_alibi(self, cell: Cell) -> bool:
        """Whenever the cell has it, as a score_mod."""
        return cell.alibi

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Dense cells: band masks as a block mask, ALiBi as a score_mod."""
        if cell.packed:
            raise Refused("packed sequences are not timed with FlexAttention")
        import torch
        from torch.nn.attention import flex_attention as flex

        slopes, window, length = inputs.slopes, cell.window, inputs.max_length

        def visible(_batch: Any, _head: Any, i: Any, j: Any) -> Any:
            seen = j <= i
            return seen if window is None else seen & (i - j < window)

        def bias(score: Any, _batch: Any, head: Any, i: Any, j: Any) -> Any:
            return score if slopes is None else score - slopes[head] * (i - j).abs()

        bounded = cell.causal or window is not None
        mask = flex.create_block_mask(visible, None, None, length, length, device=inputs.q.device) if bounded else None
        attend: Any = torch.compile(flex.flex_attention)
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        options: dict[str, Any] = {"block_mask": mask, "enable_gqa": cell.heads != cell.heads_kv}
        if slopes is not None:
            options["score_mod"] = bias
        return lambda: attend(q, k, v, **options).transpose(1, 2)


def importable_peers() -> list[Peer]:
    """The packages that are installed here."""
    return [FlashAttnPackage(name, module) for name, module in _PACKAGES.items() if _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
