"""Blocks of the backward that share keys, each with some query heads of the group, on the card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec  # noqa: E402
from atomr_accel_flashattn.problem import AttentionProblem  # noqa: E402
from atomr_accel_flashattn.runtime import plan  # noqa: E402
from tests.case_lists import grouped_cases, pairwise_cases  # noqa: E402
from tests.cases import GPU_DTYPES, Case, build  # noqa: E402
from tests.check import check_gradients  # noqa: E402
from tests.gpu.families import DEVICE  # noqa: E402
from tests.gpu.harness import Backward  # noqa: E402
from tests.gpu.test_backward import EMPTY_QUERIES, family, poisoned_workspace  # noqa: E402, F401 - fixtures
from tests.inputs import Inputs  # noqa: E402
from tests.oracle import Upstream  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(DEVICE == "cpu", reason="blocks of a GPU")]

HEADS = [(16, 1), (7, 1), (6, 2)]


@pytest.fixture
def all_split(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every query head of a group has blocks of its own, however many blocks that makes."""

    def largest(_spec: Fa2BackwardSpec, problem: AttentionProblem, _multiprocessors: int) -> int:
        return problem.heads // problem.heads_kv

    monkeypatch.setattr(Fa2BackwardSpec, "head_splits", largest)
    plan.clear()
    yield
    plan.clear()


def upstream_of(inputs: Inputs) -> Upstream:
    return Upstream(np.random.default_rng(0).standard_normal(inputs.out_shape).astype(inputs.q.dtype))


@pytest.mark.usefixtures("all_split")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", [case for case in pairwise_cases(GPU_DTYPES) if case.heads > case.heads_kv], ids=str)
def test_head_split_with_every_pair_of_features(case: Case, deterministic: bool):
    check_gradients(case, Backward(deterministic=deterministic))


@pytest.mark.usefixtures("all_split")
@pytest.mark.parametrize("case", grouped_cases(GPU_DTYPES), ids=str)
def test_head_split_of_grouped_heads(case: Case):
    check_gradients(case, Backward())


@pytest.mark.usefixtures("all_split")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_split_gives_keys_of_sequences_without_queries_zeros(head_dim: int):
    inputs = build(Case(head_dim=head_dim, v_head_dim=head_dim, right=0, **EMPTY_QUERIES))
    made = Backward()(inputs, upstream_of(inputs))
    for gradient in (made.dk, made.dv):
        assert not gradient[:2538].any()
        assert not gradient[5120:].any()
        assert gradient[2538:5120].any(axis=(1, 2)).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "heads_kv"), HEADS)
def test_head_split_gives_a_group_the_sum_of_what_its_heads_would_get(heads: int, heads_kv: int, head_dim: int):
    ratio = heads // heads_kv
    inputs = build(Case(seqlen_q=700, seqlen_k=900, heads=heads, heads_kv=heads_kv, head_dim=head_dim, v_head_dim=head_dim, right=0))
    upstream = upstream_of(inputs)
    grouped = Backward()(inputs, upstream)
    alone = Backward()(replace(inputs, k=inputs.k.repeat(ratio, 2), v=inputs.v.repeat(ratio, 2)), upstream)
    np.testing.assert_allclose(grouped.dq.astype(np.float32), alone.dq.astype(np.float32), rtol=4e-3, atol=1e-3)
    for name in ("dk", "dv"):
        summed = getattr(alone, name).astype(np.float32).reshape(1, 900, heads_kv, ratio, -1).sum(3)
        made = getattr(grouped, name).astype(np.float32)
        assert np.abs(made - summed).max() <= 4e-3 * np.abs(summed).max()


def tensors(heads: int, heads_kv: int, head_dim: int, length: int = 2000) -> list[Any]:
    """q, k, v and dO."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, length, count, head_dim) for count in (heads, heads_kv, heads_kv, heads)]
    return [torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16) for shape in shapes]


def request_of(q: Any, k: Any, v: Any, dout: Any, *, deterministic: bool) -> Any:
    """One that blocks share keys in, whatever card this is."""
    done = fa.run(fa.DenseFwdRequest(q, k, v, mask=fa.MaskKind.causal()))
    request = fa.DenseBwdRequest(q, k, v, done.out, dout, done.lse, mask=fa.MaskKind.causal(), deterministic=deterministic)
    assert request.dispatch_key().extras.head_split
    return request


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "heads_kv"), HEADS)
def test_head_split_gives_equal_bits_from_run_to_run(heads: int, heads_kv: int, head_dim: int):
    """dK and dV always, dQ where it is asked for, also beside a busy neighbour."""
    inputs = tensors(heads, heads_kv, head_dim)
    side, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    for deterministic in (False, True):
        request = request_of(*inputs, deterministic=deterministic)
        first = fa.run(request)
        for _ in range(10):
            with torch.cuda.stream(side):
                for _ in range(3):
                    busy @ busy
            made = fa.run(request)
            assert torch.equal(made.dk, first.dk)
            assert torch.equal(made.dv, first.dv)
            assert not deterministic or torch.equal(made.dq, first.dq)


def test_head_split_in_a_captured_graph_follows_what_its_arrays_hold():
    q, k, v, dout = tensors(16, 1, 128)
    request = request_of(q, k, v, dout, deterministic=True)
    fa.run(request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = fa.run(request)
    for factor in (2.0, -0.5):
        dout *= factor
        graph.replay()
        expected = fa.run(request)
        for name in ("dq", "dk", "dv"):
            assert torch.equal(getattr(made, name), getattr(expected, name))


@pytest.mark.parametrize("offsets", [(0, 1200, 320, 1700), (0, 1700, 320, 1000), (320, 1700, 0, 1700)], ids=str)
def test_deterministic_blocks_end_where_sequences_overlap(offsets: tuple[int, ...]):
    """The gradients mean nothing; a block that waited for ever would take the card with it."""
    q, k, v, dout = (x[0, :1700] for x in tensors(8, 8, 128))
    right, wrong = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ((0, 600, 1200, 1700), offsets))
    lengths = fa.CumulativeSeqlens(right, 1700)
    done = fa.run(fa.VarlenFwdRequest(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths))
    asked = {"cu_seqlens_q": fa.CumulativeSeqlens(wrong, 1700), "cu_seqlens_k": lengths, "deterministic": True}
    for _ in range(20):
        fa.run(fa.VarlenBwdRequest(q, k, v, done.out, dout, done.lse, **asked))
    torch.cuda.synchronize()
