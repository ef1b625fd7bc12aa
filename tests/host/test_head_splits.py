"""Blocks of the backward that share keys, each with some query heads of the group: how many, in how much memory, and what is launched."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup
from atomr_accel_flashattn.kernels.backward import _section_pairs
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec
from atomr_accel_flashattn.problem import ArrayInfo, AttentionProblem, Band, Strides
from atomr_accel_flashattn.types import Device, DType, SmArch
from tests.fakes.gpu import FakeGpu

from .test_gradient_plans import BASE, THREE, Asked, headers

H200 = 132  # SMs
CAUSAL, FULL = Band(None, 0), Band(None, None)


def array(*shape: int) -> ArrayInfo:
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return ArrayInfo(256, shape, strides, DType.BF16, "bfloat16", Device("cuda", 0), None)


def problem(
    batch: int, seqlen_q: int, seqlen_k: int, heads: int, heads_kv: int, width: int = 128, band: Band = CAUSAL, *, packed: bool = False
) -> AttentionProblem:
    """Sequences of these lengths, or packed ones of which these are the longest, and half of the rows there are."""
    lead_q, lead_k = ((batch, length) for length in (seqlen_q, seqlen_k))
    if packed:
        lead_q, lead_k = ((batch * length // 2 + length // 2,) for length in (seqlen_q, seqlen_k))
    offsets = array(batch + 1) if packed else None
    return AttentionProblem(
        q=array(*lead_q, heads, width),
        k=array(*lead_k, heads_kv, width),
        v=array(*lead_k, heads_kv, width),
        q_strides=Strides(0, heads * width, width),
        k_strides=Strides(0, heads_kv * width, width),
        v_strides=Strides(0, heads_kv * width, width),
        batch=batch,
        heads=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=width,
        v_head_dim=width,
        softmax_scale=0.1,
        band=band,
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
    )


def spec_for(known: AttentionProblem, **extras: Any) -> Fa2BackwardSpec:
    key = DispatchKey(SmArch.SM_90A, DType.BF16, known.head_dim, varlen=known.is_varlen, gqa_ratio=known.heads // known.heads_kv)
    spec = lookup(replace(key, extras=Extras(direction="bwd", **extras)))
    assert isinstance(spec, Fa2BackwardSpec)
    return spec


def splits(known: AttentionProblem, multiprocessors: int = H200) -> int:
    return spec_for(known).head_splits(known, multiprocessors)


# What it is for: 128 blocks of which the longest takes as long as two of the average, on 132 SMs.
@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (problem(2, 8192, 8192, 16, 1), 4),
        (problem(1, 8192, 8192, 16, 1), 8),
        (problem(8, 2048, 2048, 16, 1), 2),  # 256 + 6 + 8 tiles of queries; by 4: 248 + 12 + 8
        (problem(2, 8192, 8192, 16, 1, band=FULL), 1),  # 128 equal blocks fill 132 SMs
        (problem(1, 8192, 8192, 16, 1, band=FULL), 2),
        (problem(1, 8192, 8192, 7, 1), 7),  # parts have equally many heads
        (problem(1, 2048, 2048, 32, 8), 2),
        (problem(2, 8192, 8192, 32, 8), 1),  # 1024 blocks
        (problem(8, 2048, 2048, 32, 8), 1),
        (problem(1, 8192, 8192, 16, 16), 1),
        (problem(1, 64, 64, 8, 1), 1),  # eight tiles of queries: adding the parts would take as long
        (problem(1, 256, 65536, 16, 1), 1),  # parts would be larger than q
        (problem(0, 8192, 8192, 16, 1), 1),
        (problem(1, 0, 8192, 16, 1), 1),
        (problem(1, 8192, 0, 16, 1), 1),
        (problem(0, 2, 2, 10, 1, packed=True), 1),  # tokens of no sequence
    ],
)
def test_how_many_blocks_share_keys(known: AttentionProblem, expected: int):
    assert splits(known) == expected


def test_at_least_half_of_the_pairs_of_a_split_run_side_by_side():
    """One after the other, the longest block of the last pair ended a fifth after all others."""
    known = problem(2, 8192, 8192, 16, 1)
    assert [_section_pairs(known, splits, deterministic=False, blocks=1) for splits in (2, 4, 16)] == [2, 4, 16]


def test_two_pairs_run_side_by_side_where_l2_holds_one():
    """One after the other, 32 / 8 heads at 2 x 8k took a tenth longer."""
    found = [_section_pairs(problem(*shape), 1, deterministic=False, blocks=1) for shape in ((2, 8192, 8192, 32, 8), (1, 8192, 8192, 8, 1))]
    assert found == [2, 1]
    assert _section_pairs(problem(0, 8192, 8192, 16, 1), 1, deterministic=False, blocks=1) == 1  # the kernel divides by it


def test_a_card_with_fewer_multiprocessors_needs_fewer_blocks():
    known = problem(2, 8192, 8192, 16, 1)
    found = [splits(known, count) for count in (8, 66, 132, 528)]
    assert found == sorted(found)
    assert found[0] == 1 < found[-1]


sizes = st.integers(0, 3000)


@given(st.integers(0, 5), sizes, sizes, st.integers(1, 24), st.integers(1, 4), st.sampled_from([8, 64, 128, 256]), st.booleans())
def test_parts_take_at_most_four_times_the_bytes_of_q(
    batch: int, seqlen_q: int, seqlen_k: int, ratio: int, heads_kv: int, width: int, packed: bool
):
    known = problem(batch, seqlen_q, seqlen_k, ratio * heads_kv, heads_kv, width, packed=packed)
    count, spec = splits(known), spec_for(known, head_split=True)
    assert ratio % count == 0
    parts = spec.workspace(known, count)["dq_sum"] - spec_for(known).workspace(known)["dq_sum"]
    assert count == 1 or 0 < parts <= 4 * 2 * math.prod(known.q.shape)


FEW_KEYS = replace(BASE, heads=8, heads_kv=1, seqlen_q=200, seqlen_k=100, v_head_dim=32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    card = FakeGpu()
    card.install(monkeypatch, SmArch.SM_90)
    return card


@pytest.mark.parametrize(
    "asked",
    [
        FEW_KEYS,
        replace(FEW_KEYS, mask=fa.MaskKind.causal(), learned_sink=True, given="qkv"),
        replace(FEW_KEYS, recompute=True, dropout=0.5),
        replace(FEW_KEYS, packed=True, longest=(200, 100), spare=3, learned_sink=True, dlse=True),
    ],
    ids=["dense", "causal", "recompute", "packed"],
)
def test_calls_with_few_keys_add_parts_of_query_heads(gpu: FakeGpu, asked: Asked):
    request = asked.check(runs=2)
    assert headers(gpu)[-3:] == THREE
    (before, *_), (spec, params, _), (behind, *_) = gpu.launches[-3:]
    assert spec == fa.lookup(request.dispatch_key())
    assert (spec.head_split, behind.head_split, params.head_splits, params.heads_per_split) == (True, True, 8, 1)
    assert not before.head_split, "it has nothing to clear for it"
    replace(asked, heads_kv=8).check()
    assert (gpu.launches[-2][0].head_split, gpu.last.head_splits) == (False, 1), "each head has its keys"


def test_only_the_card_of_the_arrays_says_how_many_blocks_there_may_be(gpu: FakeGpu):
    request = FEW_KEYS.request(FEW_KEYS.on_card(FEW_KEYS.arrays()))
    assert request.dispatch_key().extras.head_split
    assert not request.dispatch_key(SmArch.SM_80).extras.head_split
    assert not FEW_KEYS.request(FEW_KEYS.arrays()).dispatch_key(SmArch.SM_90).extras.head_split
    gpu.properties = gpu.properties._replace(multiprocessors=1)
    assert not request.dispatch_key().extras.head_split


def test_all_ratios_share_a_kernel():
    names = {spec_for(problem(1, 64, 64, heads, kv), head_split=True).kernel_name for heads, kv in ((7, 1), (6, 2), (16, 1))}
    assert len(names) == 1
    assert "headsplit" in names.pop()
