"""Peers beside those that every torch carries in its SDPA: FlexAttention, FlashAttention-3 and -4, cuDNN's own graph interface.

What is not installed is left out of a run that names no peers; asked for by name, it stays as a column that says what to install.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .cells import FEATURES
from .cudnn_frontend import CudnnFrontend
from .peers import UNBOUNDED, Call, OursBf16, Peer, Refused, first_line, tried

if TYPE_CHECKING:
    import torch

    from .cells import Cell
    from .inputs import Inputs

__all__ = ["Absent", "FlashAttnPackage", "FlexPeer", "XformersFa3", "importable_peers", "named_peers"]

_FA3: Final = "flash_attn_interface"
_FA4: Final = "flash_attn.cute"
_INSTALL: Final = {
    "fa3": f"no module {_FA3}, and no xformers with flash_attn_3; build the folder hopper of FlashAttention, or pip install xformers",
    "fa4": f"no module {_FA4}; pip install flash-attn-4",
    "cudnn_fe": "no module cudnn; pip install nvidia-cudnn-frontend",
}


class FlashAttnPackage(Peer):
    """What offers ``flash_attn_func`` and ``flash_attn_varlen_func`` as the FlashAttention authors' newer packages do.

    Args:
        name: of the column.
        load: imports it; called once per cell and input set.
    """

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name = name
        self._load = load

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Every cell but ALiBi and sink tokens (FA4's ``learnable_sink`` is a number in the denominator, which has no key)."""
        missing = [feature for feature in cell.features if feature != FEATURES["softcap"]]
        if missing:
            raise Refused(f"{self.name} has no {' or '.join(missing)}")
        try:
            package = self._load()
        except Exception as error:  # a library that was built for another torch or CUDA fails in its own way
            raise Refused(f"does not import: {first_line(error)}") from error
        options: dict[str, Any] = {"causal": cell.causal}
        if cell.window is not None:
            options["window_size"] = (cell.window - 1, 0)
        if cell.softcap:
            options["softcap"] = cell.softcap
        q, k, v, offsets, longest = inputs.q, inputs.k, inputs.v, inputs.offsets, inputs.max_length
        if cell.packed:
            lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
            return tried(lambda: _first(package.flash_attn_varlen_func(q, k, v, **lengths, **options)))
        return tried(lambda: _first(package.flash_attn_func(q, k, v, **options)))


def _first(result: Any) -> torch.Tensor:
    """Without the LSE, which some versions return beside o."""
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


class XformersFa3:
    """The FlashAttention-3 inside xformers, which registers the authors' operator, under the names of their Python interface.

    Raises:
        ImportError, OSError: xformers, or the library for this torch, is not there.
    """

    def __init__(self) -> None:
        importlib.import_module("xformers.flash_attn_3._C")
        import torch

        self._forward: Any = torch.ops.flash_attn_3.fwd.default

    def flash_attn_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Dense: q (B, S, H, D), k and v (B, S, Hkv, D) -> o (B, S, H, D)."""
        return self._call(q, k, v, is_causal=causal, window=window_size, softcap=softcap)

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
        softcap: float = 0.0,
        **lengths: Any,
    ) -> torch.Tensor:
        """Packed: q (total, H, D), k and v (total, Hkv, D) -> o (total, H, D); ``lengths``: cu_seqlens_q and _k, max_seqlen_q and _k."""
        return self._call(q, k, v, is_causal=causal, window=window_size, softcap=softcap, **lengths)

    def _call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: tuple[int, int], **options: Any) -> torch.Tensor:
        """One split, as the authors' interface asks for; the operator's own default is a heuristic for decoding."""
        left, right = window
        scale = q.shape[-1] ** -0.5
        out: torch.Tensor = self._forward(
            q, k, v, softmax_scale=scale, window_size_left=left, window_size_right=right, num_splits=1, **options
        )[0]
        return out


class FlexPeer(Peer):
    """torch's FlexAttention, compiled for the cell (seconds each, and so only when it is asked for by name)."""

    name = "flex"

    def __init__(self) -> None:
        self._cell: Cell | None = None
        self._attend: Any = None
        self._options: dict[str, Any] = {}

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Dense cells: band masks and sink tokens as a block mask, softcap and ALiBi as a score_mod."""
        if cell.packed:
            raise Refused("packed sequences are not timed with FlexAttention")
        if cell != self._cell:
            self._compile(cell, inputs)
        attend, options = self._attend, self._options
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        return tried(lambda: attend(q, k, v, **options).transpose(1, 2))

    def _compile(self, cell: Cell, inputs: Inputs) -> None:
        """One program per cell. torch has to forget the last: after a handful of one function it no longer compiles."""
        import torch
        from torch.nn.attention import flex_attention as flex

        torch.compiler.reset()
        self._attend = torch.compile(flex.flex_attention, dynamic=False)
        visible, score = _flex_functions(cell, inputs.slopes)
        sizes, bounded = (max(cell.lengths), max(cell.keys)), cell.causal or cell.window is not None
        mask = flex.create_block_mask(visible, None, None, *sizes, device=inputs.q.device) if bounded else None
        self._options = {"block_mask": mask, "enable_gqa": cell.heads != cell.heads_kv}
        if cell.softcap or cell.alibi:
            self._options["score_mod"] = score
        self._cell = cell


def _flex_functions(cell: Cell, slopes: torch.Tensor | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The ``mask_mod`` of a dense cell with a bound, and its ``score_mod``."""
    import torch

    window, sinks, cap = cell.window, cell.sink_tokens, cell.softcap
    offset = max(cell.keys) - max(cell.lengths)  # queries are aligned to the last key

    def visible(_batch: Any, _head: Any, i: Any, j: Any) -> Any:
        seen = j <= i + offset
        return seen if window is None else seen & ((i + offset - j < window) | (j < sinks))

    def score(s: Any, _batch: Any, head: Any, i: Any, j: Any) -> Any:
        s = cap * torch.tanh(s / cap) if cap else s
        return s if slopes is None else s - slopes[head] * (i + offset - j).abs()

    return visible, score


class Absent(Peer):
    """A peer that was asked for by name and is not installed: it refuses every cell and says what to install."""

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """Always Refused."""
        del cell, inputs
        raise Refused(f"not installed: {_INSTALL[self.name]}")


def importable_peers() -> list[Peer]:
    """The packages that are installed here, without importing them: FlashAttention-3 and -4, cuDNN's frontend."""
    return [peer for peer in _packages() if not isinstance(peer, Absent)]


def named_peers() -> list[Peer]:
    """All that can be asked for by name: the packages, those that are missing as :class:`Absent`, FlexAttention, ours in bf16."""
    return [*_packages(), FlexPeer(), OursBf16()]


def _packages() -> list[Peer]:
    fa3: Peer = Absent("fa3")
    if _is_there(_FA3):
        fa3 = FlashAttnPackage("fa3", lambda: importlib.import_module(_FA3))
    elif _xformers_has_fa3():
        fa3 = FlashAttnPackage("fa3", XformersFa3)
    fa4 = FlashAttnPackage("fa4", lambda: importlib.import_module(_FA4)) if _is_there(_FA4) else Absent("fa4")
    return [fa3, fa4, CudnnFrontend() if _is_there("cudnn") else Absent("cudnn_fe")]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _xformers_has_fa3() -> bool:
    """Look for the library's file: finding a submodule's spec would import xformers, which takes seconds."""
    spec = find_spec("xformers")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any(any(Path(folder, "flash_attn_3").glob("_C*.so")) for folder in folders)
