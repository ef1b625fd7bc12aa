"""Over 100,000 requests from 32 threads, random faults, cancels, a stop in the middle: each resolves exactly once, memory is flat."""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnHandle, FlashAttnInner, FlashAttnProps, Overflow, SmArch
from atomr_accel_flashattn.actor.inner import Job
from atomr_accel_flashattn.actor.reply import Reply, Ticket
from tests.actor.calls import message
from tests.fakes.inner import FaultyDevice
from tests.fakes.waiting import PATIENCE

THREADS = 32
ROUNDS = 4  # actors one after the other; each but the last is stopped in the middle of its load


class Tally:
    """What became of the requests: outcomes of replies as their callbacks saw them, and what was not accepted."""

    def __init__(self) -> None:
        self.accepted = 0
        self.calls: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.lock = threading.Lock()

    def watch(self, number: int, reply: Future[fa.Output]) -> None:
        """Count every call of the reply's callback."""

        def resolved(done: Future[fa.Output]) -> None:
            error = None if done.cancelled() else done.exception()
            name = "cancelled" if done.cancelled() else "answered" if error is None else type(error).__name__
            with self.lock:
                self.calls[number] += 1
                self.outcomes[name] += 1

        with self.lock:
            self.accepted += 1
        reply.add_done_callback(resolved)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def load(actor: FlashAttnHandle, tally: Tally, numbers: itertools.count[int], requests: int, stop_after: int | None) -> None:
    """``requests`` from 32 threads; after ``stop_after`` of them the actor is stopped while they go on sending."""
    messages = [message(seed, seqlen_q=1, seqlen_k=2, dtype="float16") for seed in range(8)]
    sent = itertools.count()

    def client(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(requests // THREADS):
            number = next(numbers)
            if next(sent) == stop_after:
                threading.Thread(target=actor.stop, kwargs={"drain": choose.random() < 0.5}).start()
            overflow = Overflow.REFUSE if choose.random() < 0.1 else Overflow.WAIT
            timeout = 1e-4 if choose.random() < 0.02 else None
            try:
                reply = actor.ask(choose.choice(messages), overflow=overflow, timeout=timeout)
            except fa.ActorError as error:
                with tally.lock:
                    tally.refused[type(error).__name__] += 1
                continue
            tally.watch(number, reply)
            if choose.random() < 0.1:
                reply.cancel()
            elif choose.random() < 0.1:
                reply.cancelled() or reply.exception(PATIENCE) if choose.random() < 0.5 else reply.done()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "requests"), [("mock", 128_000), ("reference", 32_000)])
def test_every_future_resolves_exactly_once_and_memory_is_flat(kind: str, requests: int):
    tally, numbers = Tally(), itertools.count()
    sizes = []
    for part in range(ROUNDS):
        inner = FlashAttnInner.mock(arch=SmArch.SM_90) if kind == "mock" else FlashAttnInner.reference()
        props = FlashAttnProps(device="cpu", max_in_flight=4, mailbox_limit=256)
        actor = FlashAttnActor.start(props, FaultyDevice(inner, seed=part))
        each = requests // ROUNDS
        load(actor, tally, numbers, each, stop_after=None if part == ROUNDS - 1 else each * 3 // 4)
        actor.stop(timeout=PATIENCE)
        assert actor.unanswered == 0
        del actor
        gc.collect()
        sizes.append(resident_mib())
    assert tally.accepted + sum(tally.refused.values()) == requests
    assert len(tally.calls) == tally.accepted, "a reply was never resolved"
    assert set(tally.calls.values()) == {1}, "a reply was resolved twice"
    assert sum(tally.outcomes.values()) == tally.accepted
    assert tally.outcomes["MockAnswerError" if kind == "mock" else "answered"] > requests / 10
    for outcome in ("OSError", "cancelled"):
        assert tally.outcomes[outcome], f"no request ended as {outcome}: {tally.outcomes}"
    assert tally.refused["ActorStoppedError"]
    assert set(tally.outcomes) <= {"MockAnswerError", "answered", "OSError", "cancelled", "ActorStoppedError", "RequestTimeoutError"}
    assert set(tally.refused) <= {"ActorStoppedError", "MailboxFullError", "RequestTimeoutError"}
    left = [each for each in gc.get_objects() if type(each) in {Ticket, Reply, Job}]  # isinstance would ask every object for its __class__
    assert len(left) < 100, f"{len(left)} requests still live, as {left[0]}"
    assert sizes[-1] - sizes[0] < 32, f"resident memory grew: {sizes} MiB"
