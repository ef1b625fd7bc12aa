"""Batch invariance on the device: a row has the same bits in every call that asks it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from tests.gpu.families import DEVICE, HAS_FP8  # noqa: E402
from tests.kv_cache import cases  # noqa: E402
from tests.kv_cache.invariant_cases import CASES, WAYS, Asked, check_against_plain, check_way, dense  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

LONG = (
    Asked(name="long", tokens=2100, heads=8, heads_kv=1, head_dim=128, loud=(77, 1500), bfloat16=True),
    Asked(name="long window", tokens=2100, heads=6, heads_kv=2, head_dim=64, mask=fa.MaskKind.sliding_causal(700), sink_tokens=100),
    Asked(name="long and wide", tokens=1300, heads=4, heads_kv=1, head_dim=256, learned_sink=True, loud=(1000,)),
    Asked(name="long, 96", tokens=1300, heads=5, heads_kv=1, head_dim=96, slopes=True, bfloat16=True),
    Asked(name="long, 192", tokens=1300, heads=2, heads_kv=1, head_dim=192, softcap=15.0),
)


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "DEVICE", DEVICE)


@pytest.mark.parametrize("asked", [each for each in (*CASES, *LONG) if HAS_FP8 or not each.fp8], ids=str)
def test_a_row_has_the_same_bits_in_every_call(asked: Asked):
    whole = dense(asked)
    check_against_plain(asked, whole)
    assert sum(check_way(asked, way, whole) for way in WAYS) > 3 * asked.tokens


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 64])
def test_identical_requests_give_identical_rows(batch: int):
    """q of 1 to 9 tokens a request, decoding side by side."""
    random = np.random.default_rng(batch)
    k, v = (cases.upload(random.standard_normal((40, 16, 2, 64)).astype(np.float16)) for _ in "kv")
    for tokens in range(1, 10):
        q = np.repeat(random.standard_normal((1, tokens, 8, 64)).astype(np.float16), batch, 0)
        table, lengths = np.repeat(random.permutation(40)[None, :30].astype(np.int32), batch, 0), np.full(batch, 471, np.int32)
        options = fa.AttentionOptions(batch_invariant=True)
        arrays: list[Any] = [cases.upload(x) for x in (table, lengths)]
        made = fa.run(fa.PagedAttentionRequest(cases.upload(q), k, v, *arrays, mask=fa.MaskKind.causal(), options=options))
        assert len({each.tobytes() for each in cases.download(made.out)}) == 1
        last = fa.run(
            fa.PagedAttentionRequest(
                cases.upload(q[:1, -1:]), k, v, arrays[0][:1], arrays[1][:1], mask=fa.MaskKind.causal(), options=options
            )
        )
        assert cases.download(last.out)[0, -1].tobytes() == cases.download(made.out)[0, -1].tobytes()


def test_a_captured_decode_has_the_bits_of_an_eager_prefill():
    if DEVICE == "cpu":
        pytest.skip("CUDA graphs")
    random = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(random.standard_normal((300, heads, 128)).astype(np.float16)).to(DEVICE) for heads in (8, 2, 2))
    options = fa.AttentionOptions(batch_invariant=True)
    whole = fa.run(fa.DenseFwdRequest(q[None], k[None], v[None], mask=fa.MaskKind.causal(), options=options)).out[0]
    pages = [x.new_zeros(20, 16, 2, 128) for x in (k, v)]
    for pool, x in zip(pages, (k, v), strict=True):
        pool.view(-1, 2, 128)[:300] = x
    table, lengths = torch.arange(20, dtype=torch.int32, device=DEVICE)[None], torch.ones(1, dtype=torch.int32, device=DEVICE)
    token = q[None, :1].clone()
    call = lambda: fa.flash_attn_with_kvcache(token, *pages, cache_seqlens=lengths, block_table=table, causal=True, batch_invariant=True)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    for at in (0, 1, 31, 32, 150, 299):
        token.copy_(q[None, at : at + 1])
        lengths.fill_(at + 1)
        graph.replay()
        assert torch.equal(made[0, 0], whole[at])
