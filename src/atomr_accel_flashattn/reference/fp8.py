"""fp8 on the CPU: elements times their descales, and probabilities rounded to a narrow type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from ..arrays.read import as_numpy
from ..limits import SCALED_TOKENS, SMALLEST_SCALE
from ..types import ScaleUnit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..problem import AttentionProblem, Descale
    from .cache import Slots

    Array = NDArray[Any]

__all__ = ["Factors", "factors_of", "quantise_rows", "round_probabilities"]

# Of a type of probabilities: bits of its significand, and the power of two below which its steps are fixed. The fp8 types hold
# probabilities times the largest power of two that cannot overflow, as kernels do: 2^8 below 448, 2^15 below 57344.
_ROUNDING: Final = {"float16": (11, -14), "float8_e4m3fn": (4, -6 - 8), "float8_e5m2": (3, -14 - 15)}


@dataclass(frozen=True, slots=True)
class Factors:
    """The descale of q, k or v of a call."""

    values: Array
    unit: ScaleUnit

    def of(self, sequence: int, head: int, tokens: range, array: Array | Slots) -> Array:
        """Of the elements (tokens, D) of a KV head, to be broadcast. ``array``: where the tokens lie, of a descale by slots."""
        found: Array = self.values
        if self.unit is ScaleUnit.HEAD:
            found = self.values[sequence, head]
        elif self.unit is ScaleUnit.BLOCK:
            found = self.values[sequence, head, np.arange(tokens.start, tokens.stop) // SCALED_TOKENS, None]
        elif self.unit is ScaleUnit.TOKEN:
            assert not isinstance(array, np.ndarray)  # noqa: S101 - requests have checked it
            found = array.beside(self.values, head, slice(tokens.start, tokens.stop))[:, None]
        return found


def factors_of(problem: AttentionProblem) -> tuple[Factors | None, Factors | None, Factors | None]:
    """Those of q, k and v; None where there is nothing to multiply by."""
    if problem.descales is None:
        return None, None, None
    q, k, v = map(_factors, problem.descales)
    return q, k, v


def _factors(descale: Descale | None) -> Factors | None:
    return None if descale is None else Factors(as_numpy(descale.array), descale.unit)


def quantise_rows(rows: Array, slots: Slots, factors: Factors | None, sequence: int, first_token: int) -> Array:
    """New tokens (n, Hkv, D) as a cache of fp8 has them: over their descale in float32, at most the largest number of the type.

    A descale by slots is made from them and written beside them: the largest magnitude of a token and KV head, NaN left out, over the
    largest number of the type, at least the smallest normal float32, and 1 where all elements are 0.

    Args:
        rows: of a 16-bit type.
        slots: where they go.
        factors: the descale of the cache; None is 1.
        sequence: index of theirs.
        first_token: tokens of the sequence before them.
    """
    largest = np.float32(ml_dtypes.finfo(slots.dtype).max)
    values: Array = rows.astype(np.float32)
    if factors is not None and factors.unit is ScaleUnit.TOKEN:
        amax = np.fmax.reduce(np.abs(values), axis=-1)
        scale = np.where(amax > 0, np.maximum(amax / largest, np.float32(SMALLEST_SCALE)), np.float32(1))
        slots.put_beside(factors.values, scale)
        values /= scale[..., None]
    elif factors is not None:
        tokens = range(first_token, first_token + len(values))
        for head in range(values.shape[1]):
            values[:, head] /= factors.of(sequence, head, tokens, slots)
    return np.clip(values, -largest, largest).astype(slots.dtype)


def round_probabilities(probabilities: Array, to: np.dtype[Any]) -> Array:
    """Round float32 values in [0, 1] to a type of 8 or 16 bits and keep them in float32.

    NumPy's cast to float16 takes 2 ns an element and 70 when the result underflows, as most of a long ALiBi row does. Adding and
    subtracting 1.5 * 2^(24 - n) times the leading power of two rounds to n bits in 1 ns, ties to even; below the least normal number steps
    are fixed, hence the maximum.
    """
    if to.name not in _ROUNDING:
        return probabilities.astype(to).astype(probabilities.dtype)
    bits, least = _ROUNDING[to.name]
    magic: Array = (probabilities.view(np.int32) & 0x7F800000).view(np.float32)
    np.maximum(magic, np.float32(2.0**least), out=magic)
    magic *= np.float32(1.5 * 2 ** (24 - bits))
    probabilities += magic
    probabilities -= magic
    return probabilities
