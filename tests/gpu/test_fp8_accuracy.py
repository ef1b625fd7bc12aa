"""How accurate fp8 is on the device: over spreads of scores, long rows, needles, outlier channels, and on every entry.

Each with 8-bit wgmma (dense requests) and with mma.sync (a contiguous cache), against float64 on the values that the elements mean. The
properties are those of tests/reference/test_fp8_accuracy.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn import DType, Fp8Options, ScaleUnit  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from tests.fp8_entries import ENTRIES, causal_by_entry  # noqa: E402
from tests.gpu.families import DEVICE, HAS_FP8  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with fp8")]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KINDS = {"argvalues": [E4M3, E5M2], "ids": ["e4m3", "e5m2"]}
HEADROOM = {E4M3: 2.0**8, E5M2: 2.0**15}  # P is rounded in this unit of its largest
ROWS = 256
CHUNK = 16384  # keys at once in float64


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def attend(family: Family, q: Any, k: Any, v: Any, scale: float | None = None, **descales: Any) -> tuple[Any, Any]:
    """o in float32 and the LSE."""
    more = {"fp8": Fp8Options(**descales, out_dtype=DType.F32), "options": fa.AttentionOptions(softmax_scale=scale)}
    if family is Family.FA3:
        made = fa.run(fa.DenseFwdRequest(q, k, v, **more))
    else:
        lengths = torch.full((len(k),), k.shape[1], dtype=torch.int32, device=DEVICE)
        made = fa.run(fa.CachedFwdRequest(q, k, v, lengths, **more))
    return made.out, made.lse


def exact(q: Any, k: Any, v: Any, scale: float | None = None) -> Any:
    """O in float64, keys chunk by chunk."""
    wide = q.double().transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    top = torch.full(wide.shape[:-1], -torch.inf, dtype=torch.float64, device=DEVICE)
    total, out = torch.zeros_like(top), torch.zeros(*top.shape, v.shape[-1], dtype=torch.float64, device=DEVICE)
    for begin in range(0, k.shape[1], CHUNK):
        keys, values = (x[:, begin : begin + CHUNK].double().transpose(1, 2) for x in (k, v))
        scores = wide @ keys.transpose(-1, -2)
        peak = torch.maximum(top, scores.amax(-1))
        weights, decay = torch.exp(scores - peak[..., None]), torch.exp(top - peak)
        total, out, top = total * decay + weights.sum(-1), out * decay[..., None] + weights @ values, peak
    return (out / total[..., None]).transpose(1, 2)


def relative(made: Any, right: Any) -> float:
    return float((made.double() - right).norm() / right.norm())


def error_at(family: Family, kind: Any, std: float, *, rising: bool) -> float:
    """Relative error with scores of this standard deviation; ``rising``: keys in the order of their score with the first query."""
    q, k, v = (normal(1, 256 if not n else 2048, 2, 64, seed=n) for n in range(3))
    if rising:
        q = q[:, :1] + 0.1 * q
        order = (q[0, 0, 0] * k[0, :, 0]).sum(-1).argsort()
        k, v = k[:, order], v[:, order]
    arrays = [x.to(kind) for x in (q, k, v)]
    return relative(attend(family, *arrays, std / 8)[0], exact(*arrays, std / 8))


@pytest.mark.parametrize("rising", [False, True], ids=["any order", "rising keys"])
def test_the_error_does_not_grow_with_the_spread_of_scores(family: Family, rising: bool) -> None:
    errors = {kind: [error_at(family, kind, std, rising=rising) for std in (0.25, 0.5, 1, 2, 4)] for kind in (E4M3, E5M2)}
    for kind, bits in ((E4M3, 4), (E5M2, 3)):  # where all probabilities lie just above a power of two, the rms of their roundings is this
        assert max(errors[kind]) < 2.0**-bits / np.sqrt(3), errors
    for fine, coarse in zip(errors[E4M3], errors[E5M2], strict=True):
        assert fine < coarse, errors


def error_of_ones(family: Family, kind: Any, std: float, keys: int) -> tuple[float, float]:
    """The largest |o - 1| of rows over V = 1, and that of P rounded alike and summed in float64, whose tiles come in one of five orders."""
    q, k = (std * normal(1, ROWS, 1, 16)).to(kind), normal(1, keys, 1, 16, seed=1).to(kind)
    out, _ = attend(family, q, k, torch.ones(1, keys, 1, 16, device=DEVICE).to(kind), 0.25)
    score = 0.25 * q[0, :, 0].double() @ k[0, :, 0].double().T
    denominator = torch.exp(score - score.amax(1, keepdim=True)).sum(1)
    orders = [tiles[::step] for tiles in (score.split(64, dim=1), score.split(128, dim=1)) for step in (1, -1)]
    errors = [(_rounded_sum(tiles, kind) / denominator - 1).abs().max() for tiles in (*orders, [score])]
    return float((out - 1).abs().max()), float(max(errors))


def _rounded_sum(tiles: Any, kind: Any) -> Any:
    """Of P (rows,), rounded against the largest score so far, relative to the largest of all."""
    total, top = torch.zeros(ROWS, device=DEVICE).double(), torch.full((ROWS,), -torch.inf, device=DEVICE).double()
    for tile in tiles:
        peak = torch.maximum(top, tile.amax(1))
        rounded = (torch.exp(tile - peak[:, None]) * HEADROOM[kind]).float().to(kind).double() / HEADROOM[kind]
        total, top = total * torch.exp(top - peak) + rounded.sum(1), peak
    return total


@pytest.mark.parametrize("kind", **KINDS)
@pytest.mark.parametrize("std", [0.0, 0.5, 2.0, 8.0], ids=["uniform", "diffuse", "between", "peaked"])
def test_an_average_of_ones_is_one(family: Family, kind: Any, std: float) -> None:
    """The hardest is a standard deviation of 2: half of the sum comes from probabilities below a twentieth of the largest.

    With wgmma O of e5m2 is divided by the sum of P as it was rounded, so that nothing is left but float32's own roundings.
    """
    for keys in (128, 4096, 32768, 131072):
        made, plain = error_of_ones(family, kind, std, keys)
        floor = 1e-5 if family is Family.FA3 else 4e-3
        limit = floor if family is Family.FA3 and kind is E5M2 else max(floor, 1.1 * plain)
        assert made <= limit, f"{keys} keys: {made:.5f}, plain {plain:.5f}"


def test_a_rotation_at_least_halves_the_error_of_outlier_channels(family: Family) -> None:
    q, k, v = (normal(1, 256 if not n else 1024, 2, 128, seed=n) for n in range(3))
    for x in (q, k):
        x[..., [3, 40, 77]] *= 10
    right = exact(q, k, v, 0.01)

    def error(q: Any, k: Any) -> float:
        (q8, q_descale), (k8, k_descale), (v8, v_descale) = (fa.quantize(x, unit=ScaleUnit.TENSOR) for x in (q, k, v))
        return relative(attend(family, q8, k8, v8, 0.01, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)[0], right)

    plain, turned = error(q, k), error(fa.rotate_outliers(q), fa.rotate_outliers(k))
    assert turned <= plain / 2, (plain, turned)


@pytest.mark.parametrize("keys", [1 << 10, 1 << 14, 1 << 18])
@pytest.mark.parametrize("kind", **KINDS)
def test_a_needle_is_found_in_uniform_noise(family: Family, kind: Any, keys: int) -> None:
    q, (k, v) = torch.ones(1, 64, 1, 16, device=DEVICE), (2 * torch.rand(2, 1, keys, 1, 16, device=DEVICE) - 1)
    place = keys // 3
    k[0, place], v[0, place] = 4, 2
    arrays = [x.to(kind) for x in (q, k, v)]
    out, right = attend(family, *arrays, 0.25)[0], exact(*arrays, 0.25)
    assert float(right.min()) > 1.9
    assert float((out - right).abs().max()) < 0.02


def test_the_mean_of_ones_with_noise_is_kept_as_well_at_128k_keys_as_at_4k(family: Family) -> None:
    """8-bit wgmma drops half a unit of an addend on average, 2^-14 of the power of two below the sum so far.

    A sum of 512 equal addends is 256 of them on average, and the power of two below it 0.72 of that: 1.1 %, if addends had many bits.
    Products of e4m3 have 6 after the leading one, of which none or one is dropped there: about half of it (0.54 % in the model).
    """
    lost = {}
    for keys in (4096, 131072):
        arrays = [
            x.to(E4M3) for x in (normal(1, 64, 1, 64), 0.1 * normal(1, keys, 1, 64, seed=1), 1 + 0.25 * normal(1, keys, 1, 64, seed=2))
        ]
        right = exact(*arrays)
        lost[keys] = float(((attend(family, *arrays)[0] - right) / right).abs().max())
    assert lost[4096] < (8e-3 if family is Family.FA3 else 2e-3), lost
    assert lost[131072] < 1.1 * lost[4096], lost


@pytest.mark.parametrize("keys", [150_000, 164_000, 262_144, 1 << 20])
def test_keys_in_three_parts_that_are_merged_answer_as_in_one(family: Family, keys: int) -> None:
    """Bits differ, since maxima of parts do, and with them the roundings of P."""
    q, k, v = (x.to(E4M3) for x in (normal(1, 16, 1, 64), normal(1, keys, 1, 64, seed=1), 1 + 0.25 * normal(1, keys, 1, 64, seed=2)))
    out, lse = attend(family, q, k, v)
    made: tuple[Any, Any] | None = None
    for begin, end in ((0, 70_000), (70_000, 133_337), (133_337, keys)):
        part = attend(family, q, k[:, begin:end], v[:, begin:end])
        made = part if made is None else fa.merge_states(*made, *part)
    assert made is not None
    assert float((made[0] - out).abs().max()) < 4e-3
    assert float((made[1] - lse).abs().max()) < 1e-4


@pytest.mark.parametrize("seqlen", [256, 257, 384, 640, 1024])
@pytest.mark.parametrize("window", [128, 256, 511])
@pytest.mark.parametrize("kind", [E4M3, torch.bfloat16], ids=["q e4m3", "q bf16"])
def test_windows_end_on_a_cache(seqlen: int, window: int, kind: Any) -> None:
    q, (k, v) = normal(1, seqlen, 4, 64).to(kind), (normal(1, seqlen, 2, 64, seed=seed).to(E4M3) for seed in (1, 2))
    out = fa.flash_attn_with_kvcache(q, k, v, causal=True, window_size=(window, 0))
    keys, values = (x[0].double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q[0].double(), keys) / 8
    behind = torch.arange(seqlen, device=DEVICE)[:, None] - torch.arange(seqlen, device=DEVICE)
    scores.masked_fill_((behind < 0) | (behind > window), -torch.inf)
    assert relative(out[0], torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)) < (0.035 if kind is E4M3 else 0.006)


@pytest.mark.parametrize("entry", [*ENTRIES, "16-bit q"])
def test_descales_by_head_equal_the_values_on_every_entry(entry: str) -> None:
    factors = torch.tensor([[0.25, 0.5, 3]], device=DEVICE)
    descale = dict.fromkeys(("q_descale", "k_descale", "v_descale"), factors)
    q, k, v = (normal(1, 64, 3, 32, seed=seed).to(E4M3) for seed in range(3))
    wide = [(x.float() * factors[0, :, None]).to(torch.bfloat16) for x in (q, k, v)]
    right = fa.flash_attn_func(*wide, causal=True).double()
    if entry == "16-bit q":
        del descale["q_descale"]
        made = fa.flash_attn_with_kvcache(wide[0], k, v, causal=True, **descale)
    else:
        ends, table = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE), torch.arange(4, dtype=torch.int32, device=DEVICE)[None]
        empty = torch.zeros(1, 64, 3, 32, device=DEVICE).to(E4M3), torch.zeros(1, 64, 3, 32, device=DEVICE).to(E4M3)
        made = causal_by_entry(entry, q, k, v, descale, ends=ends, table=table, empty=empty)
    assert relative(made, right) < (0.006 if entry == "16-bit q" else 0.03)
