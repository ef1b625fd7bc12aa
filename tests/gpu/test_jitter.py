"""Bits stay the same from run to run, also when every thread naps for random times before its copies, barriers and products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.dispatch import lookup  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec  # noqa: E402
from atomr_accel_flashattn.runtime.execute import run  # noqa: E402
from atomr_accel_flashattn.types import DType  # noqa: E402
from tests.cases import Case, build  # noqa: E402
from tests.gpu.families import DEVICE, HAS_WGMMA, use_family  # noqa: E402
from tests.gpu.harness import Call, make_call  # noqa: E402
from tests.gpu.jitter import FLAWS, headers_with_naps, use_headers  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(DEVICE == "cpu", reason="about threads of a GPU")]

RUNS = 1000
FLAWED_RUNS = 100
BLOCK_PER_TILE = 1 << 20  # multiprocessors, more than any case has tiles


@dataclass(frozen=True)
class Schedule:
    """A case, the family that runs it, and how many multiprocessors the FA3 family takes the card to have; None is as many as it has."""

    family: Family
    case: Case
    blocks: int | None = None

    def __str__(self) -> str:
        blocks = {None: "", BLOCK_PER_TILE: "-block_per_tile"}.get(self.blocks, f"-{self.blocks}_blocks")
        return f"{self.family.value}-{self.case}{blocks}"


def sized(width: int, **options: Any) -> Case:
    sizes = {"batch": 2, "heads": 4, "heads_kv": 2, "seqlen_q": 700, "seqlen_k": 900}
    return Case(dtype=DType.BF16, **({**sizes, "head_dim": width, "v_head_dim": width} | options))


CAUSAL: dict[str, Any] = {"right": 0}
WINDOW: dict[str, Any] = {"left": 200, "right": 0, "sink_tokens": 5}
PACKED: dict[str, Any] = {"lengths_q": (300, 0, 1, 513, 64, 0), "lengths_k": (300, 40, 700, 513, 0, 0), "right": 0}
FA3 = (
    Schedule(Family.FA3, sized(64, **CAUSAL), blocks=7),
    Schedule(Family.FA3, sized(64, heads_kv=4, **WINDOW), blocks=BLOCK_PER_TILE),
    Schedule(Family.FA3, sized(64, **PACKED), blocks=5),
    Schedule(Family.FA3, sized(128, **CAUSAL), blocks=3),
    Schedule(Family.FA3, sized(128, heads_kv=4), blocks=BLOCK_PER_TILE),
    Schedule(Family.FA3, sized(128, **WINDOW), blocks=7),
    Schedule(Family.FA3, sized(128, heads_kv=4, **PACKED), blocks=7),
    Schedule(Family.FA3, sized(128, batch=5, heads=16, seqlen_q=400, dropout_p=0.1)),
    Schedule(Family.FA3, sized(256, heads_kv=4, **CAUSAL), blocks=7),
    Schedule(Family.FA3, sized(256), blocks=7),
    Schedule(Family.FA3, sized(256, **PACKED), blocks=BLOCK_PER_TILE),
)
FA2 = (
    Schedule(Family.FA2, sized(64, **WINDOW)),
    Schedule(Family.FA2, sized(128, **CAUSAL)),
    Schedule(Family.FA2, sized(128, **PACKED)),
    Schedule(Family.FA2, sized(256)),
)
SCHEDULES = (*FA2, *(FA3 if HAS_WGMMA else ()))
FLAWED = (FA2[1], *((FA3[3],) if HAS_WGMMA else ()))


@pytest.fixture
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> Any:
    """That of the schedule."""
    schedule: Schedule = request.getfixturevalue("schedule")
    record_property("family", schedule.family.value)
    with use_family(schedule.family, monkeypatch, schedule.blocks):
        yield schedule.family


def differs(a: Any, b: Any) -> Any:
    """Whether any bit does, as a tensor: nothing is waited for."""
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return (a.view(kind) != b.view(kind)).any()


def answer(call: Call) -> tuple[Any, Any]:
    """One run into poisoned outputs: the buffer around the output, and the LSE."""
    call.out.storage.fill_(float("nan"))
    output = run(call.request)
    return call.out.storage, output.lse


def different_runs(call: Call, expected: tuple[Any, Any], runs: int) -> list[int]:
    """Which of so many runs, launched one after the other without waiting, have other bits."""
    wrong = torch.zeros(runs, dtype=torch.bool, device=DEVICE)
    for number in range(runs):
        storage, lse = answer(call)
        wrong[number] = differs(storage, expected[0]) | differs(lse, expected[1])
        lse.fill_(float("nan"))  # the next run is given this memory
    return wrong.nonzero().flatten().tolist()


def plain_answer(schedule: Schedule, call: Call) -> tuple[Any, Any]:
    """That of the kernel as it is."""
    spec = lookup(call.request.dispatch_key())
    assert isinstance(spec, KernelSpec)
    assert spec.family is schedule.family
    storage, lse = answer(call)
    return storage.clone(), lse


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_1000_runs_give_the_same_bits(schedule: Schedule) -> None:
    call = make_call(build(schedule.case))
    assert different_runs(call, plain_answer(schedule, call), RUNS) == []


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_1000_runs_with_naps_give_the_same_bits(schedule: Schedule, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(build(schedule.case))
    expected = plain_answer(schedule, call)
    use_headers(headers_with_naps(tmp_path / "cuda"), monkeypatch)
    assert different_runs(call, expected, RUNS) == []


@pytest.mark.parametrize("schedule", FLAWED, ids=str)
def test_naps_bring_a_missing_guard_to_light(schedule: Schedule, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(build(schedule.case))
    expected = plain_answer(schedule, call)
    use_headers(headers_with_naps(tmp_path / "cuda", FLAWS[schedule.family]), monkeypatch)
    assert different_runs(call, expected, FLAWED_RUNS) != []
