"""Fixtures of the tests of the actor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.actor.fake_gpu import FakeDriver, install


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    fake = install(monkeypatch, plans=True)
    yield fake
    fake.landed.set()
