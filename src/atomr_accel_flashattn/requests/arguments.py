"""Arguments of flash-attn in the terms of requests. The eager functional calls and the traced ones (torch_ops/traced.py) read them here.

torch.compile traces these functions, so they look at numbers and flags, and at no memory of an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np

from ..errors import UnsupportedArgumentError, WindowError
from ..limits import HEAD_DIM_STEP, MAX_HEAD_DIM, as_integer, as_real, is_integer
from .options import MaskKind

__all__ = ["flag", "mask_of", "needs_padding", "plain_length", "softcap_of", "step_up"]


def plain_length(length: Any) -> Any:
    """A length of NumPy, or an array without dimensions, as an int of Python; what is no integer stays, for the checks to name."""
    if type(length) is int:
        return length
    number = as_integer(length)
    return length if number is None else number


def needs_padding(q: int, k: int, v: int) -> bool:
    """Whether a head dim is odd and all of them are such that padding hides no mistake."""
    return q == k and max(q, v) <= MAX_HEAD_DIM and bool(q % HEAD_DIM_STEP or v % HEAD_DIM_STEP)


def step_up(size: int) -> int:
    """The next head dim that kernels take."""
    return -(-size // HEAD_DIM_STEP) * HEAD_DIM_STEP


def softcap_of(softcap: Any) -> Any:
    """flash-attn takes every cap of 0 or less for none."""
    number = as_real(softcap)
    return 0.0 if number is not None and -inf < number <= 0 else softcap


def flag(value: Any, name: str) -> bool:
    """True or False (of NumPy too, or as 1 and 0); a string would count as True, and a tensor would have to be waited for."""
    if isinstance(value, (bool, np.bool_)) or (is_integer(value) and value in {0, 1}):
        return bool(value)
    raise UnsupportedArgumentError(f"{name}: got {value!r}; allowed are True and False")


def mask_of(window_size: Any, *, causal: bool) -> MaskKind:
    """The mask of a ``window_size`` (left, right), or of a tensor with these two, which is waited for once."""
    pair = window_size.tolist() if hasattr(window_size, "tolist") else window_size
    if not isinstance(pair, Sequence) or len(pair) != 2:  # a set has no left one
        raise WindowError(f"window_size: got {window_size!r}; allowed is (left, right), negative for no bound")
    left, right = pair
    return MaskKind.window(left, 0 if causal and as_integer(right) is not None else right)
