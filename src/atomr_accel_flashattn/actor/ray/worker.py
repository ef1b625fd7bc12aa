"""The part of the pool that runs in a Ray worker: one process, one device, one FlashAttnActor."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from ...types import Device
from ..actor import FlashAttnActor
from ..props import FlashAttnProps
from .wire import WireArray, WireRequest, answer_to_wire

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Worker"]


class Worker:
    """Becomes a Ray actor. Its calls run side by side in an event loop: launches can overlap."""

    def __init__(self, label: str, device: Device, max_in_flight: int) -> None:
        place = device if device.kind == "cpu" else Device("cuda", 0)  # Ray shows a worker its GPU
        self._handle = FlashAttnActor.start(FlashAttnProps(label=label, device=place, max_in_flight=max_in_flight))

    async def ready(self) -> int:
        """The process, once the worker is up."""
        return os.getpid()

    async def run(self, wire: WireRequest, *arrays: np.ndarray[Any, Any]) -> list[WireArray | None] | Exception:
        """Answer one request. An error is returned, not raised, so that Ray does not wrap it."""
        try:
            message = await asyncio.to_thread(wire.unpack, arrays, self._handle.props.place)
            answer = await self._handle.ask_async(message)
            return await asyncio.to_thread(answer_to_wire, message, answer)
        except Exception as error:  # noqa: BLE001 - the request's answer
            return error
