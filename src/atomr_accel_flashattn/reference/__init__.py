"""The CPU backend: the same problems and the same semantics as the kernels, in NumPy (docs/semantics.md)."""

from __future__ import annotations

from .attention import forward

__all__ = ["forward"]
