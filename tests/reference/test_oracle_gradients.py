"""The gradients of the oracle: hand-worked values, finite differences of its own forward, and autograd of a plain torch attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atomr_accel_flashattn.types import DType
from tests.cases import Alibi, Case, build
from tests.check import check_gradient_arrays, check_gradients
from tests.inputs import Inputs, Layout
from tests.oracle import Gradients, Upstream, keep_pattern, keep_threshold, oracle, oracle_gradients
from tests.upstream import build_upstream

from .running import run_backward

SMALL: dict[str, Any] = {"dtype": DType.F64, "head_dim": 8, "v_head_dim": 8, "seqlen_q": 7, "seqlen_k": 9}
CASES = [
    Case(**SMALL),
    Case(**SMALL, heads=6, heads_kv=2, right=0),
    Case(**{**SMALL, "seqlen_q": 12}, right=0, learned_sink=True),
    Case(**SMALL, left=2, right=1, sink_tokens=2, alibi=Alibi.HEADS, softmax_scale=-0.6),
    Case(**SMALL, softcap=1.0, alibi=Alibi.BATCH, batch=2, softmax_scale=1.3),
    Case(**{**SMALL, "v_head_dim": 5}, dropout_p=0.4, learned_sink=True, heads=4, heads_kv=1),
    Case(**SMALL, lengths_q=(4, 0, 6, 3), lengths_k=(5, 3, 0, 2), right=0, softcap=3.0, dropout_p=0.2),
    Case(**SMALL, softmax_scale=0.0, learned_sink=True, layout=Layout.FUSED),
]


def _both(case: Case) -> tuple[Inputs, Upstream]:
    """Inputs and both upstream gradients, all finite; they do not count where they would be NaN."""
    inputs = build(case)
    upstream = build_upstream(case, inputs)
    assert upstream.dout is not None
    dlse = np.random.default_rng(1).standard_normal(inputs.lse_shape) if upstream.dlse is None else upstream.dlse
    return inputs, Upstream(np.nan_to_num(upstream.dout), np.nan_to_num(dlse))


def _value(inputs: Inputs, upstream: Upstream) -> Any:
    out, lse = oracle(inputs)
    return (out * upstream.dout).sum() + (np.where(np.isneginf(lse), 0, lse) * upstream.dlse).sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_finite_differences(case: Case) -> None:
    inputs, upstream = _both(case)
    exact, random = oracle_gradients(inputs, upstream), np.random.default_rng(2)
    for name, gradient in zip(("q", "k", "v", "learned_sink"), exact, strict=True):
        if gradient is None:
            continue
        array, direction = getattr(inputs, name).astype(np.longdouble), random.standard_normal(gradient.shape)
        step = np.longdouble(1e-6)
        ahead, back = (_value(replace(inputs, **{name: array + sign * step * direction}), upstream) for sign in (1, -1))
        assert float((ahead - back) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=1e-8, abs=1e-9), name


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES, ids=str)
def test_autograd_of_a_plain_attention(case: Case) -> None:
    torch = pytest.importorskip("torch")
    inputs, upstream = _both(case)
    leaves = {name: torch.tensor(np.ascontiguousarray(getattr(inputs, name)), requires_grad=True) for name in ("q", "k", "v")}
    if inputs.learned_sink is not None:
        leaves["sink"] = torch.tensor(inputs.learned_sink.astype(np.float64), requires_grad=True)
    for sequence in inputs.sequences():
        keys = sequence.index if inputs.cu_seqlens_k is None else slice(*inputs.cu_seqlens_k[sequence.index : sequence.index + 2].tolist())
        q, k, v = (leaves[name][rows].transpose(0, 1) for name, rows in (("q", sequence.out_rows[0]), ("k", keys), ("v", keys)))
        k, v = (each.repeat_interleave(inputs.heads // inputs.heads_kv, 0) for each in (k, v))
        score = inputs.softmax_scale * (q @ k.mT)
        if inputs.softcap:
            score = inputs.softcap * torch.tanh(score / inputs.softcap)
        p, j = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
        if inputs.alibi_slopes is not None:
            slopes = torch.tensor(np.broadcast_to(inputs.alibi_slopes, (inputs.batch, inputs.heads))[sequence.index]).double()
            score = score - slopes[:, None, None] * (p - j).abs()
        seen = torch.ones(p.shape[0], k.shape[1], dtype=torch.bool)
        if inputs.right is not None:
            seen &= j <= p + inputs.right
        if inputs.left is not None:
            seen &= (j >= p - inputs.left) | (j < inputs.sink_tokens)
        columns = [score.masked_fill(~seen, -torch.inf)]
        if inputs.learned_sink is not None:
            columns.append(leaves["sink"][:, None, None].expand(-1, q.shape[1], 1))
        joined = torch.cat(columns, -1)
        rows = joined.isfinite().any(-1)[0]  # softmax has no gradient where there is nothing
        joined, lse = joined[:, rows], torch.logsumexp(joined[:, rows], -1)
        probability = torch.exp(joined - lse[..., None])[..., : k.shape[1]]
        if inputs.dropout_p:
            keep = keep_pattern(inputs, sequence.index, np.arange(inputs.heads), np.arange(q.shape[1]), np.arange(k.shape[1]))
            probability = probability * torch.tensor(keep)[:, rows] * (256 / keep_threshold(inputs.dropout_p))
        dout = torch.tensor(upstream.dout[sequence.out_rows]).double().transpose(0, 1)[:, rows]
        dlse = torch.tensor(upstream.dlse[sequence.lse_rows]).double()[:, rows]
        (((probability @ v) * dout).sum() + (lse * dlse).sum()).backward()
    for leaf, gradient in zip(leaves.values(), oracle_gradients(inputs, upstream), strict=False):
        made = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(made, gradient.astype(np.float64), rtol=1e-10, atol=1e-12)


def test_two_keys_by_hand() -> None:
    arrays = (np.array(values, np.float64).reshape(1, -1, 1, 1) for values in ([2.0], [0.0, math.log(3) / 2], [4.0, 8.0]))
    inputs = Inputs(DType.F64, *arrays, softmax_scale=1.0)
    dq, dk, dv, dsink = oracle_gradients(inputs, Upstream(np.ones((1, 1, 1, 1)), np.full((1, 1, 1), 10.0)))
    # P = (1/4, 3/4), o = 7; dS = P (v - 7 + 10)
    ds = [(4 - 7 + 10) / 4, 3 * (8 - 7 + 10) / 4]
    assert dq.item() == pytest.approx(ds[1] * math.log(3) / 2)
    assert dk.ravel().tolist() == pytest.approx([2 * each for each in ds])
    assert dv.ravel().tolist() == pytest.approx([0.25, 0.75])
    assert dsink is None


def test_a_row_without_keys_counts_for_the_sink_alone_by_hand() -> None:
    arrays = (np.array(values, np.float64).reshape(1, -1, 1, 1) for values in ([3.0, 3.0], [0.0], [5.0]))
    inputs = Inputs(DType.F64, *arrays, softmax_scale=1.0, right=0, learned_sink=np.array([0.0], np.float32))
    dout, dlse = np.array([np.nan, 1.0]).reshape(1, 2, 1, 1), np.array([[[7.0, 2.0]]])
    dq, dk, dv, dsink = oracle_gradients(inputs, Upstream(dout, dlse))
    # the second row: P = 1/2, o = 5/2, dS = (5 - 5/2 + 2) / 2; the sink's share is 1/2 as well
    assert dq.ravel().tolist() == [0.0, 0.0]
    assert dk.item() == pytest.approx(4.5 / 2 * 3)
    assert dv.item() == 0.5
    assert dsink is not None
    assert dsink.item() == pytest.approx(7 + (2 - 2.5) / 2)


FAULTS = {
    "one element": lambda made: made.dq.__setitem__((0, 3, 1, 2), made.dq[0, 3, 1, 2] + 0.2),
    "NaN": lambda made: made.dk.__setitem__((0, 5, 0, 0), np.nan),
    "a key that nobody sees": lambda made: made.dv.__setitem__((0, 49, 0, 1), 0.2),
    "sink": lambda made: made.dsink.__setitem__(0, made.dsink[0] + 0.3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault: str) -> None:
    case = Case(seqlen_q=40, seqlen_k=50, learned_sink=True, left=4, right=0, dropout_p=0.2)

    def spoiled(inputs: Inputs, upstream: Upstream) -> Gradients:
        made = run_backward(inputs, upstream)
        FAULTS[fault](made)
        return made

    with pytest.raises(AssertionError, match=r": d(q|k|v|sink): "):
        check_gradients(case, spoiled)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"right": 0}, {"right": 1}),
        ({"left": 8, "right": 0}, {"left": 9}),
        ({"left": 8, "right": 0, "sink_tokens": 2}, {"sink_tokens": 1}),
        ({"softcap": 5.0}, {"softcap": 0.0}),
        ({"softcap": 2.0}, {"softcap": 2.5}),
        ({"alibi": Alibi.HEADS}, {"alibi_slopes": None}),
        ({"learned_sink": True}, {"learned_sink": np.zeros(2, np.float32)}),
        ({"softmax_scale": 0.1}, {"softmax_scale": 0.103}),
        ({"dropout_p": 0.2}, {"rng": np.array([1, 2])}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16], ids=lambda dtype: dtype.value)
def test_check_finds_a_feature_that_is_off_by_one(dtype: DType, options: dict[str, Any], change: dict[str, Any]) -> None:
    case = Case(dtype=dtype, seqlen_q=40, seqlen_k=50, **options)
    with pytest.raises(AssertionError, match="worst element"):
        check_gradients(case, lambda inputs, upstream: run_backward(replace(inputs, **change), upstream))


def test_check_finds_a_gradient_of_the_lse_that_is_ignored() -> None:
    inputs, upstream = _both(Case(seqlen_q=40, seqlen_k=50, dtype=DType.BF16))
    upstream = Upstream(upstream.dout.astype(inputs.q.dtype), upstream.dlse.astype(np.float32))
    check_gradient_arrays("whole", inputs, upstream, run_backward(inputs, upstream))
    with pytest.raises(AssertionError, match="worst element"):
        check_gradient_arrays("ignored", inputs, upstream, run_backward(inputs, Upstream(upstream.dout)))
