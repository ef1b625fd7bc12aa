"""PyTorch as a second oracle, for the features that its scaled_dot_product_attention has: it shares neither code nor author with ours."""

from __future__ import annotations

import numpy as np
import pytest

from atomr_accel_flashattn.types import DType
from tests.cases import Alibi, Case, build
from tests.oracle import oracle

from .running import run_reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

CASES = [
    Case(dtype=DType.F64, batch=2, heads=4, heads_kv=4, seqlen_q=70, seqlen_k=70),
    Case(dtype=DType.F64, batch=2, heads=6, heads_kv=2, seqlen_q=70, seqlen_k=130, right=0),
    Case(dtype=DType.F64, heads=8, heads_kv=1, seqlen_q=33, seqlen_k=300, left=20, right=5, head_dim=40, v_head_dim=72),
    Case(dtype=DType.F64, heads=3, heads_kv=3, seqlen_q=90, seqlen_k=90, left=9, right=0, sink_tokens=4, softmax_scale=-0.3),
    Case(dtype=DType.F64, batch=2, heads=4, heads_kv=2, seqlen_q=50, seqlen_k=80, alibi=Alibi.BATCH, right=0),
    Case(dtype=DType.F64, heads=4, heads_kv=4, seqlen_q=50, seqlen_k=80, alibi=Alibi.HEADS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_and_backend_agree_with_sdpa(case: Case) -> None:
    inputs = build(case)
    q, k, v = (torch.from_numpy(np.ascontiguousarray(array)).transpose(1, 2) for array in (inputs.q, inputs.k, inputs.v))
    distance = torch.arange(case.seqlen_k) - (torch.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if case.right is not None:
        visible &= distance <= case.right
    if case.left is not None:
        visible &= (distance >= -case.left) | (torch.arange(case.seqlen_k) < case.sink_tokens)
    bias = torch.zeros(case.batch, case.heads, *distance.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    if inputs.alibi_slopes is not None:
        slopes = torch.from_numpy(inputs.alibi_slopes).double().expand(case.batch, case.heads)
        bias -= slopes[..., None, None] * distance.abs()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=inputs.softmax_scale, enable_gqa=True)
    expected = expected.transpose(1, 2).numpy()
    np.testing.assert_allclose(oracle(inputs).out.astype(np.float64), expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(run_reference(inputs).out, expected, rtol=1e-11, atol=1e-13)


def test_lse_agrees_with_logsumexp() -> None:
    inputs = build(Case(dtype=DType.F64, heads=3, heads_kv=3, seqlen_q=40, seqlen_k=60, softcap=3.0, learned_sink=True))
    q, k = (torch.from_numpy(np.ascontiguousarray(array)).transpose(1, 2) for array in (inputs.q, inputs.k))
    scores = 3.0 * torch.tanh(q @ k.mT * inputs.softmax_scale / 3.0)
    sink = torch.from_numpy(inputs.learned_sink).double().view(1, 3, 1, 1).expand(1, 3, 40, 1)
    expected = torch.logsumexp(torch.cat([scores, sink], dim=-1), dim=-1).numpy()
    np.testing.assert_allclose(oracle(inputs).lse.astype(np.float64), expected, rtol=1e-12)
    np.testing.assert_allclose(run_reference(inputs).lse, expected, atol=1e-5)
