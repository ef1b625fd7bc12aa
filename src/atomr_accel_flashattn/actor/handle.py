"""FlashAttnHandle: what callers of one actor hold."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ..errors import ActorStoppedError
from .client import Client
from .engine import Engine, stopped_error
from .messages import Message
from .props import FlashAttnProps
from .reply import Reply, Ticket

if TYPE_CHECKING:
    import pykka

__all__ = ["FlashAttnHandle"]


class FlashAttnHandle(Client):
    """The way to one actor. Made by :meth:`FlashAttnActor.start`."""

    def __init__(self, props: FlashAttnProps, engine: Engine, reference: pykka.ActorRef[Any], finished: threading.Event) -> None:
        super().__init__(props, engine.mailbox, engine.launch_at_once)
        self._engine = engine
        self._reference = reference
        self._finished = finished

    def _close(self, *, drain: bool) -> None:
        if drain:
            self._mailbox.close(self._stopped)
        else:
            self._engine.refuse(self._stopped)
        self._reference.stop(block=False)

    def _end(self, timeout: float | None) -> None:
        if not self._finished.wait(timeout):
            self._engine.give_up(self._stopped)
        self._deadlines.close()

    def _stopped(self) -> ActorStoppedError:
        return stopped_error(self.props.label)

    def _accept(self, message: Message[Any]) -> Ticket:
        return Ticket(self._engine.inner.accept(message), Reply(self._engine.in_flight))

    def _is_own_thread(self) -> bool:
        return super()._is_own_thread() or self._engine.is_own_thread()

    def __repr__(self) -> str:
        state = "alive" if self.is_alive else "stopped"
        return f"FlashAttnHandle({self.props.label!r}, {self.props.place}, {state}, {self.unanswered} unanswered)"
