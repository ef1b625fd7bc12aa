"""torch tensors of the fake card. Needs torch; the rest of this package does not."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays.torch_hooks import Hooks, hooks, meet_torch
from atomr_accel_flashattn.torch_ops import first_call
from atomr_accel_flashattn.torch_ops.attention_function import Attention

if TYPE_CHECKING:
    import pytest

__all__ = [
    "FakeCuda",
    "GuardOfFakes",
    "empty_on_current",
    "fake",
    "fresh_hooks",
    "let_autograd_keep_the_card",
    "note_requests",
    "take_for_cuda",
]


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


class GuardOfFakes:
    """torch's guard reads the device where a :class:`FakeCuda` has none."""

    def __init__(self, *tensors: FakeCuda, **dims: Any) -> None:
        self.indices = [tensor.index for tensor in tensors]
        self.guard = torch._C._dynamo.guards.TensorGuards(*tensors, **dims)

    def check(self, *tensors: FakeCuda) -> bool:
        return bool(self.guard.check(*tensors)) and [tensor.index for tensor in tensors] == self.indices


def empty_on_current(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> FakeCuda:
    """Stands in for the hook of that name."""
    return fake(torch.empty_strided(shape, strides, dtype=dtype))


def fresh_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before torch was met; what the test puts there is gone at its end."""
    for each in fields(Hooks):
        monkeypatch.setattr(hooks, each.name, getattr(Hooks(), each.name))


def take_for_cuda(monkeypatch: pytest.MonkeyPatch, stream: int) -> None:
    """Tensors of the fake card count as plain ones on a GPU, whose current stream is ``stream`` plus its index."""
    fresh_hooks(monkeypatch)
    meet_torch()
    monkeypatch.setattr(hooks, "plain_types", frozenset({FakeCuda}))
    monkeypatch.setattr(hooks, "raw_stream", lambda index: stream + index)


def note_requests(monkeypatch: pytest.MonkeyPatch, on: type = object) -> list[str]:
    """Requests that are made from now on, whose q is an ``on``: "forward" and "backward"."""
    made: list[str] = []
    for kind, name in ((fa.DenseFwdRequest, "forward"), (fa.VarlenFwdRequest, "forward"),
                       (fa.DenseBwdRequest, "backward"), (fa.VarlenBwdRequest, "backward")):  # fmt: skip
        check = kind.__post_init__

        def noted(request: Any, check: Any = check, name: str = name) -> None:
            if isinstance(request.q, on):
                made.append(name)
            check(request)

        monkeypatch.setattr(kind, "__post_init__", noted)
    return made


def let_autograd_keep_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd gives gradients, and outputs that it kept, as plain tensors, which are in host memory: they go back to the fake card."""
    forward, backward = Attention.forward, Attention.backward

    class Context:
        """That of a call, whose saved tensors are on the card."""

        def __init__(self, ctx: Any) -> None:
            self.ctx = ctx
            self.saved_tensors = tuple(map(_back, ctx.saved_tensors))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.ctx, name)

    def noted(ctx: Any, call: Any, *inputs: Any) -> Any:
        ctx.on_card = isinstance(inputs[0], FakeCuda)
        return forward(ctx, call, *inputs)

    def on_card(ctx: Any, *gradients: Any) -> Any:
        return backward(Context(ctx), *map(_back, gradients)) if ctx.on_card else backward(ctx, *gradients)

    rows_contiguous = first_call.usual_rows
    monkeypatch.setattr(first_call, "usual_rows", lambda x: _back(rows_contiguous(x)) if isinstance(x, FakeCuda) else rows_contiguous(x))
    monkeypatch.setattr(Attention, "forward", staticmethod(noted))
    monkeypatch.setattr(Attention, "backward", staticmethod(on_card))


def _back(x: Any) -> Any:
    return fake(x) if isinstance(x, torch.Tensor) else x
