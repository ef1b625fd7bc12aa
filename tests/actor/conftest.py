"""Fixtures of the tests of the actor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.driver import FakeDriver
from tests.fakes.gpu import FakeGpu
from tests.fakes.inner import HeldDevice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    made = FakeGpu()
    made.install(monkeypatch)
    yield made
    made.driver.complete()


@pytest.fixture
def cuda(gpu: FakeGpu) -> FakeDriver:
    """The driver of the fake GPU."""
    return gpu.driver


@pytest.fixture
def device() -> Iterator[HeldDevice]:
    made = HeldDevice()
    yield made
    made.complete_all()
