"""FlashAttnMsg: what can be sent to an actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..requests.arguments import flag
from ..runtime.gradients import Gradients
from ..runtime.plan import Output

__all__ = ["Answer", "FlashAttnMsg", "Message"]

Answer = TypeVar("Answer", bound=Output | Gradients)
"""What a message is answered with."""


class Message(Generic[Answer]):
    """What can be sent, and what it is answered with: one of FlashAttnMsg.

    Attributes:
        request: what is asked.
    """

    __slots__ = ()

    request: Any


class FlashAttnMsg:
    """The messages of an actor: each carries one request, and each is answered once."""

    @dataclass(frozen=True, slots=True, eq=False)
    class Forward(Message[Output]):
        """A forward call, answered with an Output.

        Attributes:
            request: an Fa2FwdRequest, a VarlenFwdRequest, a ChunkedPrefillRequest, or anything that
                satisfies FaFwdDispatch.
            lse: whether the log-sum-exp is wanted.
            dropout_mask: whether the dropout pattern is wanted.

        Raises:
            UnsupportedArgumentError: ``lse`` or ``dropout_mask`` that is neither True nor False.
        """

        request: Any
        lse: bool = True
        dropout_mask: bool = False

        def __post_init__(self) -> None:
            flag(self.lse, "lse")
            flag(self.dropout_mask, "dropout_mask")

    @dataclass(frozen=True, slots=True, eq=False)
    class Backward(Message[Gradients]):
        """A backward call, answered with Gradients.

        Attributes:
            request: an Fa2BwdRequest, a VarlenBwdRequest, or anything that satisfies FaBwdDispatch.
        """

        request: Any

    @dataclass(frozen=True, slots=True, eq=False)
    class PagedForward(Message[Output]):
        """A forward call on a paged KV cache, answered with an Output.

        Attributes:
            request: a PagedAttentionRequest, or anything that satisfies FaPagedFwdDispatch.
            lse: whether the log-sum-exp is wanted.

        Raises:
            UnsupportedArgumentError: ``lse`` that is neither True nor False.
        """

        request: Any
        lse: bool = True

        def __post_init__(self) -> None:
            flag(self.lse, "lse")
