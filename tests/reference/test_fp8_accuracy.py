"""How accurate fp8 is on the CPU backend: over spreads of scores, long rows, needles, outliers. Kernels have to keep the same."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import DType, Fp8Options, ScaleUnit
from tests.fp8 import DTYPES
from tests.fp8_entries import ENTRIES, causal_by_entry

E4M3, E5M2 = DType.F8E4M3, DType.F8E5M2
F32 = Fp8Options(out_dtype=DType.F32)
DTYPE_IDS = {"argvalues": [E4M3, E5M2], "ids": lambda dtype: dtype.value}


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fp8(dtype: DType, *arrays: Any) -> list[Any]:
    return [x.astype(DTYPES[dtype]) for x in arrays]


def relative(made: Any, exact: Any) -> float:
    return float(np.linalg.norm(made - exact) / np.linalg.norm(exact))


def attend(q: Any, k: Any, v: Any, **more: Any) -> tuple[Any, Any]:
    """o in float32, and what the values that the arrays mean give."""
    made = fa.run(fa.DenseFwdRequest(q, k, v, fp8=F32, **more)).out
    exact = fa.run(fa.DenseFwdRequest(*(x.astype(np.float32) for x in (q, k, v)), **more)).out
    return made, exact


def error_at(dtype: DType, std: float, *, rising: bool = False) -> float:
    """Relative error with scores of this standard deviation; ``rising``: keys in the order of their score with the first query."""
    q, k, v = normal(1, 256, 2, 64), normal(1, 2048, 2, 64, seed=1), normal(1, 2048, 2, 64, seed=2)
    if rising:
        q = q[:, :1] + 0.1 * q
        order = np.argsort((q[0, 0, 0] * k[0, :, 0]).sum(-1))
        k, v = k[:, order], v[:, order]
    made, exact = attend(*fp8(dtype, q, k, v), options=fa.AttentionOptions(softmax_scale=std / 8))
    return relative(made, exact)


@pytest.mark.parametrize("rising", [False, True], ids=["any order", "rising keys"])
def test_the_error_does_not_grow_with_the_spread_of_scores(rising: bool):
    errors = {dtype: [error_at(dtype, std, rising=rising) for std in (0.25, 0.5, 1, 2, 4)] for dtype in (E4M3, E5M2)}
    for dtype, bits in ((E4M3, 4), (E5M2, 3)):  # where all probabilities lie just above a power of two, the rms of their roundings is this
        assert max(errors[dtype]) < 2.0**-bits / np.sqrt(3), errors
    for fine, coarse in zip(errors[E4M3], errors[E5M2], strict=True):
        assert fine < coarse, errors


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("std", [0.0, 0.5, 8.0], ids=["uniform", "diffuse", "peaked"])
@pytest.mark.parametrize("keys", [128, 4096, 131072])
def test_an_average_of_ones_is_one(dtype: DType, std: float, keys: int):
    q, k = fp8(dtype, std * normal(1, 4, 1, 16), normal(1, keys, 1, 16, seed=1))
    made, _ = attend(q, k, np.ones((1, keys, 1, 16), DTYPES[dtype]), options=fa.AttentionOptions(softmax_scale=0.25))
    score = 0.25 * q[0, :, 0].astype(np.float32) @ k[0, :, 0].astype(np.float32).T
    headroom, total, top = (2.0**8 if dtype is E4M3 else 2.0**15), np.zeros(4), np.full(4, -np.inf)
    for tile in np.split(score, keys // 128, axis=1):  # the same rounding, plainly
        peak = np.maximum(top, tile.max(axis=1))
        rounded = (np.exp(tile - peak[:, None]) * headroom).astype(DTYPES[dtype]).astype(np.float64) / headroom
        total, top = total * np.exp(top - peak) + rounded.sum(axis=1), peak
    plain = np.abs(total / np.exp(score.astype(np.float64) - top[:, None]).sum(axis=1) - 1).max()
    assert np.abs(made - 1).max() <= 1.1 * plain + 2e-3, plain


@pytest.mark.parametrize("keys", [1 << 10, 1 << 14, 1 << 18])
@pytest.mark.parametrize("dtype", **DTYPE_IDS)
def test_a_needle_is_found_in_noise(dtype: DType, keys: int):
    rng = np.random.default_rng(keys)
    q, k = np.ones((1, 1, 1, 16), np.float32), rng.uniform(-1, 1, (1, keys, 1, 16)).astype(np.float32)
    v, place = rng.uniform(-1, 1, (1, keys, 1, 16)).astype(np.float32), keys // 3
    k[0, place], v[0, place] = 4, 2
    made, exact = attend(*fp8(dtype, q, k, v), options=fa.AttentionOptions(softmax_scale=0.25))
    np.testing.assert_allclose(made, exact, atol=0.02)


@pytest.mark.parametrize("keys", [4096, 131072])
def test_the_mean_of_ones_with_noise_is_kept(keys: int):
    rng = np.random.default_rng(1)
    q, k = normal(1, 2, 1, 16), 0.1 * normal(1, keys, 1, 16, seed=1)
    made, exact = attend(*fp8(E4M3, q, k, 1 + 0.3 * rng.standard_normal((1, keys, 1, 16))))
    assert np.abs(made - exact).max() < 2e-3


def test_keys_in_two_parts_that_are_merged_answer_as_in_one():
    keys = 150_000
    q, k, v = fp8(E4M3, normal(1, 2, 1, 16), normal(1, keys, 1, 16, seed=1), normal(1, keys, 1, 16, seed=2))
    whole = fa.run(fa.DenseFwdRequest(q, k, v, fp8=F32))
    parts = [fa.run(fa.DenseFwdRequest(q, k[:, part], v[:, part], fp8=F32)) for part in (slice(0, 70_000), slice(70_000, None))]
    out, lse = fa.merge_states(parts[0].out, parts[0].lse, parts[1].out, parts[1].lse)
    assert np.abs(out - whole.out).max() < 0.03 * np.abs(whole.out).max()
    np.testing.assert_allclose(lse, whole.lse, atol=1e-5)


def test_a_rotation_at_least_halves_the_error_of_outlier_channels():
    q, k, v = normal(1, 256, 2, 128), normal(1, 1024, 2, 128, seed=1), normal(1, 1024, 2, 128, seed=2)
    outliers = [3, 40, 77]
    q[..., outliers] *= 10
    k[..., outliers] *= 10
    options = fa.AttentionOptions(softmax_scale=0.01)
    exact = fa.run(fa.DenseFwdRequest(q, k, v, options=options)).out

    def error(q: Any, k: Any) -> float:
        (q8, qs), (k8, ks), (v8, vs) = (fa.quantize(x, unit=ScaleUnit.TENSOR) for x in (q, k, v))
        given = Fp8Options(q_descale=qs, k_descale=ks, v_descale=vs, out_dtype=DType.F32)
        return relative(fa.run(fa.DenseFwdRequest(q8, k8, v8, options=options, fp8=given)).out, exact)

    plain, turned = error(q, k), error(fa.rotate_outliers(q), fa.rotate_outliers(k))
    assert turned <= plain / 2, (plain, turned)


@pytest.mark.parametrize("window", [128, 256, 511])
@pytest.mark.parametrize("length", [256, 257, 384, 640, 1024])
def test_every_length_ends_with_every_window(length: int, window: int):
    made, exact = attend(*fp8(E4M3, *(normal(1, length, 1, 16, seed=seed) for seed in range(3))), mask=fa.MaskKind.sliding_causal(window))
    assert relative(made, exact) < 0.03


@pytest.mark.parametrize("entry", ENTRIES)
def test_descales_by_head_equal_the_values_on_every_entry(entry: str):
    descale = {name: np.array([[0.25, 0.5, 3]], np.float32) for name in ("q_descale", "k_descale", "v_descale")}
    q, k, v = fp8(E4M3, *(normal(1, 64, 3, 32, seed=seed) for seed in range(3)))
    wide = [(x.astype(np.float32) * [[[0.25], [0.5], [3]]]).astype(ml_dtypes.bfloat16) for x in (q, k, v)]
    exact = fa.flash_attn_func(*wide, causal=True).astype(np.float32)
    ends, table, empty = np.array([0, 64], np.int32), np.arange(4, dtype=np.int32)[None], (np.zeros_like(k), np.zeros_like(v))
    made = causal_by_entry(entry, q, k, v, descale, ends=ends, table=table, empty=empty)
    assert relative(made.astype(np.float32), exact) < 0.03
