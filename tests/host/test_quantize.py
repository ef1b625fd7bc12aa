"""The helpers that quantise to fp8: every unit, in NumPy and torch, dense and packed, and the rotation of outliers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import DType, Fp8Options, ScaleUnit
from tests.fp8 import DTYPES

E4M3, E5M2 = DType.F8E4M3, DType.F8E5M2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
ENDS = np.array([0, 130, 130, 390], np.int32)
UNITS = list(ScaleUnit)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 7


def by_hand(x: Any, unit: ScaleUnit, groups: int, dtype: DType) -> Any:
    """The descale of a dense (B, S, H, D), written with loops."""
    batch, length, heads, _ = x.shape
    if unit is ScaleUnit.TOKEN:
        return (np.abs(x).max(axis=-1) / LARGEST[dtype]).astype(np.float32)
    if unit is ScaleUnit.TENSOR:
        return np.float32(np.abs(x).max() / LARGEST[dtype])
    step = 128 if unit is ScaleUnit.BLOCK else length
    made = np.zeros((batch, groups, -(-length // step)), np.float32)
    for b, g, n in np.ndindex(*made.shape):
        own = x[b, n * step : (n + 1) * step, g * heads // groups : (g + 1) * heads // groups]
        made[b, g, n] = np.abs(own).max() / LARGEST[dtype]
    return made if unit is ScaleUnit.BLOCK else made[..., 0]


def spread(descale: Any, shape: tuple[int, ...], unit: ScaleUnit) -> Any:
    """The factor of every element of a dense (B, S, H, D)."""
    _, length, heads, _ = shape
    if unit is ScaleUnit.TENSOR:
        return descale
    if unit is ScaleUnit.TOKEN:
        return descale[..., None]
    each = descale if unit is ScaleUnit.BLOCK else descale[..., None]
    rows = np.repeat(each, 128 if unit is ScaleUnit.BLOCK else length, axis=2)[:, :, :length]
    return np.repeat(rows, heads // each.shape[1], axis=1).transpose(0, 2, 1)[..., None]


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.value)
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_element_becomes_the_largest_number(unit: ScaleUnit, dtype: DType, kind: Any):
    x = normal(2, 300, 4, 32).astype(kind)
    groups = 4 if unit is ScaleUnit.TOKEN else 2
    made = fa.quantize(x, dtype, unit=unit, heads_kv=2)
    wide = x.astype(np.float32)
    np.testing.assert_allclose(made.descale, by_hand(wide, unit, groups, dtype), rtol=1e-6)
    assert made.descale.dtype == np.float32
    assert made.values.dtype == DTYPES[dtype]
    values = made.values.astype(np.float32)
    assert np.abs(values).max() == LARGEST[dtype]
    error = np.abs(values * spread(made.descale, x.shape, unit) - wide)
    assert (error <= np.abs(wide) * (2.0**-4 if dtype is E4M3 else 2.0**-3) * 1.01 + 1e-3).all()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.value)
def test_packed_sequences_are_quantised_each_alone(unit: ScaleUnit):
    x = normal(400, 4, 32)
    made = fa.quantize(x, unit=unit, heads_kv=2, cu_seqlens=ENDS, max_seqlen=260)
    assert (made.values[390:].astype(np.float32) == 0).all()
    for index, (start, end) in enumerate([(0, 130), (130, 130), (130, 390)]):
        alone = fa.quantize(x[None, start:end], unit=unit, heads_kv=2)
        if unit is ScaleUnit.TENSOR:
            whole = fa.quantize(x[None, :390], unit=unit)
            np.testing.assert_array_equal(made.descale, whole.descale)
            np.testing.assert_array_equal(made.values[start:end], whole.values[0, start:end])
            continue
        blocks = alone.descale.shape[-1]
        own = made.descale[start:end] if unit is ScaleUnit.TOKEN else made.descale[index]
        np.testing.assert_array_equal(own[..., :blocks] if unit is ScaleUnit.BLOCK else own, alone.descale[0])
        np.testing.assert_array_equal(made.values[start:end], alone.values[0])


@pytest.mark.parametrize("unit", UNITS[:3], ids=lambda unit: unit.value)
def test_a_call_takes_what_comes_out(unit: ScaleUnit):
    q, k, v = normal(2, 200, 4, 64), normal(2, 200, 2, 64, seed=1), normal(2, 200, 2, 64, seed=2)
    (q8, qs), (k8, ks), (v8, vs) = (fa.quantize(x / 7, unit=unit, heads_kv=2) for x in (q, k, v))
    made = fa.flash_attn_func(q8, k8, v8, q_descale=qs, k_descale=ks, v_descale=vs, out=np.empty_like(q))
    exact = fa.flash_attn_func(q / 7, k / 7, v / 7)
    assert np.linalg.norm(made - exact) < 0.08 * np.linalg.norm(exact)


def test_pages_are_quantised_by_token():
    cache = normal(9, 16, 2, 32)
    made = fa.quantize(cache, unit=ScaleUnit.TOKEN)
    q, table, lengths = (
        normal(2, 1, 4, 32, seed=1).astype(np.float16),
        np.arange(8, dtype=np.int32).reshape(2, 4),
        np.array([60, 7], np.int32),
    )
    options = Fp8Options(k_descale=made.descale, v_descale=made.descale)
    request = fa.PagedAttentionRequest(q, made.values, made.values, table, lengths, fp8=options)
    assert request.problem.descales.k.unit is ScaleUnit.TOKEN
    wide = cache.astype(np.float16)
    exact = fa.run(fa.PagedAttentionRequest(q, wide, wide, table, lengths)).out
    assert np.linalg.norm(fa.run(request).out - exact) < 0.08 * np.linalg.norm(exact)


def test_zeros_have_a_descale_of_one():
    for unit in UNITS:
        made = fa.quantize(np.zeros((1, 130, 2, 16), np.float16), unit=unit)
        assert (made.descale == 1).all()
        assert (made.values.astype(np.float32) == 0).all()


def test_empty_arrays_come_out_empty():
    for unit in UNITS:
        made = fa.quantize(np.zeros((1, 0, 2, 16), np.float32), unit=unit)
        assert made.values.shape == (1, 0, 2, 16)


LIBRARIES = ["numpy", pytest.param("torch", marks=pytest.mark.torch)]


def in_library(library: str, x: Any) -> Any:
    return x if library == "numpy" else pytest.importorskip("torch").from_numpy(x)


def in_numpy(x: Any) -> Any:
    return np.asarray(x if isinstance(x, np.ndarray) else x.float(), np.float32)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.value)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=lambda dtype: dtype.value)
def test_the_smallest_numbers_beside_zeros_are_no_nan(unit: ScaleUnit, dtype: DType, library: str):
    x = np.zeros((1, 4, 2, 16), np.float32)
    x[..., 0] = np.float32(1e-44)  # over the largest number of the type it is 0
    made = fa.quantize(in_library(library, x), dtype, unit=unit)
    assert (in_numpy(made.values) == 0).all()
    assert (in_numpy(made.descale) == np.finfo(np.float32).smallest_normal).all()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.value)
def test_nan_stays_and_changes_no_other_element(unit: ScaleUnit, library: str):
    x = normal(1, 4, 2, 16) * 1000
    expected = fa.quantize(x, unit=unit)
    bad = np.concatenate([x, np.full((*x.shape[:-1], 2), np.nan, np.float32)], axis=-1)
    made = fa.quantize(in_library(library, bad), unit=unit)
    assert np.isnan(in_numpy(made.values)[..., 16:]).all()
    np.testing.assert_array_equal(in_numpy(made.values)[..., :16], in_numpy(expected.values))
    np.testing.assert_array_equal(in_numpy(made.descale), expected.descale)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.value)
@pytest.mark.parametrize("spare", [1, 700])
def test_rows_of_no_sequence_become_zeros_whatever_they_hold(unit: ScaleUnit, spare: int, library: str):
    x, ends = normal(100, 2, 16), np.array([0, 30, 100], np.int32)
    expected = fa.quantize(x, unit=unit, cu_seqlens=ends, max_seqlen=70)
    wide = np.concatenate([x, np.full((spare, 2, 16), np.nan, np.float32)])
    made = fa.quantize(in_library(library, wide), unit=unit, cu_seqlens=in_library(library, ends), max_seqlen=70)
    assert (in_numpy(made.values)[100:] == 0).all()
    np.testing.assert_array_equal(in_numpy(made.values)[:100], in_numpy(expected.values))
    descale = in_numpy(made.descale)
    np.testing.assert_array_equal(descale[:100] if unit is ScaleUnit.TOKEN else descale, expected.descale)


@pytest.mark.torch
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.value)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_torch_gives_the_bits_of_numpy(unit: ScaleUnit, packed: bool):
    torch = pytest.importorskip("torch")
    x = normal(400, 4, 32) if packed else normal(2, 300, 4, 32)
    more: dict[str, Any] = {"unit": unit, "heads_kv": 2, "max_seqlen": 260 if packed else None}
    ours = fa.quantize(x, E5M2, cu_seqlens=ENDS if packed else None, **more)
    theirs = fa.quantize(torch.from_numpy(x), E5M2, cu_seqlens=torch.from_numpy(ENDS) if packed else None, **more)
    assert theirs.values.dtype is torch.float8_e5m2
    np.testing.assert_array_equal(theirs.values.view(torch.uint8).numpy(), ours.values.view(np.uint8))
    np.testing.assert_array_equal(theirs.descale.numpy(), ours.descale)
    assert theirs.descale.is_contiguous()


@pytest.mark.parametrize("width", [16, 48, 64, 96, 128, 192, 256])
def test_the_rotation_keeps_products_and_spreads_one_channel(width: int):
    q, k = normal(1, 3, 2, width), normal(1, 3, 2, width, seed=1)
    turned, other = fa.rotate_outliers(q), fa.rotate_outliers(k)
    np.testing.assert_allclose((turned * other).sum(-1), (q * k).sum(-1), rtol=1e-4, atol=1e-3)
    part = width & -width
    one = np.zeros((1, width), np.float32)
    one[0, 5] = 1
    np.testing.assert_allclose(np.abs(fa.rotate_outliers(one)).max(), 1 / np.sqrt(part), rtol=1e-5)
    mean = fa.rotate_outliers(np.ones((1, width), np.float32))
    assert np.abs(mean).max() <= np.sqrt(2) + 1e-5, "a channel mean became an outlier"


@pytest.mark.torch
def test_torch_turns_as_numpy_does():
    torch = pytest.importorskip("torch")
    x = normal(2, 5, 2, 96)
    np.testing.assert_array_equal(fa.rotate_outliers(torch.from_numpy(x)).numpy(), fa.rotate_outliers(x))
    assert fa.rotate_outliers(torch.from_numpy(x).bfloat16()).dtype is torch.bfloat16


@pytest.mark.torch
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.value)
def test_nothing_goes_from_the_host_to_the_device_of_a_tensor(unit: ScaleUnit):
    """A copy would wait for the device, and could not be captured in a CUDA graph."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    class OnlyMeta(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            devices = {each.device.type for each in args if isinstance(each, torch.Tensor) and each.shape}
            assert devices <= {"meta"}, f"{func} of a tensor on {devices}"
            return func(*args, **(kwargs or {}))

    with OnlyMeta():
        x = torch.empty(400, 4, 96, device="meta")
        turned = fa.rotate_outliers(x)
        fa.quantize(turned, unit=unit, cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta"), max_seqlen=260)


def offsets(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


X, PACKED = np.zeros((1, 4, 4, 16), np.float32), np.zeros((400, 4, 16), np.float32)
REFUSED: dict[str, tuple[type[Exception], str, Any]] = {
    "list": (fa.ArrayTypeError, "x: got builtins.list", lambda: fa.quantize([1.0])),
    "integers": (fa.DTypeError, "x: got type int32", lambda: fa.quantize(X.astype(np.int32))),
    "fp8 again": (fa.DTypeError, "x: got type float8_e4m3fn", lambda: fa.quantize(X.astype(DTYPES[E4M3]))),
    "wide dtype": (fa.DTypeError, "dtype: got <DType.F16", lambda: fa.quantize(X, DType.F16)),
    "unit": (fa.ArrayTypeError, "unit: got 'head'", lambda: fa.quantize(X, unit="head")),  # type: ignore[arg-type]
    "rank": (fa.ShapeError, r"x: got shape \(4, 4, 16\); allowed is \(batch", lambda: fa.quantize(X[0])),
    "packed rank": (fa.ShapeError, r"allowed is \(total, heads", lambda: fa.quantize(X, cu_seqlens=ENDS)),
    "heads": (fa.HeadCountError, "heads_kv: got 3 with 4 heads", lambda: fa.quantize(X, heads_kv=3)),
    "heads of no number": (fa.HeadCountError, "heads_kv: got 2.0 with 4 heads", lambda: fa.quantize(X, heads_kv=2.0)),  # type: ignore[arg-type]
    "longest": (fa.CuSeqlensError, "max_seqlen: got None", lambda: fa.quantize(PACKED, unit=ScaleUnit.BLOCK, cu_seqlens=ENDS)),
    "longest of a batch": (fa.CuSeqlensError, "max_seqlen: got it without cu_seqlens", lambda: fa.quantize(X, max_seqlen=3)),
    "offsets that fall": (fa.CuSeqlensError, r"cu_seqlens: got \[0, 30, 12\]", lambda: fa.quantize(PACKED, cu_seqlens=offsets(0, 30, 12))),
    "offsets past the end": (
        fa.CuSeqlensError,
        r"cu_seqlens: got \[0, 401\]; .*400 rows",
        lambda: fa.quantize(PACKED, cu_seqlens=offsets(0, 401)),
    ),
    "a late first": (fa.CuSeqlensError, r"cu_seqlens: got \[5, 40\]", lambda: fa.quantize(PACKED, cu_seqlens=offsets(5, 40))),
    "no offsets": (fa.CuSeqlensError, "cu_seqlens: got int32 of shape", lambda: fa.quantize(PACKED, cu_seqlens=offsets())),
    "no columns": (fa.ShapeError, "at least one head and column", lambda: fa.quantize(X[..., :0])),
    "heads of tokens": (fa.HeadCountError, "heads_kv: got 'x'", lambda: fa.quantize(X, unit=ScaleUnit.TOKEN, heads_kv="x")),  # type: ignore[arg-type]
    "too short": (
        *(fa.CuSeqlensError, "max_seqlen: got 259 with packed sequences of up to 260; allowed is the longest length"),
        lambda: fa.quantize(normal(400, 4, 16), unit=ScaleUnit.BLOCK, cu_seqlens=ENDS, max_seqlen=259),
    ),
    "negative": (
        *(fa.CuSeqlensError, "max_seqlen: got -3"),
        lambda: fa.quantize(X[0, :0], unit=ScaleUnit.BLOCK, cu_seqlens=np.zeros(2, np.int32), max_seqlen=-3),
    ),
    "offsets in a list": (
        fa.CuSeqlensError,
        "cu_seqlens: got list; allowed is an int32 array",
        lambda: fa.quantize(X[0], cu_seqlens=[0, 4]),
    ),
    "offsets of two dimensions": (fa.CuSeqlensError, r"got int32 of shape \(1, 4\)", lambda: fa.quantize(X[0], cu_seqlens=ENDS[None])),
    "a number to be turned": (fa.ShapeError, r"x: got shape \(\)", lambda: fa.rotate_outliers(np.array(1, np.float32))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantised_is_refused(name: str):
    error, message, make = REFUSED[name]
    with pytest.raises(error, match=message):
        make()
