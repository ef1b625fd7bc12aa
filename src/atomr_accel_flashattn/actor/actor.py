"""FlashAttnActor: the Pykka actor. It lets its engine work when it is called, and nothing that happens there reaches it."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, ClassVar, Final

import pykka

from ..errors import DeviceMismatchError, PropsError
from ..types import Device
from .engine import Engine, stopped_error
from .handle import FlashAttnHandle
from .inner import FlashAttnInner
from .locks import Event
from .mailbox import Mailbox
from .props import FlashAttnProps

__all__ = ["FlashAttnActor"]

_log = logging.getLogger(__name__)
_handles: weakref.WeakSet[FlashAttnHandle] = weakref.WeakSet()


class _Call:
    """What the engine sends to its actor: there is work. Tickets lie in the mailbox, as Pykka keeps the last message until the next."""


_CALL: Final = _Call()


class FlashAttnActor(pykka.ThreadingActor):
    """One mailbox for one device and one stream. Start one with :meth:`start`, talk to it through the handle that this returns.

    Its thread is a daemon: a script that forgets to stop it ends all the same, and what waits then fails.
    """

    use_daemon_thread: ClassVar[bool] = True

    def __init__(self, props: FlashAttnProps, inner: FlashAttnInner, born: Callable[[FlashAttnActor], None]) -> None:
        super().__init__()
        born(self)
        self.mailbox = Mailbox(props.label, props.mailbox_limit, self._call_engine)
        self.engine = Engine(props, inner, self.mailbox, self._call, self._stop_softly)
        self.finished = Event()
        self._label = props.label

    @classmethod
    def start(cls, props: FlashAttnProps | None = None, inner: FlashAttnInner | None = None) -> FlashAttnHandle:  # type: ignore[override]
        """Start an actor.

        Args:
            props: its properties; None is one for the first GPU, or for the CPU where there is none.
            inner: who does the work; None is the GPU or the CPU backend, as the device says.

        Returns:
            the handle. Stop the actor with it, or use it in a ``with`` block.

        Raises:
            PropsError: ``props`` is no FlashAttnProps.
            DeviceMismatchError: ``inner`` works on another device than ``props`` name.
            NoDriverError, DriverTooOldError, LaunchError: the GPU cannot be used.
        """
        props = FlashAttnProps() if props is None else props
        if not isinstance(props, FlashAttnProps):
            raise PropsError(f"props: got {type(props).__qualname__}; allowed is a FlashAttnProps")
        inner = _inner_for(props) if inner is None else inner
        if inner.device != props.place:
            raise DeviceMismatchError(f"inner: got one for {inner.device} with device {props.place} in props; allowed is the same device")
        made: list[FlashAttnActor] = []  # Pykka hands out references only; mailbox and engine are thread-safe, and for the handle too
        reference = super().start(props, inner, made.append)
        (actor,) = made
        handle = FlashAttnHandle(props, inner, reference, actor.mailbox, actor.engine, actor.finished)
        _handles.add(handle)
        return handle

    @staticmethod
    def _create_actor_inbox() -> Any:
        """A queue in C: 0.1 us a message where the default one, in Python, takes 3."""
        return SimpleQueue()

    def _call_engine(self) -> None:
        self.engine.call()

    def _call(self) -> None:
        try:
            self.actor_ref.tell(_CALL)
        except pykka.ActorDeadError as error:
            raise stopped_error(self._label) from error

    def _stop_softly(self) -> None:
        self.actor_ref.stop(block=False)

    def on_start(self) -> None:
        """Prepare the thread; where that fails, every request fails with the reason."""
        self.engine.enter_thread()

    def on_receive(self, message: Any) -> None:
        """Work. Other objects come past the handle, from a broadcast over Pykka's registry, and are left alone."""
        if message is _CALL:
            self.engine.work()
        else:
            _log.warning("%s: ignored a %s, which did not come through the handle", self._label, type(message).__qualname__)

    def on_stop(self) -> None:
        """Answer everything, whoever asked for the stop."""
        try:
            self.engine.shut_down()
        finally:
            self.finished.set()

    def on_failure(self, *_: object) -> None:
        """Pykka calls this instead of on_stop when a message raised, which none should."""
        self.on_stop()


def _inner_for(props: FlashAttnProps) -> FlashAttnInner:
    device: Device = props.place
    return FlashAttnInner.reference() if device.kind == "cpu" else FlashAttnInner.gpu(device.index, stream=props.stream)


@atexit.register
def _stop_all() -> None:
    """No thread of ours may call CUDA while the interpreter goes down."""
    for handle in list(_handles):
        handle._close(drain=False)  # noqa: SLF001 - a stop starts a thread, which an interpreter that ends may refuse
        handle._end(timeout=1.0)  # noqa: SLF001
