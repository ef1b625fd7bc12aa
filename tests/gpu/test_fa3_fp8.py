"""fp8 of the wgmma family on the card: features, types, tile edges, bits, and sums of many keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.dispatch import DispatchKey, lookup  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec  # noqa: E402
from atomr_accel_flashattn.requests.dense import DenseFwdRequest  # noqa: E402
from atomr_accel_flashattn.requests.options import Fp8Options, MaskKind  # noqa: E402
from atomr_accel_flashattn.runtime.execute import run  # noqa: E402
from atomr_accel_flashattn.types import DType, SmArch  # noqa: E402
from atomr_accel_flashattn.with_kvcache import flash_attn_with_kvcache  # noqa: E402
from tests.cases import Case, Values  # noqa: E402
from tests.fp8_accumulator import sums_of_tiles  # noqa: E402
from tests.fp8_cases import BLOCK_TYPES, FP8_FEATURES, FP8_KINDS, Fp8Types, fp8_call  # noqa: E402
from tests.gpu.families import DEVICE, HAS_WGMMA, blocks_for, use_family  # noqa: E402
from tests.gpu.fp8_calls import check, request_of  # noqa: E402
from tests.gpu.harness import download  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(not HAS_WGMMA, reason="needs a GPU with wgmma")]

WIDTHS = (16, 64, 96, 128, 192, 256)


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> Iterator[Family]:
    """Half of the tests see a card of three SMs, where blocks are persistent."""
    record_property("family", Family.FA3.value)
    with use_family(Family.FA3, monkeypatch, blocks_for(request.node.nodeid)):
        yield Family.FA3


# Every feature at every width in e4m3, and in every other kind at one of them.
ROWS = [(name, width, FP8_KINDS[0]) for name in FP8_FEATURES for width in WIDTHS] + [
    (name, WIDTHS[(i + j) % len(WIDTHS)], types)
    for i, name in enumerate(FP8_FEATURES)
    for j, types in enumerate((*FP8_KINDS[1:], BLOCK_TYPES))
]


@pytest.mark.parametrize(("name", "width", "types"), ROWS, ids=str)
def test_feature(name: str, width: int, types: Fp8Types) -> None:
    widths = {} if "head_dim" in FP8_FEATURES[name] else {"head_dim": width, "v_head_dim": width}
    case = Case(label=name.replace(" ", "_"), **FP8_FEATURES[name], **widths)
    check(case, types)


def edge_cases() -> Iterator[Case]:
    """Lengths around multiples of a kernel's tile, of two packed heads too."""
    for width in (64, 128, 192, 256):
        spec = lookup(DispatchKey(SmArch.SM_90A, DType.F8E4M3, width))
        assert isinstance(spec, KernelSpec)
        for i, (times, off_q, off_k) in enumerate(itertools.product((1, 2), (-1, 0, 1), (-1, 0, 1))):
            heads, packed = ((3, 1), (2, 2))[i % 2]
            mask: dict[str, Any] = ({}, {"right": 0}, {"left": spec.tile.block_n, "right": 0})[i % 3]
            lengths = {"seqlen_q": spec.tile.block_m * times // packed + off_q, "seqlen_k": spec.tile.block_n * times + off_k}
            yield Case(heads=heads, heads_kv=1, head_dim=width, v_head_dim=width, **lengths, **mask)


@pytest.mark.parametrize("case", [*edge_cases()] if HAS_WGMMA else [], ids=str)
def test_lengths_around_every_tile_edge(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("seqlen", [256, 257, 384, 640, 1024])
@pytest.mark.parametrize("left", [128, 256, 511])
def test_windows_end(seqlen: int, left: int) -> None:
    case = Case(seqlen_q=seqlen, seqlen_k=seqlen, head_dim=128, v_head_dim=128, left=left, right=0)
    check(case)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_maxima_that_rise_in_every_tile_clip_no_probability(width: int) -> None:
    case = Case(seqlen_q=300, seqlen_k=4000, head_dim=width, v_head_dim=width, values=Values.RISING)
    check(case)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_bits_do_not_depend_on_the_run(width: int) -> None:
    case = Case(batch=3, seqlen_q=1300, seqlen_k=5300, heads=8, heads_kv=2, head_dim=width, v_head_dim=width, right=0)
    request = request_of(fp8_call(case, Fp8Types()), DType.BF16)
    expected = download(run(request).out).tobytes()
    for _ in range(30):
        assert download(run(request).out).tobytes() == expected


def means(keys: int, width: int, *, single_level: bool = False) -> tuple[Any, Any, Any]:
    """With q = 0, v (keys, d) of 1 + noise, o of one row of one head, which is the mean of v, and the kernel."""
    q = torch.zeros(1, 128, 2, width, device=DEVICE).to(torch.float8_e4m3fn)
    k = torch.zeros(1, keys, 2, width, device=DEVICE).to(torch.float8_e4m3fn)
    torch.manual_seed(keys + width)
    v = (1 + torch.randn(1, keys, 2, width, device=DEVICE) / 4).to(torch.float8_e4m3fn)
    request = DenseFwdRequest(q, k, v, fp8=Fp8Options(out_dtype=DType.F32, single_level=single_level))
    out = run(request).out
    assert bool((out == out[:, :1]).all())
    return v[0, :, 1].double(), out[0, 0, 1].double(), lookup(request.dispatch_key())


@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_mean_of_many_values_is_kept(width: int) -> None:
    """As well at 128k keys as at 4k.

    All p are 2^8, so that n keys add up to 2^8 n, and an addend keeps what is above 2^(log2(n) - 5) of it (13 bits below the leading
    one of the sum). Elements of v are multiples of 1/8 from 1 on and of 1/16 from 1/2 on, times 2^8: of the former nothing is lost
    below 2048 keys, of the latter, half of all, nothing below 1024: nothing in a sum over one tile.
    """
    lost = {}
    for keys in (4096, 131072):
        v, out, _ = means(keys, width)
        lost[keys] = ((out - v.mean(dim=0)) / v.mean(dim=0)).abs().max().item()
    assert lost[4096] < 5e-4, lost
    assert lost[131072] < 1.1 * lost[4096] + 1e-4, lost


@pytest.mark.parametrize("width", [64, 128, 256])
def test_an_accumulator_by_itself_loses_what_its_model_says(width: int) -> None:
    """tests/fp8_accumulator.py, which bounds other tests, says it of this device."""
    v, out, spec = means(16384, width, single_level=True)
    assert spec.single_level
    model = sums_of_tiles(download(v), spec.tile.block_n) / (2.0**8 * 16384)
    assert float(np.abs(1 - model / download(v).mean(axis=0)).min()) > 0.05
    np.testing.assert_allclose(download(out), model, rtol=1e-3)


@pytest.mark.parametrize("keys", [1024, 16384, 262144])
def test_a_needle_is_found_in_noise(keys: int) -> None:
    """A key that has half of the weight of a row, among equal ones."""
    width = 128
    q, k = torch.zeros(1, 64, 1, width, device=DEVICE), torch.zeros(1, keys, 1, width, device=DEVICE)
    q[..., 0], v = 16, torch.randn(1, keys, 1, width, device=DEVICE) / 8
    needle = keys // 3
    k[:, needle, :, 0], v[:, needle] = float(np.log(keys)) / 16 * width**0.5, 4
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    out = run(DenseFwdRequest(q, k, v, mask=MaskKind.full(), fp8=Fp8Options(out_dtype=DType.F32))).out
    score = q.float()[0, 0, 0] @ k.float()[0, :, 0].T * width**-0.5
    expected = torch.softmax(score.double(), 0) @ v.double()[0, :, 0]
    assert ((out.double() - expected).abs().max() / expected.abs().max()).item() < 0.02


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("page", [None, 16, 128])
@pytest.mark.parametrize("blocks", [False, True])
def test_many_rows_on_a_cache(width: int, splits: int, page: int | None, blocks: bool) -> None:
    """Prefill on an fp8 cache: pages, or the rows of a contiguous cache, with factors by KV head or block of 128 tokens."""
    batch, heads, heads_kv, longest, kind = 2, 4, 2, 1024, torch.float8_e4m3fn
    torch.manual_seed(width + splits)
    q = torch.randn(batch, 200, heads, width, device=DEVICE).to(kind)
    k, v = (torch.randn(batch, longest, heads_kv, width, device=DEVICE).to(kind) for _ in range(2))
    lengths = torch.tensor([longest, 777], device=DEVICE, dtype=torch.int32)
    units = (longest // 128,) if blocks else ()
    k_descale, v_descale = (torch.rand(batch, heads_kv, *units, device=DEVICE) + 0.5 for _ in range(2))
    table = None if page is None else torch.randperm(batch * longest // page, device=DEVICE, dtype=torch.int32).reshape(batch, -1)
    stored = [k, v]
    if page is not None and table is not None:
        stored = [torch.empty(batch * longest // page, page, heads_kv, width, device=DEVICE, dtype=kind) for _ in range(2)]
        for paged, plain in zip(stored, (k, v), strict=True):
            paged.view(torch.int8)[table.long().flatten()] = plain.view(torch.int8).reshape(paged.shape)
    out = flash_attn_with_kvcache(
        q, *stored, cache_seqlens=lengths, block_table=table, causal=True, num_splits=splits, k_descale=k_descale, v_descale=v_descale
    )
    for b in range(batch):
        n = int(lengths[b])
        keys, values = (
            (x[b].double() * _of_tokens(scale[b], longest)).repeat_interleave(heads // heads_kv, dim=1)[:n]
            for x, scale in ((k, k_descale), (v, v_descale))
        )
        scores = torch.einsum("qhd,khd->hqk", q[b].double(), keys) * width**-0.5
        hidden = torch.arange(n, device=DEVICE)[None] > torch.arange(200, device=DEVICE)[:, None] + n - 200
        right = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)
        assert float((out[b].double() - right).norm() / right.norm()) < 0.035


def _of_tokens(scale: Any, tokens: int) -> Any:
    """A factor of each token and KV head, (tokens, Hkv, 1), from (Hkv,) or (Hkv, blocks)."""
    each = scale[:, None].expand(-1, tokens) if scale.dim() == 1 else scale.repeat_interleave(128, dim=1)
    return each.T[..., None].double()
