"""One actor per GPU, on many GPUs and machines, through Ray. See docs/actor.md."""

from __future__ import annotations

from .pool import FlashAttnPool

__all__ = ["FlashAttnPool"]
