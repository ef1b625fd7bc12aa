"""Calls over a cache of fp8 K and V on the device: the rows of tests/kv_cache/test_fp8_cache.py, and wide heads, splits and graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn import DType, ScaleUnit  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.runtime import execute  # noqa: E402
from tests.gpu.families import DEVICE, HAS_FP8  # noqa: E402
from tests.gpu.harness import poison_workspaces  # noqa: E402
from tests.kv_cache import cases  # noqa: E402
from tests.kv_cache.kernel_cases import FP8_APPENDS, check_fp8_append  # noqa: E402
from tests.kv_cache.test_fp8_cache import AXES, check_row  # noqa: E402
from tests.pairwise import covering_rows  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with fp8")]

GPU = DEVICE != "cpu"
E4M3, E5M2 = DType.F8E4M3, DType.F8E5M2
B, HQ, HKV, PAGE = 4, 32, 8, 64


@pytest.fixture
def family() -> Family:
    """That of most of these calls; many queries of fp8 take wgmma on Hopper."""
    return Family.FA2


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are made on the device, and every workspace is full of NaN before a call."""
    monkeypatch.setattr(cases, "DEVICE", DEVICE)
    poison_workspaces(monkeypatch, execute)


@pytest.mark.parametrize("row", covering_rows(AXES), ids=lambda row: "-".join(str(getattr(x, "value", x)) for x in row.values()))
def test_a_cache_is_read_with_its_descales(row: dict[str, Any]) -> None:
    if GPU and row["order"] == {"batch_invariant": True} and row["v_unit"] is ScaleUnit.TOKEN and row["cache"]["block_size"]:
        with pytest.raises(fa.FeatureNotBuiltError, match="invariant_token_scales"):
            check_row(row)
        return
    check_row(row)


@pytest.mark.parametrize("name", FP8_APPENDS)
def test_new_tokens_are_quantised_and_attended(name: str) -> None:
    check_fp8_append(**FP8_APPENDS[name])


def paged(length: int, width: int, kind: Any) -> tuple[Any, Any, Any, Any]:
    """K and V (pages, PAGE, HKV, width) of standard normal numbers, their table, and lengths up to ``length``."""
    torch.manual_seed(length + width)
    count = -(-length // PAGE)
    k, v = (torch.randn(B * count, PAGE, HKV, width, device=DEVICE).to(kind) for _ in range(2))
    table = torch.randperm(B * count, device=DEVICE, dtype=torch.int32).reshape(B, count)
    lengths = torch.tensor([length - 13 * i for i in range(B)], device=DEVICE, dtype=torch.int32)
    return k, v, table, lengths


def expected(q: Any, cache: tuple[Any, Any, Any, Any], k_descale: Any, v_descale: Any) -> Any:
    """Attention over the values in float64."""
    k, v, table, lengths = cache
    rows = []
    for b in range(B):
        n, pages = int(lengths[b]), table[b].long()
        keys, values = (
            (x[pages].double().flatten(0, 1)[:n] * scale[b][:, None].double()).repeat_interleave(HQ // HKV, dim=1)
            for x, scale in ((k, k_descale), (v, v_descale))
        )
        scores = torch.einsum("qhd,khd->hqk", q[b].double(), keys) * q.shape[-1] ** -0.5
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.stack(rows)


@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("splits", [1, 0])
@pytest.mark.parametrize("narrow_q", [False, True])
def test_every_width_of_a_long_cache(width: int, splits: int, narrow_q: bool) -> None:
    kind = torch.float8_e4m3fn
    cache = k, v, table, lengths = paged(2000, width, kind)
    q = torch.randn(B, 1, HQ, width, device=DEVICE).to(kind if narrow_q else torch.bfloat16)
    k_descale, v_descale = (torch.rand(B, HKV, device=DEVICE) + 0.5 for _ in range(2))
    out = fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, block_table=table, num_splits=splits, k_descale=k_descale, v_descale=v_descale
    )
    assert out.dtype is torch.bfloat16
    right = expected(q, cache, k_descale, v_descale)
    error = float((out.double() - right).norm() / right.norm())
    assert error < (0.03 if narrow_q else 0.006), f"relative error {error:.4f}"


@pytest.mark.skipif(not GPU, reason="about graphs of a GPU")
def test_a_graph_reads_descales_of_now() -> None:
    k, v, table, lengths = paged(700, 128, torch.float8_e4m3fn)
    q = torch.randn(B, 1, HQ, 128, device=DEVICE, dtype=torch.bfloat16)
    scale = torch.ones(B, HKV, device=DEVICE)

    def call() -> Any:
        return fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table, k_descale=scale, v_descale=scale)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    scale.fill_(0.5)
    graph.replay()
    np.testing.assert_array_equal(out.float().cpu().numpy(), call().float().cpu().numpy())
