"""Markers of element types, and the protocols that requests satisfy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from ..types import DType, SmArch

if TYPE_CHECKING:
    from ..problem import ArrayInfo, AttentionProblem, BackwardProblem, GradientArrays
    from .key import DispatchKey

__all__ = ["F16", "Bf16", "F8E4m3", "F8E5m2", "FaBwdDispatch", "FaFwdDispatch", "FaPagedFwdDispatch", "GemmSupported"]


class F16:
    """Marker of IEEE half precision."""

    dtype: ClassVar[DType] = DType.F16


class Bf16:
    """Marker of bfloat16."""

    dtype: ClassVar[DType] = DType.BF16


class F8E4m3:
    """Marker of the 8-bit format with 4 exponent bits."""

    dtype: ClassVar[DType] = DType.F8E4M3


class F8E5m2:
    """Marker of the 8-bit format with 5 exponent bits."""

    dtype: ClassVar[DType] = DType.F8E5M2


@runtime_checkable
class GemmSupported(Protocol):
    """An element type that tensor cores multiply: the four markers."""

    dtype: ClassVar[DType]


@runtime_checkable
class FaFwdDispatch(Protocol):
    """A forward request: what ``run`` takes."""

    @property
    def problem(self) -> AttentionProblem:
        """The request in its normal form."""
        ...

    @property
    def out_array(self) -> ArrayInfo | None:
        """Where the caller wants o, None for a new array."""
        ...

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key on ``arch``; None is the best one for the device of q."""
        ...


@runtime_checkable
class FaBwdDispatch(Protocol):
    """A backward request: what ``run`` gives the gradients of."""

    @property
    def problem(self) -> BackwardProblem:
        """The request in its normal form; its ``forward`` is the call whose gradients are wanted."""
        ...

    @property
    def gradient_arrays(self) -> GradientArrays:
        """Where the caller wants the gradients of q, k and v, None for new arrays."""
        ...

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key on ``arch``; None is the best one for the device of q."""
        ...


@runtime_checkable
class FaPagedFwdDispatch(FaFwdDispatch, Protocol):
    """A forward request whose K and V lie in pages: its problem has a ``cache`` that is paged."""

    @property
    def block_table(self) -> Any:
        """int32 (B, blocks): the pages of each sequence, as the caller gave them; described in ``problem.cache.blocks``."""
        ...
