"""What a request asks for besides its arrays: mask, position bias, and the options of the softmax. Plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Final

import numpy as np

from ..errors import (
    ArrayTypeError,
    DropoutError,
    DTypeError,
    ScaleError,
    SinkWithoutMaskError,
    SoftcapError,
    UnsupportedArgumentError,
    WindowError,
)
from ..limits import FP8_OUT_DTYPES, LARGEST_SCORE_FACTOR, MAX_LENGTH, as_integer, as_real
from ..problem import Band
from ..short_repr import ShortRepr
from ..types import DType

__all__ = ["AttentionOptions", "Fp8Options", "MaskKind", "PositionBias", "check_kinds"]

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class MaskKind:
    """Which keys a query sees: a band around its position p = i + Sk - Sq (docs/semantics.md).

    Make one with :meth:`full`, :meth:`causal`, :meth:`sliding_causal`, :meth:`sliding_full` or :meth:`window`.

    Attributes:
        left: keys before p that are visible, None for all.
        right: keys after p that are visible, None for all.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for name, given in (("left", self.left), ("right", self.right)):
            side = None if given is None else as_integer(given)
            if given is not None and (side is None or side < 0):
                raise WindowError(f"{name}: got {given!r}; allowed is an integer >= 0, or None for no bound")
            object.__setattr__(self, name, side)

    @classmethod
    def full(cls) -> MaskKind:
        """Every query sees every key."""
        return cls()

    @classmethod
    def causal(cls) -> MaskKind:
        """Keys up to the query's own position, aligned to the last key: j <= p."""
        return cls(None, 0)

    @classmethod
    def sliding_causal(cls, window: int) -> MaskKind:
        """The last ``window`` keys, the query's own among them: p - window < j <= p.

        Raises:
            WindowError: ``window`` is no integer >= 1.
        """
        return cls(_window(window) - 1, 0)

    @classmethod
    def sliding_full(cls, window: int) -> MaskKind:
        """Keys nearer than ``window`` on both sides: |p - j| < window.

        Raises:
            WindowError: ``window`` is no integer >= 1.
        """
        return cls(_window(window) - 1, _window(window) - 1)

    @classmethod
    def window(cls, left: int, right: int) -> MaskKind:
        """flash-attn's ``window_size``: p - left <= j <= p + right; a negative entry is no bound.

        Raises:
            WindowError: an entry is no integer.
        """
        sides = as_integer(left), as_integer(right)
        if None in sides:
            raise WindowError(f"window_size: got ({left!r}, {right!r}); allowed are two integers, negative for no bound")
        return cls(*(None if side is None or side < 0 else side for side in sides))

    def band(self, sink_tokens: int = 0) -> Band:
        """The mask with sink tokens, as kernels take it: bounds that exceed every length are cut to ``MAX_LENGTH``.

        Raises:
            WindowError: ``sink_tokens`` is no integer >= 0.
            SinkWithoutMaskError: sink tokens without a left bound.
        """
        count = as_integer(sink_tokens)
        if count is None or count < 0:
            raise WindowError(f"sink_tokens: got {sink_tokens!r}; allowed is an integer >= 0")
        if count > 0 and self.left is None:
            raise SinkWithoutMaskError(
                f"sink_tokens: got {sink_tokens} with a mask that has no left bound ({self}), where it would change nothing; "
                "allowed is 0, or a sliding window, as MaskKind.sliding_causal(4096) or window_size=(4095, 0)"
            )
        left, right = (None if side is None else min(side, MAX_LENGTH) for side in (self.left, self.right))
        return Band(left, right, min(count, MAX_LENGTH))


def _window(window: int) -> int:
    length = as_integer(window)
    if length is None or length < 1:
        raise WindowError(f"window: got {window!r}; allowed is an integer >= 1 (a window of 1 is the query's own key)")
    return length


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PositionBias(ShortRepr):
    """What is added to scores by distance. Make one with :meth:`none` or :meth:`alibi`.

    Attributes:
        slopes: float32 (Hq,) or (B, Hq) on the device of q, or None.
    """

    slopes: Any = None

    @classmethod
    def none(cls) -> PositionBias:
        """No bias."""
        return cls()

    @classmethod
    def alibi(cls, slopes: Any) -> PositionBias:
        """ALiBi (arXiv 2108.12409): s - slopes[h] * |p - j|."""
        return cls(slopes)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True, repr=False)
class AttentionOptions(ShortRepr):
    """Options of the softmax, checked when made.

    Attributes:
        softmax_scale: factor on q.k, None is 1 / sqrt(head dim).
        softcap: c of c * tanh(s / c), 0 is none.
        learned_sink: float32 (Hq,) on the device of q: exp(sink[h]) joins the denominator; None is none.
        dropout_p: probability in [0, 1) that an element is dropped; rounded to a multiple of 1/256.
        rng: int64 (seed, offset) on the device of q; None draws them from the generator of q's library when the request is made.
        batch_invariant: whether a row's bits may depend on nothing but its q, its position, the keys and values that it sees, and
            options; forward only, and slower (docs/semantics.md, Batch invariance).

    Raises:
        ScaleError, SoftcapError, DropoutError: a number outside its range.
        UnsupportedArgumentError: ``batch_invariant`` that is neither True nor False.
    """

    softmax_scale: float | None = None
    softcap: float = 0.0
    learned_sink: Any = None
    dropout_p: float = 0.0
    rng: Any = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        given: Any = self.softmax_scale
        scale, cap, p = as_real(given), as_real(self.softcap), as_real(self.dropout_p)
        if given is not None and (scale is None or not abs(scale) <= LARGEST_SCORE_FACTOR):
            raise ScaleError(
                f"softmax_scale: got {given!r}; allowed is a finite float32 number up to {LARGEST_SCORE_FACTOR} either way, "
                "or None for 1 / sqrt(head dim)"
            )
        if cap is None or not 0 <= cap <= LARGEST_SCORE_FACTOR:
            raise SoftcapError(
                f"softcap: got {self.softcap!r}; allowed is a finite float32 number >= 0, at most {LARGEST_SCORE_FACTOR}; "
                "0 is none, and in functional calls so is a negative one"
            )
        if cap > 0 and abs(1.0 if scale is None else scale) / cap > _FLOAT32_MAX:
            raise SoftcapError(
                f"softcap: got {self.softcap!r}, too small for a softmax_scale of {'1 / sqrt(head dim)' if scale is None else scale}; "
                "allowed is a cap with softmax_scale / softcap below 3.4e38"
            )
        if p is None or not 0 <= p < 1:
            given = self.dropout_p
            advice = "; is this causal? pass it by name" if isinstance(given, (bool, np.bool_)) else ""
            raise DropoutError(f"dropout_p: got {given!r}; allowed is 0 <= p < 1 (p = 1 would drop everything){advice}")
        if not isinstance(self.batch_invariant, bool):
            raise UnsupportedArgumentError(f"batch_invariant: got {self.batch_invariant!r}; allowed are True and False")
        for name, value in (("softmax_scale", scale), ("softcap", cap), ("dropout_p", p)):
            object.__setattr__(self, name, value)

    def scale_for(self, head_dim: int) -> float:
        """The factor on q.k."""
        return 1.0 / sqrt(head_dim) if self.softmax_scale is None else self.softmax_scale


@dataclass(frozen=True, slots=True, eq=False, kw_only=True, repr=False)
class Fp8Options(ShortRepr):
    """What a call with fp8 K and V says besides: a value is its fp8 element times its descale (docs/semantics.md, fp8).

    Descales are float32 arrays on the device of q, of any strides: of shape () for all elements, (B, Hkv), or (B, Hkv, blocks) for blocks
    of 128 tokens that are counted inside each sequence; those of k and v beside a paged cache also (cache blocks, block size, Hkv). With
    lengths on the device there may be more blocks than the longest sequence has. None is a factor of 1.

    Attributes:
        q_descale: of q, by KV head; None where q has 16 bits.
        k_descale: of k.
        v_descale: of v.
        out_dtype: element type of o, BF16, F16 or F32; None is that of q, and BF16 where q is fp8.
        single_level: whether P V of 8-bit wgmma is summed in its accumulator of 14 bits alone, and not added to float32 from time to time:
            faster, and wrong by a quarter for a mean over 16k keys (docs/fp8.md). Nothing else sums so: others, and
            calls with a descale by blocks, take it for False.

    Raises:
        DTypeError: an ``out_dtype`` that is none of them.
        UnsupportedArgumentError: ``single_level`` that is neither True nor False.
    """

    q_descale: Any = None
    k_descale: Any = None
    v_descale: Any = None
    out_dtype: DType | None = None
    single_level: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.single_level, bool):
            raise UnsupportedArgumentError(f"single_level: got {self.single_level!r}; allowed are True and False")
        if self.out_dtype is not None and self.out_dtype not in FP8_OUT_DTYPES:
            raise DTypeError(f"out_dtype: got {self.out_dtype!r}; allowed are {', '.join(map(str, FP8_OUT_DTYPES))}, or None")


def check_kinds(mask: Any, bias: Any, options: Any) -> None:
    """Whether the parts of a request are what their names say.

    Raises:
        ArrayTypeError: one of them is another object, as a string, an array, or a method that was not called.
    """
    for name, value, kind, example in (
        ("mask", mask, MaskKind, "MaskKind.causal()"),
        ("bias", bias, PositionBias, "PositionBias.alibi(slopes)"),
        ("options", options, AttentionOptions, "AttentionOptions(softcap=30.0)"),
    ):
        if not isinstance(value, kind):
            article = "an" if kind is AttentionOptions else "a"
            raise ArrayTypeError(
                f"{name}: got {type(value).__qualname__}; allowed is {article} {kind.__name__}, as {example}; leave it out for none"
            )
