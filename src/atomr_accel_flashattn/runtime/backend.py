"""Which backend may run: what ATOMR_FLASHATTN_BACKEND says of arrays on a device."""

from __future__ import annotations

from ..env import settings
from ..errors import DeviceMismatchError
from ..types import Device

__all__ = ["check_backend"]


def check_backend(device: Device) -> None:
    """Raise DeviceMismatchError for arrays that are not where the variable wants them."""
    backend = settings().backend
    if (backend, device.kind) in {("cpu", "cuda"), ("gpu", "cpu")}:
        raise DeviceMismatchError(
            f"q: got an array on {device} with ATOMR_FLASHATTN_BACKEND={backend}; allowed are arrays on the {backend}; "
            "move them, or unset the variable"
        )
