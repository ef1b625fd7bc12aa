"""The backward benchmark on the CPU: small cells, real gradients, and times that are made up."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.bench import backward, entry, host, measure  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench.autograd import deterministic_algorithms, training_step  # noqa: E402
from atomr_accel_flashattn.bench.backward import MEMORY_CELLS, Backward  # noqa: E402
from atomr_accel_flashattn.bench.cells import Cell, all_cells, backward_cells  # noqa: E402
from atomr_accel_flashattn.bench.forward import Forward  # noqa: E402
from atomr_accel_flashattn.bench.inputs import Inputs, check_gradients, make_inputs  # noqa: E402
from atomr_accel_flashattn.bench.measure import Options  # noqa: E402
from atomr_accel_flashattn.bench.other_peers import FlashAttnPackage  # noqa: E402
from atomr_accel_flashattn.bench.peers import CudnnPeer, Ours, Peer, Refused, TorchFa2  # noqa: E402
from atomr_accel_flashattn.bench.report import markdown  # noqa: E402
from atomr_accel_flashattn.bench.timing import Contestant, Timing  # noqa: E402
from atomr_accel_flashattn.functional import flash_attn_func, flash_attn_varlen_func  # noqa: E402
from atomr_accel_flashattn.limits import NOT_BUILT, not_built  # noqa: E402

from .test_forward import CELLS as FORWARD_CELLS, CPU, SIZES  # noqa: E402

pytestmark = pytest.mark.torch

DETERMINISTIC = Cell(group="deterministic", deterministic=True, **SIZES)
CELLS = [*FORWARD_CELLS[:5], DETERMINISTIC]
SIDES = [*FORWARD_CELLS, DETERMINISTIC]


def inputs_of(cell: Cell) -> Inputs:
    return make_inputs(cell, CPU, l2_bytes=0, dout=True)[0]


def error_of(peer: Peer, cell: Cell) -> float:
    """Of the second answer: a peer's graph has to last."""
    inputs = inputs_of(cell)
    with torch.no_grad(), Backward().context(peer, cell):
        call = Backward().prepare(peer, cell, inputs)
        call()
        return Backward().error(cell, inputs, call())


# --- cells and their arithmetic ---


def test_the_cells_are_those_of_the_forward_deterministic_ones_and_some_of_one_kv_head() -> None:
    names = [str(cell) for cell in backward_cells()]
    assert len(set(names)) == len(names)
    added = {str(cell): cell for cell in backward_cells() if str(cell) not in set(map(str, all_cells()))}
    assert {name for name, cell in added.items() if not cell.deterministic} == {"gqa_d128_h16x1_causal_8k", "gqa_d128_h16x1_causal_4k"}
    assert any(cell.deterministic for cell in added.values())
    assert {cell.group for cell in backward_cells()} == {"grid", "gqa", "varlen", "window", "deterministic"}
    assert set(names) > MEMORY_CELLS


def test_a_backward_has_five_products() -> None:
    for cell in backward_cells():
        assert cell.backward_flops == pytest.approx(2.5 * cell.flops)
    cell = replace(CELLS[1], head_dim=128, v_head_dim=64, heads=1, heads_kv=1, lengths=(8,))
    assert cell.backward_flops == 2 * (3 * 128 + 2 * 64) * 64


# --- answers and their check ---


@pytest.mark.parametrize("cell", SIDES, ids=str)
def test_our_gradients_are_those_of_the_cell(cell: Cell) -> None:
    assert error_of(Ours(), cell) < 1e-2


@pytest.mark.parametrize("cell", SIDES, ids=str)
def test_the_check_sees_a_wrong_mask_a_swapped_head_and_a_nan(cell: Cell) -> None:
    inputs = inputs_of(cell)
    dq, dk, dv = Backward().prepare(Ours(), cell, inputs)()
    other = replace(cell, group="other", window=8, sink_tokens=0)
    assert check_gradients(cell, inputs, Backward().prepare(Ours(), other, inputs)()) > 0.1
    for wrong in ((dq.flip(-2), dk, dv), (dq, dk.flip(-2), dv), (dq, dk, dv.flip(-2))):
        assert check_gradients(cell, inputs, wrong) > 0.1
    assert check_gradients(cell, inputs, (dq, dk, torch.full_like(dv, float("nan")))) == float("inf")


def test_the_check_takes_long_sequences_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = FORWARD_CELLS[8]
    inputs = inputs_of(cell)
    answer = Backward().prepare(Ours(), cell, inputs)()
    whole = check_gradients(cell, inputs, answer)
    monkeypatch.setattr("atomr_accel_flashattn.bench.inputs._ROWS_AT_ONCE", 7)
    assert check_gradients(cell, inputs, answer) == pytest.approx(whole, rel=1e-3)


# --- peers ---


@pytest.mark.parametrize("cell", CELLS[:2], ids=str)
def test_a_peer_is_differentiated_by_autograd(cell: Cell) -> None:
    assert error_of(TorchFa2(), cell) < 2e-2


@pytest.mark.parametrize("cell", CELLS[:5], ids=str)
def test_packages_of_the_authors_are_differentiated_too(cell: Cell) -> None:
    package = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    assert error_of(FlashAttnPackage("fa3", lambda: package), cell) < 1e-2


def test_peers_say_why_they_have_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchFa2, "prepare", lambda _self, _cell, inputs: inputs.q.detach)
    with pytest.raises(Refused, match="it has no backward"):
        Backward().prepare(TorchFa2(), CELLS[0], inputs_of(CELLS[0]))
    with pytest.raises(Refused, match="it has no backward"):
        training_step(TorchFa2(), CELLS[0], inputs_of(CELLS[0]))()
    with pytest.raises(Refused, match="only torch's FlashAttention-2 is asked for equal bits"):
        Backward().prepare(CudnnPeer(), DETERMINISTIC, inputs_of(DETERMINISTIC))


def test_deterministic_cells_run_with_the_switch_of_torch() -> None:
    from torch.utils import deterministic

    assert not torch.are_deterministic_algorithms_enabled()
    fills = deterministic.fill_uninitialized_memory
    with Backward().context(Ours(), DETERMINISTIC):
        assert torch.are_deterministic_algorithms_enabled()
        assert not deterministic.fill_uninitialized_memory
    with pytest.raises(RuntimeError, match="x"), deterministic_algorithms():
        raise RuntimeError("x")
    with Backward().context(Ours(), CELLS[0]):
        assert not torch.are_deterministic_algorithms_enabled()
    assert deterministic.fill_uninitialized_memory is fills


def test_the_backward_has_one_family() -> None:
    with pytest.raises(ValueError, match="got families fa3; the backward has one family"):
        Backward().peers(Options(families=("fa3",)))
    assert [peer.name for peer in Backward().peers(Options())] == [peer.name for peer in Forward().peers(Options())]


# --- training steps ---


@pytest.mark.parametrize("cell", CELLS[:5], ids=str)
def test_a_training_step_runs_forward_and_backward_anew(cell: Cell) -> None:
    inputs = inputs_of(cell)
    with torch.no_grad():
        step = training_step(Ours(), cell, inputs)
        step()
        inputs.k.mul_(2)  # the next forward sees it
        assert check_gradients(cell, inputs, step()) < 1e-2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's compiler
def test_steps_are_timed_on_the_host_eager_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host, "COMPILER", "aot_eager")
    monkeypatch.setattr(host, "_inputs", lambda cell, dout: make_inputs(cell, CPU, l2_bytes=0, dout=dout)[0])
    lines: list[str] = []
    options = host.HostOptions(calls=host.LAUNCHES_OF_STEP, repeats=2, warm_up=0)
    compiler, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(options) or compiler(call, **options))
    torch._dynamo.reset()
    with torch.no_grad():
        found = host._steps_us(host.SMALL, options, lines.append)
    torch._dynamo.reset()
    assert compiled == [{"fullgraph": True, "backend": "aot_eager"}] * 2
    assert list(found) == ["ours", "fa2", "cudnn", "ours_compiled", "fa2_compiled"]
    assert isinstance(found["cudnn"], str), "which needs a card"
    assert all(not isinstance(found[name], str) and found[name] > 0 for name in found if name != "cudnn"), found
    assert [line.split()[:4] for line in lines[:2]] == [["step", "full", "dense", name] for name in ("ours", "fa2")]
    assert host.HostOptions().calls < 1024


def test_the_peers_take_turns_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made: list[str] = []
    contestants = {name: Contestant([lambda name=name: made.append(name)], nullcontext) for name in ("one", "two")}
    costs = host.enqueue_us(contestants, host.HostOptions(calls=3, repeats=4, warm_up=8))
    assert costs.keys() == {"one", "two"}
    assert len(made) == 2 * 4 * (3 + 2)
    assert [sorted(set(made[n : n + 10])) for n in range(0, 40, 10)] == [["one", "two"]] * 4


# --- a run ---


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a card that runs small cells and draws lots for the times."""
    draw = random.Random(0)

    def times(contestants: Mapping[str, Contestant], *, rounds: int, seed: int) -> dict[str, Timing]:
        del seed
        return {name: Timing([draw.uniform(1, 2) for _ in range(rounds)]) for name in contestants}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (measure, backward):
        monkeypatch.setattr(module, "card", lambda: (CPU, 0))
    monkeypatch.setattr(measure, "ceilings", lambda: {"matmul_bf16_tflops": 700.0, "copy_gbs": 4000.0})
    monkeypatch.setattr(measure, "measure_in_turns", times)
    monkeypatch.setattr(backward, "backward_cells", lambda: CELLS)
    monkeypatch.setattr(backward, "MEMORY_CELLS", {str(CELLS[0])})
    monkeypatch.setattr(backward, "peak_bytes", lambda step: (step(), 3 << 20)[1])
    monkeypatch.setattr(entry, "make_record", _record)


def _record(kind: str, body: dict[str, Any], *, commit: str | None) -> dict[str, Any]:
    return {"kind": kind, "timestamp": "2026-01-02T03:04:05+00:00", "commit": commit, "device": {"name": "No Card"}, "versions": {}} | body


@pytest.mark.usefixtures("made_up")
def test_a_run_prints_rows_and_writes_a_record_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines: list[str] = []
    report, path = entry.main_backward(Options(rounds=3), out=tmp_path, commit="abc", say=lines.append)
    assert report.failures == []
    assert path.name == "backward_no-card_20260102T030405.json"
    assert path.with_suffix(".png").stat().st_size > 10_000
    record = json.loads(path.read_text())
    assert (record["kind"], record["direction"]) == ("backward", "backward")
    assert [row["cell"] for row in record["rows"]] == [str(cell) for cell in CELLS]
    assert [row["deterministic"] for row in record["rows"]] == [False] * 5 + [True]
    for row, cell in zip(record["rows"], CELLS, strict=True):
        ours = row["results"]["ours"]
        assert row["flops"] == 2.5 * cell.flops
        assert ours["tflops"] == pytest.approx(row["flops"] / ours["ms"] * 1e-9)
    (memory,) = record["memory"]
    assert (memory["cell"], memory["peak_bytes"]["ours"], memory["peak_bytes"]["fa2"]) == (str(CELLS[0]), 3 << 20, 3 << 20)
    assert "Error" in memory["peak_bytes"]["cudnn"], "which needs a card"
    said = f"peak memory of forward and backward beyond the inputs, {CELLS[0]}: ours 3 MiB, fa2 3 MiB, cudnn "
    assert any(line.startswith(said) for line in lines)
    assert said in markdown(record)


@pytest.mark.usefixtures("made_up")
def test_what_is_not_built_is_left_out_by_name_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(key: Any) -> Any:
        if key.extras.deterministic:
            raise not_built("fp8_backward")  # as good as any other
        return SimpleNamespace(kernel_name="bwd")

    monkeypatch.setattr(backward, "lookup", refuse)
    lines: list[str] = []
    report, _ = entry.main_backward(Options(peers=("ours",)), out=tmp_path, picture=False, say=lines.append)
    assert [row.cell for row in report.rows] == [str(cell) for cell in CELLS[:5]]
    assert report.failures == report.skipped == []
    assert f"not measured, because this version refuses it: {DETERMINISTIC}: fp8_backward: {NOT_BUILT['fp8_backward']}" in lines


@pytest.mark.usefixtures("made_up")
def test_a_wrong_gradient_is_not_timed_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backward, "_requested", lambda _cell, inputs: lambda: (inputs.q, inputs.k, inputs.v))
    report, _ = entry.main_backward(Options(), out=tmp_path, picture=False, say=lambda _line: None)
    assert len(report.failures) == len(CELLS)
    assert all("wrong: relative error " in failure for failure in report.failures)
