"""Fixtures of the tests of the actor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.actor.devices import HeldDevice
from tests.actor.fake_gpu import FakeDriver, install


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    fake = install(monkeypatch, plans=True)
    yield fake
    fake.completed.set()


@pytest.fixture
def device() -> Iterator[HeldDevice]:
    made = HeldDevice()
    yield made
    made.complete_all()
