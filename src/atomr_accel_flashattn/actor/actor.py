"""FlashAttnActor: the Pykka actor. It has its engine work; nothing raised there ends it."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, ClassVar, Final

import pykka

from ..errors import DeviceMismatchError, PropsError
from .engine import Engine, stopped_error
from .handle import FlashAttnHandle
from .inner import FlashAttnInner
from .props import FlashAttnProps

__all__ = ["FlashAttnActor"]

_log = logging.getLogger(__name__)
_handles: weakref.WeakSet[FlashAttnHandle] = weakref.WeakSet()
_WORK: Final = object()  # tickets lie in the mailbox: Pykka keeps its last message until the next


class FlashAttnActor(pykka.ThreadingActor):
    """One mailbox for one device and one stream. :meth:`start` returns the handle to talk to it.

    Its thread is a daemon: a script that forgets to stop it ends all the same, and what waits
        fails.
    """

    use_daemon_thread: ClassVar[bool] = True

    def __init__(self, props: FlashAttnProps, inner: FlashAttnInner, born: Callable[[FlashAttnActor], None]) -> None:
        super().__init__()
        born(self)
        self.engine = Engine(props, inner, self._wake, lambda: self.actor_ref.stop(block=False))
        self.finished = threading.Event()
        self._label = props.label

    @classmethod
    def start(cls, props: FlashAttnProps | None = None, inner: FlashAttnInner | None = None) -> FlashAttnHandle:  # type: ignore[override]
        """Start an actor.

        Args:
            props: its properties; None is one for the first GPU, or for the CPU where there is
                none.
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
        made: list[FlashAttnActor] = []  # Pykka hands out references only
        reference = super().start(props, inner, made.append)
        (actor,) = made
        handle = FlashAttnHandle(props, actor.engine, reference, actor.finished)
        _handles.add(handle)
        return handle

    @staticmethod
    def _create_actor_inbox() -> Any:
        """A queue in C: 0.1 us a message where the default one, in Python, takes 3."""
        return SimpleQueue()

    def _wake(self) -> None:
        try:
            self.actor_ref.tell(_WORK)
        except pykka.ActorDeadError as error:
            raise stopped_error(self._label) from error

    def on_start(self) -> None:
        """Prepare the thread."""
        self.engine.enter_thread()

    def on_receive(self, message: Any) -> None:
        """Work. Other objects come from a broadcast over Pykka's registry, and are left alone."""
        if message is _WORK:
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
    place = props.place
    return FlashAttnInner.reference() if place.kind == "cpu" else FlashAttnInner.gpu(place.index, stream=props.stream)


@atexit.register
def _stop_all() -> None:
    """No thread of ours may call CUDA while the interpreter goes down."""
    for handle in [each for each in _handles if not each._is_in_fork()]:  # noqa: SLF001 - a forked child has none of their threads
        handle._close(drain=False)  # noqa: SLF001 - a stop starts a thread, which an interpreter that ends may refuse
        handle._end(timeout=1.0)  # noqa: SLF001
