"""merge_states: two halves of the keys make the whole, and an empty state changes no bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.problem import ArrayInfo
from atomr_accel_flashattn.types import Device, DType
from tests.cases import ALL_DTYPES, Case, build
from tests.check import Run, check_arrays
from tests.emulator.build import compiler
from tests.fakes.arrays import FakeArray
from tests.fakes.gpu import FakeGpu
from tests.inputs import NUMPY_DTYPE

PARTS = (100, 50, 0, 177, 3)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_parts_of_the_keys_make_the_whole(dtype: Any, packed: bool):
    keys = sum(PARTS)
    sizes = {"lengths_q": (5,), "lengths_k": (keys,)} if packed else {"seqlen_q": 5, "seqlen_k": keys}
    inputs = build(Case(dtype=dtype, heads=4, heads_kv=2, **sizes))
    ends = np.cumsum([0, *PARTS])
    state: Any = None
    for start, end in pairwise(ends):
        k, v = (x[start:end] if packed else x[:, start:end] for x in (inputs.k, inputs.v))
        if packed:
            offsets = [np.array([0, n], np.int32) for n in (5, end - start)]
            made = fa.flash_attn_varlen_func(inputs.q, k, v, *offsets, 5, max(int(end - start), 0), return_attn_probs=True)[:2]
        else:
            made = fa.flash_attn_func(inputs.q, k, v, return_attn_probs=True)[:2]
        state = made if state is None else fa.merge_states(*state, *made)
    if dtype is DType.F32:
        check_arrays("merged", inputs, Run(*state))
        return
    whole = fa.flash_attn_func(*(x[None] if packed else x for x in (inputs.q, inputs.k, inputs.v)), return_attn_probs=True)
    # o in 16 bits is rounded by each merge, and weights are those of LSEs in float32
    atol = 1e-6 if dtype is DType.F64 else 2e-2
    np.testing.assert_allclose(state[0].astype(np.float32).reshape(whole[0].shape), whole[0].astype(np.float32), atol=atol)
    np.testing.assert_allclose(state[1].reshape(whole[1].shape), whole[1], atol=1e-3)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.value)
def test_an_empty_state_merges_to_the_other_bitwise(dtype: Any):
    rng = np.random.default_rng(0)
    o = rng.standard_normal((2, 3, 4, 8)).astype(NUMPY_DTYPE[dtype])
    o[0, 0, 0, :3] = -0.0, np.inf, np.nan
    lse = rng.standard_normal((2, 4, 3)).astype(np.float32) * 1e4
    lse[1, 1] = -np.inf
    nothing, none = np.zeros_like(o), np.full_like(lse, -np.inf)
    for made in (fa.merge_states(o, lse, nothing, none), fa.merge_states(nothing, none, o, lse)):
        empty = np.isneginf(lse).transpose(0, 2, 1)
        assert made[0][~empty].tobytes() == o[~empty].tobytes()
        assert made[1].tobytes() == lse.tobytes()
    both = fa.merge_states(nothing, none, nothing, none)
    assert both[0].tobytes() == nothing.tobytes()
    assert np.isneginf(both[1]).all()


def test_huge_lses_stay_finite():
    o, lse = np.ones((1, 1, 1, 8), np.float32), np.full((1, 1, 1), 3e38, np.float32)
    out, merged = fa.merge_states(o, lse, 3 * o, lse)
    np.testing.assert_array_equal(out, 2 * o)
    assert np.isfinite(merged).all()


O, LSE = np.zeros((2, 3, 4, 8), np.float16), np.zeros((2, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((O, LSE, O[:1], LSE), fa.ShapeError, r"o2: got shape \(1, 3, 4, 8\) with \(2, 3, 4, 8\) in o1"),
        ((O, LSE.transpose(0, 2, 1), O, LSE), fa.ShapeError, r"lse1: got shape \(2, 3, 4\); allowed is \(2, 4, 3\)"),
        ((O, LSE, O, LSE.astype(np.float64)), fa.DTypeError, "lse2: got type float64; allowed is float32"),
        ((O, LSE, O.astype(np.float32), LSE), fa.DTypeError, "o2: got float32 with float16 in o1"),
        ((O.astype(np.int32), LSE, O.astype(np.int32), LSE), fa.DTypeError, "o2: got int32"),
        ((O[0, 0], LSE[0], O[0, 0], LSE[0]), fa.ShapeError, "o2: got shape"),
        (([0.0], LSE, O, LSE), fa.ArrayTypeError, "o1: got"),
    ],
    ids=str,
)
def test_refusals(given: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        fa.merge_states(*given)


@pytest.mark.usefixtures("gpu")
class TestOnAGpu:
    """The kernel's own source, run on the CPU thread by thread, behind the public call; the CPU backend is the oracle."""

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        if compiler() is None:
            pytest.skip("the emulator needs a C++20 compiler")
        card = FakeGpu()
        card.install(monkeypatch)
        return card

    @pytest.mark.parametrize(
        "shape", [(2, 3, 4, 64), (5, 4, 8), (1, 33, 3, 40), (7, 1, 20), (2, 2, 2, 7), (3, 2, 256), (4, 1, 300)], ids=str
    )
    @pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32], ids=lambda dtype: dtype.value)
    def test_it_gives_what_the_cpu_gives_and_commutes(self, gpu: FakeGpu, dtype: DType, shape: tuple[int, ...]):
        first, second = (state_of(dtype, shape, seed) for seed in range(2))
        expected = fa.merge_states(*first, *second)
        made = on_card(first, second)
        itemsize = 4 if dtype is DType.F32 else 2
        assert gpu.launches[-1][0].aligned == (shape[-1] * itemsize % 16 == 0)
        check_close(made, expected)
        swapped = on_card(second, first)
        assert [x.tobytes() for x in swapped] == [x.tobytes() for x in made]

    @pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32], ids=lambda dtype: dtype.value)
    def test_an_empty_state_merges_to_the_other_bitwise(self, dtype: DType):
        o, lse = state_of(dtype, (2, 3, 4, 16), 0)
        o[0, 1, 1, :3] = -0.0, np.inf, np.nan
        nothing, none = np.zeros_like(o), np.full_like(lse, -np.inf)
        for made in (on_card((o, lse), (nothing, none)), on_card((nothing, none), (o, lse))):
            assert made[0].tobytes() == o.tobytes()
            assert made[1].tobytes() == lse.tobytes()
        both = on_card((nothing, none), (nothing, none))
        assert both[0].tobytes() == nothing.tobytes()
        assert np.isneginf(both[1]).all()

    def test_huge_lses_stay_finite(self):
        o, lse = np.ones((1, 1, 1, 8), np.float32), np.full((1, 1, 1), 3e38, np.float32)
        out, merged = on_card((o, lse), (3 * o, lse))
        np.testing.assert_array_equal(out, 2 * o)
        assert np.isfinite(merged).all()

    def test_strides_are_free(self, gpu: FakeGpu):
        """o with its heads first and every other column, an LSE of which rows come first; neighbours are not touched."""
        (o1, lse1), second = state_of(DType.F16, (2, 5, 3, 8), 0), state_of(DType.F16, (2, 5, 3, 8), 1)
        wide = np.full((3, 2, 5, 16), np.nan, np.float16)
        wide[..., ::2] = o1.transpose(2, 0, 1, 3)
        tall = np.ascontiguousarray(lse1.transpose(2, 0, 1))
        strided = described(wide, (2, 5, 3, 8), (80, 16, 160, 2)), described(tall, (2, 3, 5), (3, 1, 6))
        out, lse = (np.full_like(x, np.nan) for x in second)
        fa.merge_states(
            *strided, *(FakeArray(x).info() for x in second), out=(described(out, out.shape, None), described(lse, lse.shape, None))
        )
        assert not gpu.launches[-1][0].aligned
        check_close((out, lse), fa.merge_states(o1, lse1, *second))

    @pytest.mark.parametrize("place", [0, 1, None])
    def test_out_may_be_one_of_the_states(self, place: int | None):
        states = [state_of(DType.BF16, (2, 9, 3, 32), seed) for seed in range(2)]
        expected = fa.merge_states(*states[0], *states[1])
        held = [[FakeArray(x) for x in state] for state in states]
        out = [FakeArray(np.zeros_like(x)) for x in states[0]] if place is None else held[place]
        infos = [each.info() for state in held for each in state]
        made = fa.merge_states(*infos, out=tuple(each.info() for each in out))
        assert [each.source for each in made] == out
        check_close([each.array for each in out], expected)

    def test_a_second_call_alike_makes_the_launch_of_the_first(self, gpu: FakeGpu):
        for seed in range(3):
            on_card(state_of(DType.F16, (4, 2, 16), seed), state_of(DType.F16, (4, 2, 16), 3))
        on_card(*2 * [state_of(DType.F16, (3, 2, 16), 0)])
        assert gpu.repeated == [False, True, True, False]

    def test_nothing_to_merge_launches_nothing(self, gpu: FakeGpu):
        out, lse = on_card(*2 * [state_of(DType.F16, (2, 0, 4, 8), 0)])
        assert (out.shape, lse.shape, gpu.launches) == ((2, 0, 4, 8), (2, 4, 0), [])

    def test_float64_is_refused(self):
        with pytest.raises(
            fa.DTypeError, match=r"o2: got float64 with float64 in o1; allowed are float16, bfloat16 and, on a GPU too, float32"
        ):
            on_card(*2 * [state_of(DType.F64, (2, 4, 8), 0)])


def state_of(dtype: DType, shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    """Outputs and LSEs of a few magnitudes, some of them of no keys."""
    rng = np.random.default_rng((seed, *shape))
    *lead, rows, heads, _ = shape
    o = rng.standard_normal(shape).astype(NUMPY_DTYPE[dtype])
    lse = (rng.standard_normal((*lead, heads, rows)) * rng.choice([1, 30], (*lead, heads, rows))).astype(np.float32)
    if rows > 2:
        lse[..., 0, seed], o[..., seed, 0, :] = -np.inf, 0
        lse[..., 0, 2], o[..., 2, 0, :] = -np.inf, 0
    return o, lse


def on_card(first: tuple[Any, Any], second: tuple[Any, Any]) -> list[Any]:
    made = fa.merge_states(*(FakeArray(x).info() for x in (*first, *second)))
    return [each.array for each in made]


def described(array: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> ArrayInfo:
    """An array of host memory, seen with this shape and these strides as one of the fake card."""
    host = read_array(array, "x")
    return replace(host, shape=shape, strides=strides or host.strides, device=Device("cuda", 0))


def check_close(made: Any, expected: Any) -> None:
    """Up to a rounding of o, and of exponentials that are approximate."""
    bits = np.finfo(expected[0].dtype).eps if expected[0].dtype != NUMPY_DTYPE[DType.BF16] else 2**-7
    np.testing.assert_allclose(made[0].astype(np.float64), expected[0].astype(np.float64), rtol=bits, atol=4 * max(bits / 8, 1e-7))
    np.testing.assert_allclose(made[1], expected[1], rtol=1e-6, atol=1e-6)


class TestOut:
    """``out`` of a merge in host memory."""

    @pytest.mark.parametrize("place", [0, 1, None])
    def test_it_may_be_one_of_the_states(self, place: int | None):
        states = [state_of(DType.F32, (2, 9, 3, 32), seed) for seed in range(2)]
        expected = fa.merge_states(*states[0], *states[1])
        out = tuple(np.zeros_like(x) for x in states[0]) if place is None else states[place]
        made = fa.merge_states(*states[0], *states[1], out=out)
        assert all(one is other for one, other in zip(made, out, strict=True))
        for one, other in zip(made, expected, strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            (np.zeros(3), "out: got ndarray; allowed are None and"),
            ((O[0], LSE), r"out\[0\]: got float16 of shape \(3, 4, 8\)"),
            ((np.zeros_like(O), LSE.astype(np.float64)), r"out\[1\]: got float64"),
            ((O[::-1], np.zeros_like(LSE)), r"out\[0\]: got memory of a state"),
            ((O, LSE[::-1]), r"out\[1\]: got memory of a state"),
            ((np.zeros((2, 3, 8, 4), np.float16).swapaxes(2, 3), LSE), r"out\[0\]: got strides"),
            ((np.broadcast_to(np.zeros(8, np.float16), O.shape), LSE), r"out\[0\]: got a read-only"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_refused(self, out: Any, message: str):
        with pytest.raises(fa.OutputError, match=message):
            fa.merge_states(O, LSE, np.ones_like(O), np.ones_like(LSE), out=out)
