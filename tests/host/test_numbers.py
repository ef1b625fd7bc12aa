"""Numbers: a real number of Python or NumPy is taken for its value, everything else is refused, by every path and with the true limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.limits import LARGEST_SCORE_FACTOR, as_integer, as_real

Q = np.random.default_rng(0).standard_normal((1, 6, 2, 16), np.float32)
ENDS = np.array([0, 2, 6], np.int32)

# name of the number, of the option, and the error
REALS = {"softmax_scale": fa.ScaleError, "softcap": fa.SoftcapError, "dropout_p": fa.DropoutError}
INTEGERS = {"sink_tokens": fa.WindowError}
FLAGS = ("causal", "return_attn_probs", "deterministic")


def dense(**options: Any) -> Any:
    return fa.flash_attn_func(Q, Q, Q, **options)


def packed(**options: Any) -> Any:
    return fa.flash_attn_varlen_func(Q[0], Q[0], Q[0], ENDS, ENDS, 4, 4, **options)


def request(**options: Any) -> Any:
    sinks = {"sink_tokens": options.pop("sink_tokens")} if "sink_tokens" in options else {}
    mask = fa.MaskKind.window(*options.pop("window_size", (2, 0)))
    return fa.run(fa.DenseFwdRequest(Q, Q, Q, options=fa.AttentionOptions(**options), mask=mask, **sinks)).out


CALLS: dict[str, Callable[..., Any]] = {"dense": dense, "packed": packed, "request": request}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        np.True_,
        math.nan,
        np.float32("nan"),
        math.inf,
        -math.inf,
        np.float16("inf"),
        np.float16("-inf"),
        np.float32("inf"),
        np.longdouble("1e400"),
        10**400,
        -(10**400),
        Fraction(10**400),
        1j,
        "1",
        [0.5],
        np.array(0.5),
        np.array([0.5]),
        Decimal("0.5"),
        pytest.param(object(), id="object"),
    ],
    ids=repr,
)
def test_what_is_no_finite_real_number_is_refused(call: str, name: str, value: Any):
    with pytest.raises(REALS[name], match=rf"^{name}: got .*; allowed is "):
        CALLS[call](**{name: value})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, Fraction, float])
def test_real_numbers_of_every_kind_are_taken_for_their_value(call: str, name: str, kind: Any):
    results = []
    for value in (kind(0.25), 0.25):
        np.random.seed(0)  # noqa: NPY002 - the generator that dropout draws from
        results.append(CALLS[call](**{name: value}))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("kind", [int, np.int8, np.int64, np.uint16])
def test_integers_are_real_numbers(kind: Any):
    np.testing.assert_array_equal(dense(softmax_scale=kind(2), softcap=kind(5)), dense(softmax_scale=2.0, softcap=5.0))


def test_options_hold_floats():
    options = fa.AttentionOptions(softmax_scale=np.float16(0.5), softcap=np.int64(3), dropout_p=Fraction(1, 4))
    assert (options.softmax_scale, options.softcap, options.dropout_p) == (0.5, 3.0, 0.25)
    assert {type(options.softmax_scale), type(options.softcap), type(options.dropout_p)} == {float}


def test_a_flag_one_place_too_early_is_refused():
    with pytest.raises(fa.ScaleError, match="softmax_scale: got True; allowed is a finite float32 number"):
        fa.flash_attn_func(Q, Q, Q, 0.0, True)
    with pytest.raises(fa.DropoutError, match=r"dropout_p: got True; allowed is 0 <= p < 1 .*; is this causal\? pass it by name$"):
        fa.flash_attn_func(Q, Q, Q, True)
    with pytest.raises(fa.DropoutError, match=r"dropout_p: got 1\.0; .*would drop everything\)$"):
        fa.flash_attn_func(Q, Q, Q, 1.0)
    with pytest.raises(fa.UnsupportedArgumentError, match=r"causal: got \(-1, -1\)"):
        fa.flash_attn_func(Q, Q, Q, 0.0, None, (-1, -1))
    with pytest.raises(fa.WindowError, match="window_size: got 30"):
        fa.flash_attn_func(Q, Q, Q, 0.0, None, True, 30.0)
    with pytest.raises(fa.UnsupportedArgumentError, match="deterministic: got None"):
        fa.flash_attn_func(Q, Q, Q, 0.0, None, True, (-1, -1), 0.0, None, None)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("call", [dense, packed])
@pytest.mark.parametrize("value", [1.0, 0.0, 2, -1, "True", None, np.float32(1), np.array(True), [True]], ids=repr)
def test_flags_are_true_or_false(call: Callable[..., Any], name: str, value: Any):
    with pytest.raises(fa.UnsupportedArgumentError, match=f"{name}: got .*; allowed are True and False"):
        call(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [True, np.True_, 1, np.int64(1)], ids=repr)
def test_flags_of_every_kind(name: str, value: Any):
    results = [dense(**{name: each}) for each in (value, True)]
    first, second = (result if name != "return_attn_probs" else result[0] for result in results)
    np.testing.assert_array_equal(first, second)


LIMITED = [
    ("softmax_scale", LARGEST_SCORE_FACTOR, fa.ScaleError),
    ("softmax_scale", -LARGEST_SCORE_FACTOR, fa.ScaleError),
    ("softcap", LARGEST_SCORE_FACTOR, fa.SoftcapError),
]


@pytest.mark.parametrize(("name", "limit", "error"), LIMITED)
def test_the_limit_in_the_message_is_the_limit(name: str, limit: float, error: type[Exception]):
    assert dense(**{name: limit}).shape == Q.shape
    beyond = math.nextafter(limit, math.copysign(math.inf, limit))
    for value in (beyond, 3e38 * math.copysign(1, limit)):
        with pytest.raises(error, match=rf"{name}: got .*2\.358e\+38"):
            dense(**{name: value})
    with np.errstate(over="raise"):
        np.float32(LARGEST_SCORE_FACTOR * math.log2(math.e))


def test_a_softcap_of_zero_or_less_is_none_as_in_flash_attn():
    for none in (0, 0.0, -1.0, np.float32(-0.5), Fraction(-1, 2)):
        np.testing.assert_array_equal(dense(softcap=none), dense())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [True, False, np.True_, 1.0, np.float64(2), "1", None, [1], np.array([1]), np.array(1.0)], ids=repr)
def test_what_is_no_integer_is_no_count_and_no_side(call: str, value: Any):
    with pytest.raises(fa.WindowError):
        CALLS[call](window_size=(2, 0), sink_tokens=value)
    for window in ((value, 0), (0, value)):
        with pytest.raises(fa.WindowError, match=r"window_size: got \("):
            CALLS[call](window_size=window)


def test_as_real_and_as_integer():
    assert [as_real(each) for each in (3, 2.5, np.float16(0.5), True, None, "1", 1j)] == [3.0, 2.5, 0.5, None, None, None, None]
    assert as_real(-(10**400)) == -math.inf
    assert [as_integer(each) for each in (3, np.int8(-3), np.array(5), True, np.array(True), 3.0, np.array(3.0), np.array([3]), None)] == [
        3,
        -3,
        5,
        *[None] * 6,
    ]


def test_keys_take_the_numbers_that_requests_take():
    for softcap in (np.float16("inf"), math.nan, True):
        with pytest.raises(fa.DispatchError):
            fa.DispatchKey(fa.SmArch.SM_90, fa.DType.F16, 64, extras=fa.Extras(softcap=softcap))
