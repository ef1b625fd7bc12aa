"""FlashAttnMsg: what can be sent to an actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import FeatureNotBuiltError
from ..limits import not_built

__all__ = ["FlashAttnMsg", "Message", "refusal"]


class FlashAttnMsg:
    """The messages of an actor: each carries one request, and each is answered once."""

    @dataclass(frozen=True, slots=True, eq=False)
    class Forward:
        """A forward call, answered with an Output.

        Attributes:
            request: a Fa2FwdRequest, a VarlenFwdRequest, or anything that satisfies FaFwdDispatch.
            lse: whether the log-sum-exp is wanted.
            dropout_mask: whether the dropout pattern is wanted.
        """

        request: Any
        lse: bool = True
        dropout_mask: bool = False

    @dataclass(frozen=True, slots=True, eq=False)
    class Backward:
        """The gradients of a forward call. Not built yet: answered with FeatureNotBuiltError."""

        request: Any

    @dataclass(frozen=True, slots=True, eq=False)
    class PagedForward:
        """A forward call on a paged KV cache. Not built yet: answered with FeatureNotBuiltError."""

        request: Any


Message: TypeAlias = FlashAttnMsg.Forward | FlashAttnMsg.Backward | FlashAttnMsg.PagedForward


def refusal(message: Message) -> FeatureNotBuiltError | None:
    """Why this version does not do what a message asks; None when it does."""
    if isinstance(message, FlashAttnMsg.Backward):
        return not_built("backward", "FlashAttnMsg.Backward")
    if isinstance(message, FlashAttnMsg.PagedForward):
        return not_built("paged", "FlashAttnMsg.PagedForward")
    return None
