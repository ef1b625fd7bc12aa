"""torch tensors of the fake card. Needs torch; the rest of this package does not."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from atomr_accel_flashattn.arrays.torch_hooks import Hooks, hooks
from atomr_accel_flashattn.torch_ops.attention_function import _Asked

if TYPE_CHECKING:
    import pytest

__all__ = ["FakeCuda", "fake", "fresh_hooks", "let_autograd_keep_the_card"]


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


def let_autograd_keep_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd gives gradients, and outputs that it kept, as plain tensors, which are in host memory: they go back to the fake card."""
    make = _Asked.backward

    def on_card(asked: _Asked, saved: dict[str, Any], *gradients: Any) -> Any:
        if not isinstance(saved["q"], FakeCuda):
            return make(asked, saved, *gradients)
        return make(asked, {name: _back(x) for name, x in saved.items()}, *map(_back, gradients))

    monkeypatch.setattr(_Asked, "backward", on_card)


def _back(x: Any) -> Any:
    return fake(x) if isinstance(x, torch.Tensor) else x
