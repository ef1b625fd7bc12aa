"""A repr that names arrays instead of printing them: printing one of a GPU waits for it, and fills the screen."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

__all__ = ["ShortRepr"]


class ShortRepr:
    """Base of dataclasses (with ``repr=False``) that hold arrays: those are shown as ``float16[1, 128, 8, 64] on cuda:0``."""

    __slots__ = ()

    def __repr__(self) -> str:
        in_order = sorted(fields(self), key=lambda each: each.kw_only is True)  # type: ignore[arg-type]  # as they are given
        shown = (f"{each.name}={_short(getattr(self, each.name))}" for each in in_order if each.repr)
        return f"{type(self).__qualname__}({', '.join(shown)})"


def _short(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return repr(value)
    device = getattr(value, "device", None)
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}" + ("" if device is None else f" on {device}")
