"""The pool above a Ray made of Python: whatever Ray refuses, and whoever is interrupted, everybody is answered and no worker is left."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnPool, Overflow
from tests.actor.devices import PATIENCE, message, until
from tests.actor.fake_ray import FakeRay, FakeWorker, RayError, RayTaskError, start_pool

Start = Callable[..., FlashAttnPool]


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, ray: FakeRay) -> Start:
    return lambda *workers, **options: start_pool(monkeypatch, ray, *workers, **options)


def called(worker: FakeWorker, count: int = 1) -> None:
    until(lambda: len(worker.calls) == count)


def refuse() -> None:
    raise ValueError("no more of these")


def leave(_: object) -> None:
    raise SystemExit


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_worker_that_cannot_be_replaced_leaves_its_requests_to_the_others(ray: FakeRay, start: Start):
    pool = start(2)
    replies = [pool.ask(message(seed)) for seed in range(2)]
    for worker in ray.workers:
        called(worker)
    ray.hire = refuse
    ray.workers[0].calls[0].set_exception(RayError("dead"))
    called(ray.workers[1], 2)
    assert ray.killed == ray.workers[:1]
    ray.workers[1].answer(0)
    ray.workers[1].answer(1)
    assert all(reply.result(PATIENCE).out is not None for reply in replies)
    pool.stop(timeout=PATIENCE)


def test_the_last_worker_that_cannot_be_replaced_fails_all(ray: FakeRay, start: Start):
    pool = start(window=1)
    replies = [pool.ask(message(seed)) for seed in range(3)]
    called(ray.workers[0])
    ray.hire = refuse
    ray.workers[0].calls[0].set_exception(RayError("dead"))
    for reply in replies:
        assert isinstance(reply.exception(PATIENCE), fa.WorkerLostError)
    with pytest.raises(fa.ActorStoppedError, match="all workers are lost"):
        pool.ask(message())
    pool.stop(timeout=PATIENCE)


def test_a_worker_that_cannot_say_its_answer_is_not_lost(ray: FakeRay, start: Start):
    pool = start()
    failing, other = pool.ask(message()), pool.ask(message())
    called(ray.workers[0], 2)
    ray.workers[0].calls[0].set_exception(RayTaskError("not to be pickled"))
    ray.workers[0].answer(1)
    assert isinstance(failing.exception(PATIENCE), RayTaskError)
    assert other.result(PATIENCE).out is not None
    assert ray.killed == []
    pool.stop(timeout=PATIENCE)


def test_a_request_whose_time_is_over_is_not_sent_again(ray: FakeRay, start: Start):
    pool = start(2)
    late = pool.ask(message(), timeout=0.01)
    assert isinstance(late.exception(PATIENCE), fa.RequestTimeoutError)
    (worker,) = [worker for worker in ray.workers if worker.calls]
    worker.calls[0].set_exception(RayError("dead"))
    until(lambda: pool.unanswered == 0)
    assert sum(len(worker.calls) for worker in ray.workers) == 1
    pool.stop(timeout=PATIENCE)


def test_a_call_that_ray_refuses_is_the_answer_to_its_request(ray: FakeRay, start: Start):
    pool = start()
    ray.workers[0].forward.remote = lambda *_: refuse()
    assert isinstance(pool.ask(message()).exception(PATIENCE), ValueError)
    assert pool.loads == {1: 0}
    pool.stop(timeout=PATIENCE)


@pytest.mark.parametrize("where", ["hire", "wait"])
def test_a_start_that_is_interrupted_leaves_no_worker_and_no_thread(ray: FakeRay, start: Start, where: str):
    setattr(ray, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(2)
    assert ray.killed == ray.workers
    until(lambda: "fake-pool" not in {thread.name for thread in threading.enumerate()})


def test_a_worker_that_cannot_be_ended_does_not_keep_the_others(ray: FakeRay, start: Start, monkeypatch: pytest.MonkeyPatch):
    pool = start(2)
    kill = ray.kill
    monkeypatch.setattr(ray, "kill", lambda worker: kill(worker) or refuse())
    pool.stop(timeout=PATIENCE)
    assert ray.killed == ray.workers


def test_who_waits_in_a_stop_is_released_by_a_shorter_one(ray: FakeRay, start: Start):
    pool = start()
    reply = pool.ask(message())
    called(ray.workers[0])
    patient = threading.Thread(target=pool.stop, daemon=True)
    patient.start()
    until(lambda: not pool.is_alive)
    pool.stop(timeout=0.01)
    assert isinstance(reply.exception(PATIENCE), fa.ActorStoppedError)
    patient.join(PATIENCE)
    assert not patient.is_alive()


def test_a_callback_that_exits_in_a_stop_keeps_nobody_from_being_answered(ray: FakeRay, start: Start):
    pool = start(window=1)
    replies = [pool.ask(message(seed)) for seed in range(3)]
    called(ray.workers[0])
    replies[1].add_done_callback(leave)
    threading.Timer(0.01, ray.workers[0].answer).start()
    pool.stop(drain=False)
    assert [type(reply.exception(0)) for reply in replies] == [type(None), fa.ActorStoppedError, fa.ActorStoppedError]


def test_who_gave_up_queueing_is_not_kept(ray: FakeRay, start: Start):
    pool = start(window=1, props={"mailbox_limit": 1})
    kept = [pool.ask(message())]
    called(ray.workers[0])
    kept.append(pool.ask(message()))
    request = message()
    array = weakref.ref(request.request.q)
    with pytest.raises(fa.RequestTimeoutError, match="no place in the mailbox"):
        pool.ask(request, timeout=0.01, overflow=Overflow.WAIT)
    del request
    gc.collect()
    assert array() is None
    assert pool.waiting == 1
    pool.stop(timeout=0.01)
