"""Arguments of flash-attn in our terms: flags, softcap and window of the functional calls."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np

from ..errors import UnsupportedArgumentError, WindowError
from ..limits import as_integer, as_real, is_integer
from .options import MaskKind

__all__ = ["flag", "mask_of_window", "plain_softcap"]


def flag(value: Any, name: str) -> bool:
    """True or False (of NumPy too, or as 1 and 0); a string would count as True, and a tensor would have to be waited for.

    Raises:
        UnsupportedArgumentError: another value.
    """
    if isinstance(value, (bool, np.bool_)) or (is_integer(value) and value in {0, 1}):
        return bool(value)
    raise UnsupportedArgumentError(f"{name}: got {value!r}; allowed are True and False")


def mask_of_window(window_size: Any, *, causal: bool) -> MaskKind:
    """The mask of ``window_size`` and ``causal``.

    Raises:
        WindowError: no pair of integers.
    """
    pair = window_size.tolist() if hasattr(window_size, "tolist") else window_size  # a tensor is waited for once
    if not isinstance(pair, Sequence) or len(pair) != 2:  # a set has no left one
        raise WindowError(f"window_size: got {window_size!r}; allowed is (left, right), negative for no bound")
    left, right = pair
    return MaskKind.window(left, 0 if causal and as_integer(right) is not None else right)


def plain_softcap(softcap: Any) -> Any:
    """flash-attn takes every cap of 0 or less for none."""
    number = as_real(softcap)
    return 0.0 if number is not None and -inf < number <= 0 else softcap
