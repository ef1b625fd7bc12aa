"""FlashAttnProps: what an actor is started with, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..errors import PropsError
from ..launch.driver import device_count
from ..limits import is_integer
from ..types import Device

__all__ = ["FlashAttnProps", "Overflow"]


class Overflow(Enum):
    """What happens to a request that finds the mailbox full."""

    WAIT = "wait"  # back-pressure: the caller waits for a place
    REFUSE = "refuse"  # the caller gets a MailboxFullError at once


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashAttnProps:
    """Properties of one actor: one mailbox for one device and one stream.

    Attributes:
        label: names its threads, its log lines and its errors.
        device: ``"cuda:1"``, ``"cuda"``, ``"cpu"`` or a Device; None is ``cuda:0``, or the CPU
            where there is no GPU.
        stream: the CUDA stream to launch on (a raw handle, or a stream of torch, CuPy or
            cuda.core); None is a stream of its own.
        max_in_flight: launches that may be unfinished at a time, 1..1000 (CUDA queues about 1024).
        mailbox_limit: requests that may wait to be launched, at least 1.
        overflow: what happens to one more; each call may choose for itself.

    Raises:
        PropsError: a value that is not allowed.
    """

    label: str = "flash-attn"
    device: Device | str | None = None
    stream: Any = None
    max_in_flight: int = 8
    mailbox_limit: int = 1024
    overflow: Overflow = Overflow.WAIT

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", _read_device(self.device))
        for name, most in (("max_in_flight", 1000), ("mailbox_limit", 2**31)):
            value = getattr(self, name)
            if not is_integer(value) or not 1 <= value <= most:
                raise PropsError(f"{name}: got {value!r}; allowed is an integer in 1..{most}")
        if not isinstance(self.label, str):
            raise PropsError(f"label: got {self.label!r}; allowed is a string")
        if not isinstance(self.overflow, Overflow):
            raise PropsError(f"overflow: got {self.overflow!r}; allowed are Overflow.WAIT and Overflow.REFUSE")
        if self.stream is not None and self.place.kind == "cpu":
            raise PropsError(f"stream: got {self.stream!r} with device cpu, which has no streams; allowed is None")

    @property
    def place(self) -> Device:
        """``device`` as a Device."""
        assert isinstance(self.device, Device)  # noqa: S101 - __post_init__ sets it
        return self.device


def _read_device(device: Any) -> Device:
    if device is None:
        return Device("cuda", 0) if device_count() else Device("cpu", 0)
    if isinstance(device, Device):
        return device
    kind, _, index = str(device).partition(":")
    if kind == "cpu" and index in {"", "0"}:
        return Device("cpu", 0)
    if kind == "cuda" and (not index or index.isdecimal()):
        return Device("cuda", int(index or 0))
    raise PropsError(f"device: got {device!r}; allowed are 'cpu', 'cuda', 'cuda:<ordinal>', a Device and None")
