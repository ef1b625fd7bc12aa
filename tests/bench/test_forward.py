"""The benchmark's own machinery on the CPU: small cells, and times that are made up."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench import (  # noqa: E402
    entry,
    forward,
    measure,
    timing,
)
from atomr_accel_flashattn.bench.cells import SOFTCAP, SOFTCAP_SCORE_STD, Cell, all_cells  # noqa: E402
from atomr_accel_flashattn.bench.families import OfFamily, request_of  # noqa: E402
from atomr_accel_flashattn.bench.inputs import CHECKED_ROWS, ERROR_LIMIT, Inputs, _float32_rows, check_rows, make_inputs  # noqa: E402
from atomr_accel_flashattn.bench.measure import Options  # noqa: E402
from atomr_accel_flashattn.bench.peers import CudnnPeer, Ours, Refused, TorchFa2  # noqa: E402
from atomr_accel_flashattn.bench.report import header, markdown  # noqa: E402
from atomr_accel_flashattn.bench.timing import Contestant, Timing, measure_in_turns  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.types import DType  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import fake  # noqa: E402

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"head_dim": 64, "heads": 4, "heads_kv": 4, "lengths": (96, 96), "causal": True}
CELLS = [
    Cell(group="grid", **SIZES),
    Cell(group="grid", **SIZES | {"causal": False}),
    Cell(group="gqa", **SIZES | {"heads_kv": 2}),
    Cell(group="varlen", packed=True, **SIZES | {"lengths": (20, 96, 70)}),
    Cell(group="window", window=16, **SIZES),
    Cell(group="alibi", alibi=True, **SIZES),
    Cell(group="softcap", softcap=SOFTCAP, score_std=SOFTCAP_SCORE_STD, **SIZES),
    Cell(group="sink4", window=16, sink_tokens=4, **SIZES),
    Cell(group="gqa", **SIZES | {"heads_kv": 2, "lengths": (16, 16), "length_k": 200}),
]


def inputs_of(cell: Cell) -> Inputs:
    return make_inputs(cell, CPU, l2_bytes=0)[0]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_our_calls_do_what_the_cell_says(cell: Cell) -> None:
    inputs, peer = inputs_of(cell), Ours()
    assert check_rows(cell, inputs, peer.prepare(cell, inputs)()) < 5e-3


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_check_sees_a_wrong_mask_a_swapped_head_and_a_nan(cell: Cell) -> None:
    inputs, peer = inputs_of(cell), Ours()
    out = peer.prepare(cell, inputs)()
    other = replace(cell, group="other", window=8, sink_tokens=0)
    assert check_rows(cell, inputs, peer.prepare(other, inputs)()) > 0.1
    assert check_rows(cell, inputs, out.flip(-2)) > 0.1
    assert check_rows(cell, inputs, torch.full_like(out, float("nan"))) == float("inf")


@pytest.mark.parametrize("cell", [cell for cell in all_cells() if cell.features], ids=str)
def test_the_check_sees_a_feature_that_was_left_out(cell: Cell) -> None:
    """At the cells' own lengths, with one head and one sequence of them."""
    one = replace(cell, heads=1, heads_kv=1, lengths=cell.lengths[:1])
    inputs, without = inputs_of(one), replace(one, alibi=False, softcap=0.0, sink_tokens=0)
    out = torch.zeros_like(inputs.q)
    out[0, -CHECKED_ROWS:] = _float32_rows(without, inputs.q[0, -CHECKED_ROWS:], inputs.k[0], inputs.v[0], None).to(out.dtype)
    assert check_rows(without, inputs, out) < 5e-3
    assert check_rows(one, inputs, out) > 2 * ERROR_LIMIT[one.dtype]


def test_inputs_are_random_and_exceed_the_cache_together() -> None:
    cell = CELLS[0]
    sets = make_inputs(cell, CPU, l2_bytes=cell.min_bytes)
    assert len(sets) == 3
    assert not torch.equal(sets[0].q, sets[1].q)
    assert abs(float(sets[0].q.float().std()) - 1) < 0.1


def test_peers_say_why_they_do_not_do_a_cell() -> None:
    for cell in CELLS[3:8]:
        with pytest.raises(Refused, match="packed sequences, window, ALiBi, softcap or sink tokens"):
            CudnnPeer().prepare(cell, inputs_of(cell))
    with pytest.raises(Refused, match="to the first key, not to the last"):
        CudnnPeer().prepare(CELLS[8], inputs_of(CELLS[8]))


def test_torch_is_timed_without_what_its_flash_attention_does_not_have() -> None:
    for cell in CELLS[5:8]:
        assert TorchFa2().computed(cell) == replace(cell, alibi=False, softcap=0.0, sink_tokens=0)
    assert TorchFa2().computed(CELLS[4]) == CELLS[4]


def test_the_operator_of_torch_is_told_the_keys_and_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    operator = SimpleNamespace(_flash_attention_forward=lambda *arguments, **options: (asked.append((arguments[3:], options)), "o")[1])
    monkeypatch.setattr(torch.ops, "aten", operator)
    for cell in CELLS[7:]:
        assert TorchFa2().prepare(cell, inputs_of(cell))() == "o"
    assert asked[0] == ((None, None, 96, 96, 0.0, False, False), {"window_size_left": 15, "window_size_right": 0})
    assert asked[1] == ((None, None, 16, 200, 0.0, True, False), {})


def test_the_dense_peer_is_right() -> None:
    for cell in CELLS[:3]:
        inputs = inputs_of(cell)
        assert check_rows(cell, inputs, TorchFa2().sdpa(cell, inputs)()) < 1e-2


def test_contestants_take_turns_in_shuffled_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def note(name: str) -> Contestant:
        return Contestant([lambda: seen.append(name)], nullcontext)

    def time_once(calls: Any) -> float:
        calls[0]()
        return float(len(seen))

    monkeypatch.setattr(timing, "_settle_and_time", time_once)
    timings = measure_in_turns({name: note(name) for name in "abc"}, rounds=8, seed=1)
    rounds = [seen[i : i + 3] for i in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 2
    assert all(len(found.rounds) == 8 for found in timings.values())


def test_the_median_of_the_rounds_counts() -> None:
    found = Timing([3.0, 1.0, 2.0, 9.0, 2.0])
    assert found.ms == 2.0
    assert found.spread == 4.0


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a card that runs small cells and draws lots for the times."""
    draw = random.Random(0)

    def times(contestants: Mapping[str, Contestant], *, rounds: int, seed: int) -> dict[str, Timing]:
        del seed
        return {name: Timing([draw.uniform(1, 2) for _ in range(rounds)]) for name in contestants}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "card", lambda: (CPU, 0))
    monkeypatch.setattr(measure, "ceilings", lambda: {"matmul_bf16_tflops": 700.0, "copy_gbs": 4000.0})
    monkeypatch.setattr(forward, "select", lambda _patterns: CELLS)
    monkeypatch.setattr(measure, "measure_in_turns", times)
    monkeypatch.setattr(entry, "make_record", _record)


def _record(kind: str, body: dict[str, Any], *, commit: str | None) -> dict[str, Any]:
    return {"kind": kind, "timestamp": "2026-01-02T03:04:05+00:00", "commit": commit, "device": {"name": "No Card"}, "versions": {}} | body


@pytest.mark.usefixtures("made_up")
def test_a_run_prints_rows_and_writes_a_record_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines: list[str] = []
    report, path = entry.main(Options(rounds=3), out=tmp_path, commit="abc", say=lines.append)
    assert report.failures == []
    assert path.name == "forward_no-card_20260102T030405.json"
    assert path.with_suffix(".png").stat().st_size > 10_000
    record = json.loads(path.read_text())
    assert [row["cell"] for row in record["rows"]] == [str(cell) for cell in CELLS]
    assert record["rows"][3]["results"]["cudnn"]["refused"]
    assert [row["results"]["fa2"]["note"] for row in record["rows"][5:7]] == ["without ALiBi", "without softcap"]
    assert "* fa2 is timed without softcap, which it does not have" in lines
    for row in record["rows"]:
        assert row["kernel"] == "reference_cpu"
        ours = row["results"]["ours"]
        assert ours["tflops"] == pytest.approx(row["flops"] / ours["ms"] * 1e-9)
        for name, ratio in row["ratios"].items():
            assert ratio == pytest.approx(row["results"][name]["ms"] / ours["ms"])
    assert record["geometric_means"].keys() == {"fa2"}  # cuDNN needs a card
    assert sum(line.startswith(tuple(map(str, CELLS))) for line in lines) == len(CELLS)
    page = markdown(record)
    assert "No Card" in page
    assert page.count("\n| ") == len(CELLS) + 1


@pytest.mark.usefixtures("made_up")
def test_the_rate_of_a_peer_that_leaves_sink_tokens_out_is_of_the_pairs_that_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    without = replace(CELLS[7], sink_tokens=0)
    monkeypatch.setattr(TorchFa2, "prepare", lambda _self, _cell, inputs: Ours().prepare(without, inputs))
    monkeypatch.setattr(forward, "select", lambda _patterns: CELLS[7:8])
    (row,) = forward.run_forward(Options(peers=("ours", "fa2"))).rows
    for name, cell in (("ours", CELLS[7]), ("fa2", without)):
        result = row.results[name]
        assert result.ms is not None
        assert result.tflops == pytest.approx(cell.flops / result.ms * 1e-9)
    assert (row.results["fa2"].note, without.flops < row.flops) == ("without sink tokens", True)


@pytest.mark.usefixtures("made_up")
def test_a_wrong_answer_is_not_timed_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Ours, "prepare", lambda _self, _cell, inputs: lambda: torch.zeros_like(inputs.q))
    report, _ = entry.main(Options(), out=tmp_path, picture=False, say=lambda _line: None)
    assert len(report.failures) == len(CELLS)
    assert all("wrong: relative error 1" in failure for failure in report.failures)
    assert report.geometric_means == {}


@pytest.mark.usefixtures("made_up")
def test_cells_that_the_budget_does_not_reach_are_named(tmp_path: Path) -> None:
    report, _ = entry.main(Options(budget=-1), out=tmp_path, picture=False, say=lambda _line: None)
    assert report.skipped == [str(cell) for cell in CELLS]


@pytest.mark.usefixtures("made_up")
def test_an_unknown_peer_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="no peer named fa9; there are ours, fa2, cudnn, fa3, fa4, cudnn_fe, flex, ours_bf16, ours_single_level, and all"
    ):
        forward.run_forward(Options(peers=("fa9",)))


@pytest.mark.usefixtures("made_up")
def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no family named fa9; there are fa2, fa3"):
        forward.run_forward(Options(families=("fa9",)))


def test_the_first_family_is_our_column_and_others_stand_beside_it() -> None:
    assert [peer.name for peer in forward.chosen_peers(Options())][:3] == ["ours", "fa2", "cudnn"]
    two = forward.chosen_peers(Options(families=("fa3", "fa2")))
    assert [peer.name for peer in two][:4] == ["ours", "ours_fa2", "fa2", "cudnn"]
    assert isinstance(two[0], OfFamily)
    assert two[0].family is Family.FA3
    assert header([peer.name for peer in two]).split()[-len(two) * 2 + 2 :: 2] == ["/"] * (len(two) - 1)
    assert [peer.name for peer in forward.chosen_peers(Options(peers=("ours", "flex")))] == ["ours", "flex"]


@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.value)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_chosen_family_does_what_the_cell_says(cell: Cell, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: STREAM, raising=False)
    made = inputs_of(cell)
    moved = replace(made, **{field.name: fake(x) for field in fields(made) if torch.is_tensor(x := getattr(made, field.name))})
    call = OfFamily(family, "ours").prepare(cell, moved)
    for _ in range(2):
        assert check_rows(cell, made, call().as_subclass(torch.Tensor)) < 5e-3
    assert {launch[0].family for launch in gpu.launches} == {family}
    assert gpu.repeated == [False, True, True]


def test_a_family_that_the_device_does_not_have_is_refused() -> None:
    with pytest.raises(Refused, match="fa3 resolves to reference_cpu here"):
        OfFamily(Family.FA3, "ours").prepare(CELLS[0], inputs_of(CELLS[0]))


def test_without_a_card_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        forward.run_forward(Options())


@pytest.mark.parametrize("dtype", [DType.F8E4M3, DType.F8E5M2], ids=lambda dtype: dtype.value)
def test_inputs_of_fp8_are_answered_and_checked_as_they_are(dtype: DType) -> None:
    cell = Cell(group="fp8", head_dim=64, heads=4, heads_kv=2, lengths=(96, 96), causal=True, dtype=dtype, score_std=2.0)
    inputs = make_inputs(cell, CPU, l2_bytes=1)[0]
    assert inputs.q.element_size() == 1
    out = fa.run(request_of(cell, inputs)).out
    assert out.dtype is torch.bfloat16
    assert check_rows(cell, inputs, out) < ERROR_LIMIT[dtype]
    assert check_rows(cell, inputs, out.roll(1, dims=1)) > ERROR_LIMIT[dtype]
