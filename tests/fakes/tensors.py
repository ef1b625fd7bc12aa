"""torch tensors of the fake card. Needs torch; the rest of this package does not."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from atomr_accel_flashattn.arrays.torch_hooks import Hooks, hooks

if TYPE_CHECKING:
    import pytest

__all__ = ["FakeCuda", "fake", "fresh_hooks"]


class FakeCuda(torch.Tensor):
    """Host memory that says it is on ``cuda:0`` (or on the device in ``index``)."""

    index = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:
        return True

    def get_device(self) -> int:
        return self.index


def fake(tensor: torch.Tensor) -> FakeCuda:
    """The same memory, on the fake card."""
    return tensor.as_subclass(FakeCuda)


def fresh_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before torch was met; what the test puts there is gone at its end."""
    for each in fields(Hooks):
        monkeypatch.setattr(hooks, each.name, getattr(Hooks(), each.name))
