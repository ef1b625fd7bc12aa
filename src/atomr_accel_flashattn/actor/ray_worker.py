"""The part of the pool that runs in a Ray worker: one process, one device, one FlashAttnActor."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arrays.read import read_array
from ..types import Device
from .actor import FlashAttnActor
from .parcel import Bits, Parcel, to_bits
from .props import FlashAttnProps

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Worker", "start_of"]


@dataclass(frozen=True, slots=True)
class _Start:
    """Properties without what cannot travel."""

    label: str
    device: Device
    max_in_flight: int
    fuse_decodes: bool


class Worker:
    """Becomes a Ray actor. Its calls run side by side in one event loop, so that up to ``max_in_flight`` launches are unfinished."""

    def __init__(self, start: _Start) -> None:
        device = start.device if start.device.kind == "cpu" else Device("cuda", 0)  # Ray shows a worker the one GPU that it may use
        props = FlashAttnProps(label=start.label, device=device, max_in_flight=start.max_in_flight, fuse_decodes=start.fuse_decodes)
        self._handle = FlashAttnActor.start(props)

    async def ready(self) -> int:
        """The process, once the worker is up."""
        return os.getpid()

    async def forward(self, parcel: Parcel, *arrays: np.ndarray[Any, Any]) -> list[Bits | None] | Exception:
        """Answer one request; what went wrong with it is returned, not raised, so that Ray does not wrap it."""
        try:
            message = await asyncio.to_thread(parcel.unpack, arrays, self._handle.props.place)
            output = await self._handle.ask_async(message)
            return await asyncio.to_thread(_bits, (output.out, output.lse, output.dropout_mask))
        except Exception as error:  # noqa: BLE001 - the request's answer
            return error


def start_of(props: FlashAttnProps, number: int) -> _Start:
    """What worker ``number`` is started with."""
    return _Start(f"{props.label}-{number}", props.place, props.max_in_flight, props.fuse_decodes)


def _bits(arrays: tuple[Any, ...]) -> list[Bits | None]:
    return [None if array is None else to_bits(read_array(array, "answer")) for array in arrays]
