"""Few queries on many keys: dense and packed calls whose keys are split over blocks, on the card as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from tests.cases import Alibi, Case, build  # noqa: E402
from tests.check import check_case  # noqa: E402
from tests.gpu.families import DEVICE, HAS_WGMMA, use_family  # noqa: E402
from tests.gpu.harness import functional_call, make_request, run_inputs  # noqa: E402
from tests.unowned import run_with_unowned  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(not HAS_WGMMA, reason="wgmma is of Hopper")]


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch, record_property: Any) -> Iterator[Family]:
    """The one that splits them."""
    record_property("family", Family.FA3.value)
    with use_family(Family.FA3, monkeypatch):
        yield Family.FA3


LONG = Case(heads=8, heads_kv=2, head_dim=128, v_head_dim=128, seqlen_q=16, seqlen_k=5001, right=0)
CASES = [
    LONG,
    replace(LONG, seqlen_q=1, right=None),
    replace(LONG, seqlen_q=130, head_dim=64, v_head_dim=64, left=3000, sink_tokens=5),
    replace(LONG, heads=3, heads_kv=3, head_dim=256, v_head_dim=256, learned_sink=True),
    replace(LONG, head_dim=192, v_head_dim=128, softcap=20.0),
    replace(LONG, head_dim=96, v_head_dim=96, alibi=Alibi.HEADS, softmax_scale=-0.1),
    replace(LONG, head_dim=40, v_head_dim=24, softmax_scale=0.0),
    replace(LONG, seqlen_q=600, seqlen_k=4100, heads=2, heads_kv=1, right=3),
    replace(LONG, lengths_q=(7, 0, 64), lengths_k=(4000, 30, 5), learned_sink=True),
    replace(LONG, lengths_q=(3, 200), lengths_k=(2500, 4100), left=1700, sink_tokens=70, softcap=15.0),
]
WIDTHS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (64, 256), (192, 192), (256, 256)]


def is_split(case: Case) -> bool:
    spec: Any = fa.lookup(make_request(build(case)).dispatch_key())
    return bool(spec.HEADER == "fa3_kvcache" and spec.split and spec.plain_kv)


@pytest.mark.parametrize("dtype", [fa.DType.F16, fa.DType.BF16], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_split_features(case: Case, dtype: fa.DType):
    case = replace(case, dtype=dtype)
    assert is_split(case)
    check_case(case, run_inputs)


@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("keys", [1500, 2049, 4096, 9999])
def test_plain_split_widths_and_lengths(width: tuple[int, int], keys: int):
    case = replace(LONG, seqlen_k=keys, head_dim=width[0], v_head_dim=width[1], dtype=fa.DType.BF16)
    if keys > 2000:
        assert is_split(case)
    check_case(case, run_inputs)


def test_plain_split_rows_that_no_sequence_owns():
    """Compared with the oracle: bits may differ, as spare rows count where a call asks into how many parts its keys are worth splitting."""
    case = replace(LONG, lengths_q=(9, 0, 30), lengths_k=(4000, 20, 333))
    check_case(case, lambda inputs: run_with_unowned(inputs, run_inputs))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_plain_split_bits_are_equal_from_run_to_run(case: Case):
    call = functional_call(build(case))
    first = call().clone()
    for _ in range(30):
        assert torch.equal(call(), first)


def test_plain_split_captured_call_equals_eager():
    call = functional_call(build(LONG))
    eager = [call() for _ in range(2)][-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)


def test_plain_split_calls_on_two_streams_share_no_parts():
    inputs = [torch.randn(1, rows, heads, 128, device=DEVICE, dtype=torch.bfloat16) for rows, heads in ((16, 8), (8000, 2), (8000, 2))]
    expected = fa.flash_attn_func(*inputs)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    made = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                made.append(fa.flash_attn_func(*inputs))
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in made)


@pytest.mark.parametrize("compiled", [False, True])
def test_plain_split_gradients(compiled: bool):
    generator = torch.Generator(device=DEVICE).manual_seed(3)
    sizes = ((1, 16, 8, 64), (1, 4000, 2, 64), (1, 4000, 2, 64))
    leaves = [torch.randn(*size, generator=generator, device=DEVICE, dtype=torch.float16).requires_grad_() for size in sizes]

    def attend(q: Any, k: Any, v: Any) -> Any:
        return fa.flash_attn_func(q, k, v, causal=True)

    call = torch.compile(attend, fullgraph=True) if compiled else attend
    dout = torch.randn(1, 16, 8, 64, generator=generator, device=DEVICE, dtype=torch.float16)
    for _ in range(3):
        found = torch.autograd.grad(call(*leaves), leaves, dout)
    q, k, v = (x.detach().double().transpose(1, 2).requires_grad_() for x in leaves)
    keys, values = (x.repeat_interleave(4, 1) for x in (k, v))
    seen = torch.ones(16, 4000, dtype=torch.bool, device=DEVICE).tril(4000 - 16)
    right = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    wanted = torch.autograd.grad(right, (q, k, v), dout.double().transpose(1, 2))
    for made, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(made.double().cpu(), other.transpose(1, 2).cpu(), rtol=2e-2, atol=2e-3)
