"""Gradients on the card against the float64 oracle: requests, forward and backward, into poisoned gradients and workspaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.limits import HEAD_DIM_WIDTHS  # noqa: E402
from atomr_accel_flashattn.runtime import gradients  # noqa: E402
from atomr_accel_flashattn.types import DType, SmArch  # noqa: E402
from tests.case_lists import grid_cases, grouped_cases, hazard_cases, head_dim_cases, pairwise_cases  # noqa: E402
from tests.cases import GPU_DTYPES, Alibi, Case, build  # noqa: E402
from tests.check import check_gradients  # noqa: E402
from tests.gpu.families import DEVICE  # noqa: E402
from tests.gpu.harness import Backward, poison_workspaces  # noqa: E402
from tests.oracle import Upstream  # noqa: E402
from tests.strategies import random_cases  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

RANDOM_RUNS, EXAMPLES = 12, 15
CAUSAL: dict[str, Any] = {"right": 0}
EMPTY_QUERIES: dict[str, Any] = {"lengths_q": (0, 1208, 840, 0), "lengths_k": (2538, 1742, 840, 3072), "heads": 4, "heads_kv": 1}


@pytest.fixture
def family() -> Family:
    """The backward is that of one family, whichever ran the forward; its forward is that of the card."""
    return Family.FA2


@pytest.fixture(autouse=True)
def poisoned_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every workspace, and every gradient that a call makes, is full of NaN before it."""
    poison_workspaces(monkeypatch, gradients, "empty_like_framework")


@pytest.mark.parametrize("case", grid_cases(GPU_DTYPES), ids=str)
def test_grid(case: Case):
    check_gradients(case, Backward())


@pytest.mark.parametrize("case", hazard_cases(GPU_DTYPES), ids=str)
def test_hazard(case: Case):
    check_gradients(case, Backward())


@pytest.mark.parametrize("case", hazard_cases(GPU_DTYPES)[::2], ids=str)
def test_hazard_deterministic(case: Case):
    check_gradients(case, Backward(deterministic=True))


@pytest.mark.parametrize("case", pairwise_cases(GPU_DTYPES), ids=str)
def test_every_pair_of_features_deterministic(case: Case):
    """Into arrays that the call makes, twice."""
    backward = Backward(deterministic=True, new_arrays=True)

    def run(*arguments: Any) -> Any:
        made, again = backward(*arguments), backward(*arguments)
        for one, other in zip(made, again, strict=True):
            assert one is other is None or one.tobytes() == other.tobytes()
        return made

    check_gradients(case, run)


@pytest.mark.parametrize("case", hazard_cases(GPU_DTYPES)[1::2], ids=str)
def test_hazard_in_arrays_that_the_call_makes(case: Case):
    check_gradients(case, Backward(new_arrays=True))


LONG: dict[str, dict[str, Any]] = {
    "causal": {"batch": 2, "seqlen_q": 2000, "seqlen_k": 2100, "right": 0},
    "window": {"batch": 2, "seqlen_q": 2000, "seqlen_k": 2100, "right": 0, "left": 700, "sink_tokens": 4},
    "packed": {"lengths_q": (1300, 0, 700, 1900), "lengths_k": (1400, 90, 700, 1800), "dropout_p": 0.1, "learned_sink": True},
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic_gradients_are_bitwise_equal_from_run_to_run(head_dim: int, name: str):
    """Some hundred blocks wait for each other, beside a busy neighbour on the card."""
    inputs = build(Case(head_dim=head_dim, v_head_dim=head_dim, heads=8, heads_kv=4, **LONG[name]))
    dout = np.random.default_rng(0).standard_normal(inputs.out_shape).astype(inputs.q.dtype)
    runs = []
    for _ in range(5):
        keep_busy()
        runs.append(Backward(deterministic=True)(inputs, Upstream(dout)))
    assert len({tuple(each.tobytes() for each in run if each is not None) for run in runs}) == 1


def keep_busy() -> None:
    """The card, on a stream beside the current one, for some milliseconds."""
    if DEVICE == "cpu":
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.ones(4096, 4096, device=DEVICE)
        for _ in range(10):
            x @ x


@pytest.mark.parametrize("case", pairwise_cases(GPU_DTYPES), ids=str)
def test_every_pair_of_features(case: Case):
    check_gradients(case, Backward())


@pytest.mark.parametrize("case", grouped_cases(GPU_DTYPES), ids=str)
def test_grouped_heads(case: Case):
    check_gradients(case, Backward())


@pytest.mark.parametrize("case", head_dim_cases(GPU_DTYPES), ids=str)
def test_head_dim(case: Case):
    check_gradients(case, Backward())


@pytest.mark.parametrize("case", pairwise_cases(GPU_DTYPES)[::3], ids=str)
def test_the_forward_runs_first(case: Case):
    check_gradients(case, Backward(recompute=True, new_arrays=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="tiles are those of kernels")
@pytest.mark.parametrize("tiles_for", [SmArch.SM_80, SmArch.SM_86])
@pytest.mark.parametrize("case", head_dim_cases([DType.F16])[::2], ids=str)
def test_tiles_of_other_architectures(case: Case, tiles_for: SmArch):
    check_gradients(case, Backward(tiles_for=tiles_for))


@pytest.mark.parametrize("run_number", range(RANDOM_RUNS))
def test_random_cases(run_number: int):
    @seed(run_number)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(random_cases(GPU_DTYPES))
    def judged(case: Case) -> None:
        check_gradients(case, Backward())

    judged()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_of_sequences_without_queries_get_zeros(head_dim: int):
    case = Case(label="empty_queries", dtype=DType.BF16, head_dim=head_dim, v_head_dim=head_dim, **EMPTY_QUERIES, **CAUSAL)

    def run(*arguments: Any) -> Any:
        made = Backward()(*arguments)
        for gradient in (made.dk, made.dv):
            for rows in (gradient[:2538], gradient[5120:]):
                assert not rows.astype("float32").any()
        return made

    check_gradients(case, run)


@pytest.mark.parametrize("learned_sink", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k"), [(0, 64, 64), (2, 0, 64), (2, 64, 0), (0, 0, 64), (2, 0, 0), (0, 0, 0)], ids=str
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_dense_empties(batch: int, seqlen_q: int, seqlen_k: int, learned_sink: bool, deterministic: bool):
    case = Case(label="empty", batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, learned_sink=learned_sink)
    check_gradients(case, Backward(deterministic=deterministic))


@pytest.mark.parametrize("seqlen_q", [76, 34, 146])
def test_rows_without_a_key_get_exactly_zero(seqlen_q: int):
    case = Case(label="rows_without_a_key", seqlen_q=seqlen_q, seqlen_k=1, head_dim=32, v_head_dim=32, dtype=DType.BF16, **CAUSAL)

    def run(inputs: Any, upstream: Any) -> Any:
        for array in (inputs.q, inputs.k, inputs.v):
            array[...] = array * array.dtype.type(3)
        made = Backward()(inputs, upstream)
        assert not made.dq[:, : seqlen_q - 1].astype("float32").any()
        return made

    check_gradients(case, run)


def with_spare_rows(array: Any) -> Any:
    """64 of them, of NaN, behind the last sequence."""
    return np.concatenate([array, np.full((64, *array.shape[1:]), np.nan, array.dtype)])


@pytest.mark.parametrize("new_arrays", [False, True])
@pytest.mark.parametrize("learned_sink", [False, True])
def test_rows_that_no_sequence_owns_are_not_read_and_get_zeros(learned_sink: bool, new_arrays: bool):
    inputs = build(Case(lengths_q=(140, 0, 30), lengths_k=(150, 20, 33), heads=4, heads_kv=2, learned_sink=learned_sink, right=0))
    dout = np.random.default_rng(0).standard_normal(inputs.out_shape).astype(inputs.q.dtype)
    spare = replace(inputs, **{name: with_spare_rows(getattr(inputs, name)) for name in "qkv"})
    backward = Backward(deterministic=True, new_arrays=new_arrays)
    alone, made = backward(inputs, Upstream(dout)), backward(spare, Upstream(with_spare_rows(dout)))
    for of_call, expected, rows in zip(made, alone, (170, 203, 203, None), strict=True):
        if of_call is None or rows is None:
            assert of_call is expected is None or np.array_equal(of_call, expected)
        else:
            assert of_call[:rows].tobytes() == expected.tobytes()
            assert not of_call[rows:].astype("float32").any()


SOFTCAPS: dict[str, dict[str, Any]] = {
    "dense": {"seqlen_q": 150, "seqlen_k": 200},
    "varlen": {"lengths_q": (100, 0, 57), "lengths_k": (130, 20, 70)},
    "window": {"seqlen_q": 200, "seqlen_k": 200, "left": 60, "right": 10},
    "gqa": {"seqlen_q": 150, "seqlen_k": 200, "heads": 6, "heads_kv": 2, "right": 0},
}


@pytest.mark.parametrize("softcap", [1.0, 15.0, 50.0])
@pytest.mark.parametrize("form", SOFTCAPS)
def test_softcap(form: str, softcap: float):
    check_gradients(Case(label="softcap", softcap=softcap, dtype=DType.BF16, **SOFTCAPS[form]), Backward())


WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "zero left": {"left": 0},
    "(0, 0)": {"left": 0, "right": 0},
    "(127, 0)": {"left": 127, "right": 0},
    "wider than the sequence": {"left": 5000, "right": 5000},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(130, 190), (190, 130)], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window: str, lengths: tuple[int, int], causal: bool):
    bounds = WINDOWS[window] | (CAUSAL if causal else {})
    check_gradients(Case(label="window", seqlen_q=lengths[0], seqlen_k=lengths[1], **bounds), Backward())


ONE_NUMBER: dict[str, dict[str, Any]] = {
    "scale": {"softmax_scale": 0.2},
    "softcap": {"softcap": 3.0},
    "left": {"left": 17},
    "right": {"right": 5},
    "sinks": {"left": 16, "sink_tokens": 3},
    "slopes": {"alibi": Alibi.HEADS},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("changed", ONE_NUMBER)
def test_calls_that_differ_in_one_number(changed: str):
    """One after the other, so that a plan which is found for the wrong one shows."""
    plain: dict[str, Any] = {"label": "one_number", "left": 16, "right": 4, "softcap": 2.0, "softmax_scale": 0.1, "dropout_p": 0.2}
    for numbers in (plain, plain | ONE_NUMBER[changed], plain):
        check_gradients(Case(seqlen_q=100, seqlen_k=100, **numbers), Backward())


def test_every_width_has_a_tile_of_99_kb():
    from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup

    for arch in (SmArch.SM_86, SmArch.SM_89, SmArch.SM_120):
        for width in HEAD_DIM_WIDTHS:
            spec = lookup(DispatchKey(arch, DType.BF16, width, extras=Extras(direction="bwd")))
            assert isinstance(spec, Fa2BackwardSpec)
            assert spec.shared_memory <= 99 * 1024
