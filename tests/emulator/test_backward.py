"""The backward kernels' own source, run on the CPU thread by thread, against the gradients of the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atomr_accel_flashattn.types import DType, SmArch
from tests.case_lists import emulated_cases, hazard_cases
from tests.cases import GPU_DTYPES, Alibi, Case, build
from tests.check import check_gradient_arrays, check_gradients
from tests.inputs import Inputs, Layout
from tests.oracle import Gradients, Upstream

from .build import compiler
from .running_backward import emulate_backward
from .test_kernels import EVERYTHING as EVERYTHING_FORWARD

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

CAUSAL = Case(seqlen_q=90, seqlen_k=150, heads=3, heads_kv=1, right=0)
EVERYTHING = replace(EVERYTHING_FORWARD, lengths_q=(70, 0, 40), lengths_k=(100, 5, 30))


@pytest.mark.parametrize("case", hazard_cases([DType.BF16])[::6], ids=str)
def test_hazard(case: Case):
    check_gradients(case, emulate_backward)


@pytest.mark.parametrize("case", emulated_cases(GPU_DTYPES)[::3], ids=str)
def test_every_pair_of_features(case: Case):
    check_gradients(case, lambda inputs, upstream: emulate_backward(inputs, upstream, seed=1))


@pytest.mark.parametrize("width", [192, 256])
@pytest.mark.parametrize("change", [CAUSAL, EVERYTHING], ids=["causal", "everything"])
def test_tiles_of_99_kb(change: Case, width: int):
    case = replace(change, head_dim=width, v_head_dim=width if change is CAUSAL else 32)
    check_gradients(case, lambda inputs, upstream: emulate_backward(inputs, upstream, arch=SmArch.SM_86))


@pytest.mark.parametrize("case", [CAUSAL, EVERYTHING], ids=["causal", "everything"])
def test_the_order_of_threads_changes_dq_by_rounding_alone_and_nothing_else(case: Case):
    inputs = build(case)
    first, *others = (_gradients(inputs, seed=seed) for seed in range(3))
    for other in others:
        assert first.dk.tobytes() == other.dk.tobytes()
        assert first.dv.tobytes() == other.dv.tobytes()
        np.testing.assert_allclose(first.dq.astype(np.float32), other.dq.astype(np.float32), rtol=2e-3, atol=1e-4)
        if first.dsink is not None and other.dsink is not None:
            assert first.dsink.tobytes() == other.dsink.tobytes()


WINDOW = replace(CAUSAL, seqlen_q=150, seqlen_k=170, left=60, sink_tokens=3)
TURNS = {"causal": CAUSAL, "everything": EVERYTHING, "window": WINDOW, "wide": replace(CAUSAL, head_dim=160, v_head_dim=160, right=None)}


@pytest.mark.parametrize("case", TURNS.values(), ids=TURNS)
def test_deterministic_gradients_do_not_depend_on_the_order_of_threads(case: Case):
    check_gradients(case, lambda inputs, upstream: emulate_backward(inputs, upstream, deterministic=True))
    inputs = build(case)
    first, second = (emulate_backward(inputs, _upstream(inputs), seed=seed, deterministic=True) for seed in (1, 2))
    for one, other in zip(first, second, strict=True):
        assert one is other is None or one.tobytes() == other.tobytes()


@pytest.mark.parametrize("left", [None, 5, 70, 200])
@pytest.mark.parametrize("right", [None, 0, 40])
def test_every_block_finds_how_many_add_before_it(left: int | None, right: int | None):
    """The emulator fails where a number is not the one that a block waits for."""
    case = Case(seqlen_q=330, seqlen_k=290, heads=2, heads_kv=1, head_dim=32, v_head_dim=32, left=left, right=right)
    for sinks in (0, 130) if left is not None else (0,):
        check_gradients(replace(case, sink_tokens=sinks), lambda inputs, upstream: emulate_backward(inputs, upstream, deterministic=True))


SPLIT: dict[str, tuple[Case, int]] = {
    "7/1": (replace(CAUSAL, heads=7), 7),
    "6/2": (replace(CAUSAL, heads=6, heads_kv=2, head_dim=40, v_head_dim=24), 3),
    "16/1": (replace(CAUSAL, heads=16, seqlen_q=70, right=None, head_dim=32, v_head_dim=32), 8),
    "narrow": (replace(WINDOW, heads=4, head_dim=56, v_head_dim=64, batch=2), 2),
    "wide": (replace(CAUSAL, heads=2, head_dim=256, v_head_dim=256), 2),
    "everything": (replace(EVERYTHING, heads=8, heads_kv=2), 2),
    "empty sequences": (Case(lengths_q=(0, 40, 26, 0), lengths_k=(79, 54, 26, 96), heads=12, heads_kv=2, right=0), 3),
    "left bound": (Case(batch=2, seqlen_q=20, seqlen_k=150, heads=6, heads_kv=1, softmax_scale=-0.2, left=3), 6),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", SPLIT)
def test_blocks_that_share_keys(name: str, deterministic: bool):
    case, splits = SPLIT[name]
    options: dict[str, Any] = {"splits": splits, "deterministic": deterministic}
    check_gradients(case, lambda inputs, upstream: emulate_backward(inputs, upstream, **options))
    inputs = build(case)
    first, second = (emulate_backward(inputs, _upstream(inputs), seed=seed, **options) for seed in (1, 2))
    for gradient, one, other in zip(Gradients._fields, first, second, strict=True):
        assert one is other is None or one.tobytes() == other.tobytes() or (gradient == "dq" and not deterministic)


@pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_86])
def test_blocks_that_share_keys_with_the_tiles_of_other_architectures(arch: SmArch):
    case = replace(CAUSAL, heads=4, head_dim=96, v_head_dim=96)
    check_gradients(case, lambda inputs, upstream: emulate_backward(inputs, upstream, arch=arch, splits=4))


def test_deterministic_blocks_end_where_max_seqlen_q_is_too_small():
    """On a GPU nobody looks at lengths: such gradients are wrong, and a block that waited for ever would take the card with it."""
    inputs = build(Case(lengths_q=(150, 20), lengths_k=(170, 90), right=0))
    emulate_backward(inputs, _upstream(inputs), deterministic=True, longest_q=64)


@pytest.mark.parametrize("offsets", [(0, 120, 32, 170), (0, 170, 32, 100), (32, 170, 0, 170)], ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_deterministic_blocks_end_where_sequences_overlap(offsets: tuple[int, ...], order: int):
    """On a GPU nobody looks at offsets either. Such sequences share the numbers by which blocks wait for each other."""
    inputs = build(Case(lengths_q=(60, 60, 50), lengths_k=(450, 90, 300)[::order], right=0))
    emulate_backward(inputs, _upstream(inputs), deterministic=True, longest_q=170, offsets_q=np.array(offsets, np.int32))


def _gradients(inputs: Inputs, *, dlse: bool = True, **options: Any) -> Gradients:
    upstream = _upstream(inputs)
    return emulate_backward(inputs, upstream if dlse else Upstream(upstream.dout), **options)


@pytest.mark.parametrize("splits", [1, 4])
def test_sequences_without_queries_give_their_keys_zeros(splits: int):
    case = Case(lengths_q=(0, 40, 26, 0), lengths_k=(79, 54, 26, 96), heads=4, heads_kv=1)
    made = _gradients(build(case), splits=splits)
    for gradient in (made.dk, made.dv):
        assert not gradient[:79].any()
        assert not gradient[159:].any()
        assert gradient[79:159].any(axis=(1, 2)).all()
    assert made.dq.any(axis=-1).all()


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("learned_sink", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_empty_calls_give_zeros(sizes: tuple[int, int, int], learned_sink: bool, deterministic: bool, splits: int):
    batch, seqlen_q, seqlen_k = sizes
    inputs = build(Case(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=2, heads_kv=1, learned_sink=learned_sink))
    made = _gradients(inputs, dlse=False, deterministic=deterministic, splits=splits)
    assert not any(gradient.any() for gradient in made if gradient is not None)


def test_without_keys_the_sink_gets_the_gradient_of_the_lse():
    inputs = build(Case(batch=2, seqlen_q=5, seqlen_k=0, learned_sink=True))
    dlse = np.random.default_rng(0).standard_normal(inputs.lse_shape).astype(np.float32)
    made = emulate_backward(inputs, Upstream(np.full(inputs.out_shape, np.nan, np.float16), dlse))
    np.testing.assert_allclose(made.dsink, dlse.sum(axis=(0, 2)), rtol=1e-5)


def test_rows_without_a_key_give_dq_exactly_zero():
    lengths = (76, 34, 146)
    inputs = build(Case(lengths_q=lengths, lengths_k=(1, 1, 1), head_dim=32, v_head_dim=32, right=0))
    inputs = replace(inputs, q=inputs.q * 3, k=inputs.k * 3, v=inputs.v * 3)
    made = _gradients(inputs)
    assert not np.delete(made.dq, np.cumsum(lengths) - 1, axis=0).any()
    assert all(np.isfinite(gradient).all() for gradient in made[:3])
    assert made.dv.any(axis=-1).all()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("heads", "heads_kv"), [(6, 2), (7, 1)])
def test_a_group_gets_the_sum_of_what_its_heads_would_get(heads: int, heads_kv: int, split: bool):
    ratio, sizes = heads // heads_kv, {"seqlen_q": 40, "seqlen_k": 60}
    inputs = build(Case(heads=heads, heads_kv=heads_kv, right=0, learned_sink=True, **sizes))
    alone = _gradients(replace(inputs, k=inputs.k.repeat(ratio, 2), v=inputs.v.repeat(ratio, 2)))
    grouped = _gradients(inputs, splits=ratio if split else 1)
    np.testing.assert_array_equal(grouped.dq, alone.dq)
    np.testing.assert_array_equal(grouped.dsink, alone.dsink)
    for name in ("dk", "dv"):
        summed = getattr(alone, name).astype(np.float32).reshape(1, 60, heads_kv, ratio, -1).sum(3)
        np.testing.assert_allclose(getattr(grouped, name).astype(np.float32), summed, rtol=4e-3, atol=8e-3)


def _with_spare_rows(array: Any) -> Any:
    return np.concatenate([array, np.full((64, *array.shape[1:]), np.nan, array.dtype)])


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("learned_sink", [False, True])
def test_rows_that_no_sequence_owns_are_not_read_and_get_zeros(learned_sink: bool, splits: int):
    inputs = build(Case(lengths_q=(40, 30), lengths_k=(50, 33), heads=4, heads_kv=2, learned_sink=learned_sink, right=0))
    padded = replace(inputs, **{name: _with_spare_rows(getattr(inputs, name)) for name in "qkv"})
    dout = _upstream(inputs).dout
    assert dout is not None
    alone = emulate_backward(inputs, Upstream(dout), splits=splits)
    made = emulate_backward(padded, Upstream(_with_spare_rows(dout)), splits=splits)
    for name, rows in (("dq", 70), ("dk", 83), ("dv", 83)):
        np.testing.assert_array_equal(getattr(made, name)[:rows], getattr(alone, name))
        assert not getattr(made, name)[rows:].any()
    if learned_sink:
        np.testing.assert_array_equal(made.dsink, alone.dsink)


IN_DQ: dict[str, Case] = {
    "narrow": Case(batch=2, seqlen_q=70, seqlen_k=90, heads=4, heads_kv=2, head_dim=8, v_head_dim=64, left=30, right=0),
    "wide": Case(batch=2, seqlen_q=90, seqlen_k=70, heads=2, heads_kv=1, head_dim=136, v_head_dim=128, right=0, layout=Layout.HEADS_FIRST),
    "one row": Case(seqlen_q=1, seqlen_k=20, heads=1, heads_kv=1, head_dim=8, v_head_dim=8),
    "packed": Case(lengths_q=(70, 0, 40), lengths_k=(100, 5, 30), heads=4, heads_kv=1, alibi=Alibi.HEADS, dropout_p=0.2, softcap=5.0),
}


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"splits": 2}], ids=str)
@pytest.mark.parametrize("name", IN_DQ)
def test_statistics_of_rows_in_dq_give_the_same_bits(name: str, options: dict[str, Any]):
    """Of all gradients but a dQ that is added up in any order; and spare rows do not show what lay there."""
    inputs = build(IN_DQ[name])
    if "splits" in options and inputs.heads == inputs.heads_kv:
        options = {}
    upstream = _upstream(inputs)
    if inputs.cu_seqlens_q is not None:
        assert upstream.dout is not None
        inputs = replace(inputs, **{each: _with_spare_rows(getattr(inputs, each)) for each in "qkv"})
        upstream = Upstream(_with_spare_rows(upstream.dout))
    apart, inside = (emulate_backward(inputs, upstream, statistics_in_dq=each, **options) for each in (False, True))
    for one, other in zip(apart, inside, strict=True):
        assert one is other is None or one.tobytes() == other.tobytes()


@pytest.mark.parametrize("softcap", [1.0, 15.0, 50.0])
@pytest.mark.parametrize("sizes", [{"right": 0}, {"left": 20, "right": 0, "heads": 4, "heads_kv": 1}], ids=["causal", "window"])
def test_softcap(softcap: float, sizes: dict[str, Any]):
    check_gradients(Case(seqlen_q=70, seqlen_k=90, softcap=softcap, **sizes), emulate_backward)


@pytest.mark.parametrize("which", ["lse", "out"])
def test_only_one_of_both_gradients_comes_down(which: str):
    inputs = build(CAUSAL)
    upstream = _upstream(inputs)
    upstream = Upstream(None, upstream.dlse) if which == "lse" else Upstream(upstream.dout, None)
    check_gradient_arrays(which, inputs, upstream, emulate_backward(inputs, upstream))


def _upstream(inputs: Inputs) -> Upstream:
    random = np.random.default_rng(2)
    dout = random.standard_normal(inputs.out_shape).astype(inputs.q.dtype)
    return Upstream(dout, random.standard_normal(inputs.lse_shape).astype(np.float32))


def test_dv_reads_the_dropout_pattern_of_the_forward():
    check_gradients(Case(seqlen_q=50, seqlen_k=70, dropout_p=0.5, heads=2, heads_kv=1), emulate_backward)
