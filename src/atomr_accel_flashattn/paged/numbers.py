"""What a PagedKvCache is given, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.new import can_write_at
from ..arrays.read import is_cupy
from ..errors import DTypeError, HeadDimError, ShapeError
from ..limits import FP8_HEAD_DIM_STEP, MAX_HEAD_DIM, MAX_LENGTH, as_integer
from ..problem import ArrayInfo

__all__ = ["check_fp8", "count_of", "counts_of", "listed", "sizes_of"]


def sizes_of(**sizes: Any) -> list[int]:
    """Sizes in the order given; raises ShapeError or HeadDimError where one is no integer in its range."""
    numbers = []
    for name, size in sizes.items():
        number = as_integer(size)
        least = 0 if name == "num_blocks" else 1
        if number is None or not least <= number <= MAX_LENGTH:
            raise ShapeError(f"{name}: got {size!r}; allowed is an integer in {least}..{MAX_LENGTH}")
        if name.endswith("head_dim") and number > MAX_HEAD_DIM:
            raise HeadDimError(f"{name}: got {size}; allowed are 1..{MAX_HEAD_DIM}")
        numbers.append(number)
    return numbers


def count_of(value: Any, name: str, also: str = "") -> int:
    """A number of tokens; raises ShapeError where it is none. ``also``: what else the message says is allowed."""
    number = as_integer(value)
    if number is None or not 0 <= number <= MAX_LENGTH:
        raise ShapeError(f"{name}: got {value!r}; allowed is an integer in 0..{MAX_LENGTH}{also}")
    return number


def listed(given: Any) -> list[Any]:
    """What was given as several; anything else as one, for the checks to name."""
    return list(given) if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) else [given]


def counts_of(tokens: int | Sequence[int], batch: int) -> list[int]:
    """One number for each of ``batch`` sequences; one for all of them counts for each."""
    alone = as_integer(tokens)
    numbers: Any = [alone] * batch if alone is not None else listed(tokens)
    counts = [count_of(each, "tokens", ", or a list of one for each sequence") for each in numbers]
    if len(counts) != batch:
        raise ShapeError(f"tokens: got {len(counts)} numbers for {batch} sequences; allowed is one for each, or one for all")
    return counts


def check_fp8(model: ArrayInfo, *head_dims: int) -> None:
    """Whether there are caches of fp8 in the library of ``model``, with these head dims.

    Raises:
        DTypeError: it can neither make nor write them.
        HeadDimError: a head dim that fp8 does not have.
    """
    if (model.device.kind != "cpu" and not can_write_at(model, model)) or is_cupy(model.source):
        raise DTypeError(f"dtype: got fp8 with a like of {type(model.source).__qualname__}; allowed are torch tensors and arrays of NumPy")
    for size in head_dims:
        if size % FP8_HEAD_DIM_STEP:
            raise HeadDimError(f"head_dim: got {size} with fp8; allowed are multiples of {FP8_HEAD_DIM_STEP}")
