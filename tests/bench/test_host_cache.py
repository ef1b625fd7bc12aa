"""Calls over a KV cache in the host benchmark, on a fake GPU that notes what is launched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench import host, host_cache  # noqa: E402
from atomr_accel_flashattn.bench.cache_cells import CacheCell  # noqa: E402
from atomr_accel_flashattn.bench.cache_inputs import CacheInputs  # noqa: E402
from atomr_accel_flashattn.requests.forward import ForwardRequest  # noqa: E402
from tests.fakes.tensors import fake  # noqa: E402
from tests.host.cache_calls import NotingGpu, install  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotingGpu]:
    """A card that notes launches, on which calls of the benchmark put their inputs."""
    make = host_cache.make_cache_inputs

    def on_card(cell: CacheCell, _device: Any, **options: Any) -> list[CacheInputs]:
        arrays = ({each.name: getattr(x, each.name) for each in fields(x)} for x in make(cell, torch.device("cpu"), **options))
        return [CacheInputs(**{name: None if x is None else fake(x) for name, x in each.items()}) for each in arrays]

    monkeypatch.setattr(host_cache, "make_cache_inputs", on_card)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host, "_current_device", lambda: "the fake one")
    yield from install(monkeypatch, fa.SmArch.SM_90A)


def test_calls_over_a_cache_have_the_launches_that_they_are_counted_with(gpu: NotingGpu) -> None:
    for name, each in host_cache.host_calls(torch.device("cpu")).items():
        each.call()
        gpu.noted.clear()
        each.call()
        filled = "a number" in name  # by torch
        assert len(gpu.noted) == each.launches - filled, name


def test_calls_over_a_cache_are_timed_beside_a_dense_one_without_a_request(gpu: NotingGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    first = host._cache_us(host.HostOptions(calls=1, repeats=1, warm_up=1), lines.append)
    monkeypatch.setattr(ForwardRequest, "__post_init__", None)
    calls = host_cache.host_calls(torch.device("cpu"))
    for each in calls.values():
        each.call()
    assert first.keys() == {"enqueue", "beyond_dense"}
    assert list(first["enqueue"]) == list(calls)
    assert list(first["beyond_dense"]) == [name for name in calls if name != host_cache.DENSE_CALL]
    assert [line.startswith("enqueue ") for line in lines] == [True] * len(calls)
    assert gpu.noted


def test_a_further_launch_is_what_lies_beyond_dense() -> None:
    calls = {name: host_cache.HostCall(lambda: None, launches) for name, launches in (("dense", 1), ("one", 1), ("two", 2), ("three", 3))}
    found = host_cache.beyond_dense_us(calls, {"dense": 9.0, "one": 10.0, "two": 13.0, "three": 17.0})
    assert found == {"one": 1.0, "two": 4.0, "three": 4.0}
