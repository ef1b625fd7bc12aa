"""A Ray made of Python: workers answer, fail and die when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn import FlashAttnPool, FlashAttnProps
from atomr_accel_flashattn.actor.ray import pool
from atomr_accel_flashattn.actor.ray.wire import WireArray

if TYPE_CHECKING:
    import pytest


class RayError(Exception):
    """As in Ray."""


class RayTaskError(RayError):
    """As in Ray: the code of a worker failed, and the worker lives."""


class FakeWorker:
    """What a pool has of a worker: ``run.remote`` and ``ready.remote``."""

    def __init__(self) -> None:
        self.calls: list[Future[Any]] = []
        self.run = SimpleNamespace(remote=self._run)
        self.ready = SimpleNamespace(remote=lambda: None)

    def _run(self, *_: object) -> Any:
        self.calls.append(Future())
        return SimpleNamespace(future=lambda call=self.calls[-1]: call)

    def answer(self, call: int = -1) -> None:
        """Zeros, for a message of tests/actor/calls.py."""
        self.calls[call].set_result([WireArray(np.zeros((1, 2, 2, 8), np.float32), "float32"), None, None])


class FakeRay:
    """What a pool has of the module. ``start_worker`` is called before each worker is made."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.killed: list[FakeWorker] = []
        self.start_worker: Callable[[], object] = lambda: None
        self.wait: Callable[[], object] = lambda: None

    def is_initialized(self) -> bool:
        return True

    def put(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def get(self, references: list[Any], timeout: float | None = None) -> list[int]:  # noqa: ARG002 - as in Ray
        self.wait()
        return [0] * len(references)

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._make))

    def _make(self, *_: object) -> FakeWorker:
        self.start_worker()
        self.workers.append(FakeWorker())
        return self.workers[-1]

    def kill(self, worker: FakeWorker) -> None:
        self.killed.append(worker)


def start_pool(monkeypatch: pytest.MonkeyPatch, ray: FakeRay, workers: int = 1, **options: Any) -> FlashAttnPool:
    """A pool on it."""
    monkeypatch.setattr(pool, "_import_ray", lambda: ray)
    props = {"device": "cpu", "label": "fake", **options.pop("props", {})}
    return FlashAttnPool.start(workers, FlashAttnProps(**props), **options)
