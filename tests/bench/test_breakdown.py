"""The steps of a steady-state call, on a fake GPU: each family is the one that was asked for, and every step does what it times."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.arrays.torch_hooks import hooks, meet_torch  # noqa: E402
from atomr_accel_flashattn.bench import breakdown  # noqa: E402
from atomr_accel_flashattn.bench.breakdown import Steady, call_breakdown, launch_costs, steady  # noqa: E402
from atomr_accel_flashattn.bench.cells import Cell  # noqa: E402
from atomr_accel_flashattn.bench.inputs import make_inputs  # noqa: E402
from atomr_accel_flashattn.bench.peers import Refused  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.launch import launcher as launch  # noqa: E402
from atomr_accel_flashattn.runtime import plan as store  # noqa: E402
from tests.emulator.running import flat_tensor  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import FakeCuda, fake, fresh_hooks  # noqa: E402

pytestmark = pytest.mark.torch

DENSE = Cell(group="host", head_dim=64, heads=1, heads_kv=1, lengths=(64,), causal=False)
PACKED = replace(DENSE, lengths=(64, 32), causal=True, packed=True)
MANY = replace(DENSE, heads=200, heads_kv=200, lengths=(2,))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    card = FakeGpu()
    card.install(monkeypatch, fa.SmArch.SM_90A)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: STREAM, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=STREAM + 1))
    monkeypatch.setattr(breakdown, "WARM_UP", 1)
    monkeypatch.setattr(breakdown, "launch_function", launch.launch_function)
    monkeypatch.setattr(breakdown, "encode", lambda spec, _index: flat_tensor(spec))
    monkeypatch.setattr(breakdown, "move", lambda tensor_map, ptr, _index: launch.move_function()(tensor_map, ptr))
    fresh_hooks(monkeypatch)
    meet_torch()
    hooks.plain_types = frozenset({FakeCuda})
    return card


def held(cell: Cell, family: Family) -> Steady:
    made = make_inputs(cell, torch.device("cpu"), l2_bytes=0)[0]
    moved = {field.name: fake(x) for field in fields(made) if torch.is_tensor(x := getattr(made, field.name))}
    return steady(cell, replace(made, **moved), family)


@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize("cell", [DENSE, PACKED, MANY], ids=["dense", "packed", "many"])
def test_a_steady_call_repeats_the_plan_of_its_family(gpu: FakeGpu, cell: Cell, family: Family):
    call = held(cell, family).call
    for _ in range(3):
        call()
    assert {launch[0].family for launch in gpu.launches} == {family}
    assert gpu.repeated == [False, True, True, True]


@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize("cell", [DENSE, PACKED], ids=["dense", "packed"])
def test_the_steps_and_the_rest_are_the_whole(gpu: FakeGpu, cell: Cell, family: Family):
    found = call_breakdown(held(cell, family), 1, 1)
    whole = found.pop("whole call")
    part = found.pop("of the launch: cuLaunchKernelEx")
    assert part > 0
    assert sum(found.values()) == pytest.approx(whole)
    assert {launch[0].family for launch in gpu.launches} == {family}


@pytest.mark.parametrize("guarded", [True, False])
def test_what_is_timed_as_recognition_recognises(gpu: FakeGpu, guarded: bool):
    if not guarded:
        hooks.guard = None
    inputs = held(DENSE, Family.FA2).inputs
    assert breakdown._recognise((inputs.q, inputs.k, inputs.v))()


@pytest.mark.parametrize("family", Family, ids=str)
def test_launches_are_timed_with_counters_and_without(gpu: FakeGpu, family: Family):
    few, many = held(DENSE, family), held(MANY, family)
    assert not few.launch.kernel.spec.tile.persistent
    assert many.launch.kernel.spec.tile.persistent == (family is Family.FA3)
    found = launch_costs(few, many, 1, 1)
    assert len(found) == (9 if family is Family.FA3 else 7)
    assert {launch[2] for launch in gpu.launches} == {0, STREAM, STREAM + 1}
    kind = fa.Fa3FwdRequest if family is Family.FA3 else fa.Fa2FwdRequest
    assert {key[0] for key, _ in store._plans} == {kind}, "run(request) repeated nothing"


def test_a_family_that_the_device_does_not_have_is_refused():
    with pytest.raises(Refused, match="fa3 resolves to reference_cpu here"):
        steady(DENSE, make_inputs(DENSE, torch.device("cpu"), l2_bytes=0)[0], Family.FA3)
