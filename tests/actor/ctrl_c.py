"""A program that gets 200 Ctrl-Cs in the middle of its work with an actor, and says so. test_ctrl_c.py runs it.

After each one another thread, which gets none, uses the actor in every way: no lock and no place may be
lost. The work is what callers do: send, wait, look, cancel, listen, and queue for a place.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from atomr_accel_flashattn import FlashAttnHandle, Overflow
from atomr_accel_flashattn.actor import Reply
from tests.actor.calls import sent, start_and_launch
from tests.fakes.gpu import FakeGpu

SIGNALS = 200
SECONDS = 10.0  # in which everything has to be as before; it takes milliseconds
LIMIT = 2  # launches in flight, and places in the mailbox
ELSEWHERE = 70  # a context in which callers launch nothing: requests go through the mailbox


class Program:
    """An actor on a fake GPU, and the replies that the main thread has of it."""

    def __init__(self, seed: int) -> None:
        gpu = FakeGpu(launches=Nowhere(), repeated=Nowhere(), grids=Nowhere())
        gpu.install(pytest.MonkeyPatch())
        self.cuda = gpu.driver
        self.cuda.log = Nowhere()
        self.actor: FlashAttnHandle = start_and_launch(max_in_flight=LIMIT, mailbox_limit=LIMIT)
        self.dice = random.Random(seed)
        self.message = sent()
        self.replies: list[Reply] = []
        self.came = False
        self.orders: SimpleQueue[Callable[[], object]] = SimpleQueue()
        threading.Thread(target=self.help, daemon=True).start()

    def ask(self, **options: object) -> Reply:
        self.replies.append(self.actor.ask(self.message, **options))
        return self.replies[-1]

    def round_trip(self) -> None:
        self.ask().result(SECONDS)

    def pipeline(self) -> None:
        for reply in [self.ask() for _ in range(4 * LIMIT)]:
            reply.result(SECONDS)

    def through_the_mailbox(self) -> None:
        self.cuda.current = ELSEWHERE
        self.ask(timeout=SECONDS).result(SECONDS)

    def listen_look_and_cancel(self) -> None:
        reply = self.ask()
        reply.add_done_callback(lambda _: None)
        while not reply.done():
            pass
        self.ask().cancel()

    def sleep(self) -> None:
        self.orders.put(self.hold_for_a_moment)
        self.ask().result(SECONDS)

    def queue_for_a_place(self) -> None:
        self.orders.put(self.hold_for_a_moment)
        for _ in range(4 * LIMIT):
            self.ask(overflow=Overflow.WAIT)

    def hold_for_a_moment(self) -> None:
        self.cuda.hold()
        time.sleep(0.001)
        self.let_go()

    def let_go(self) -> None:
        self.cuda.complete()

    def send_ctrl_c(self) -> None:
        time.sleep(self.dice.random() * 0.004)
        os.kill(os.getpid(), signal.SIGINT)

    def help(self) -> None:
        """In a thread that lives as long as the program: the main thread touches no locks but the actor's."""
        while True:
            self.orders.get()()

    def interrupt(self, work: Callable[[], None]) -> None:
        """One Ctrl-C in ``work``, at a moment that the dice choose; then everything has to be as before."""
        self.came = False
        try:
            self.orders.put(self.send_ctrl_c)
            while not self.came:
                work()
                self.cuda.current = 0
                self.replies.clear()
        except KeyboardInterrupt:
            pass
        checked: SimpleQueue[str] = SimpleQueue()
        self.orders.put(lambda: self.check(checked.put))
        done: list[str] = []
        try:
            while done[-1:] != ["over"]:
                done.append(checked.get(timeout=SECONDS))
        except Empty:
            raise AssertionError(f"{SECONDS:g} s after a Ctrl-C in {work.__name__} only: {done}") from None

    def check(self, done: Callable[[str], None]) -> None:
        """In the other thread: everybody is answered, and the places are all there."""
        self.let_go()
        wait_for(lambda: self.actor.unanswered == 0 and self.actor.waiting == 0)
        done("nobody is without an answer")
        wait_for(lambda: not self.actor._engine.in_flight.launches)
        wait_for(lambda: all(reply.is_over() for reply in self.replies))
        done("nothing is in flight")
        self.cuda.current = ELSEWHERE
        self.actor.ask(self.message, timeout=SECONDS).result(SECONDS)
        done("a request went through the mailbox")
        self.cuda.current = 0
        wait_for(self.launches_here)
        done("a request was launched here")
        self.cuda.hold()
        self.cuda.launchers.clear()
        replies = [self.actor.ask(self.message) for _ in range(2 * LIMIT)]  # as many as are launched here, and places
        wait_for(lambda: self.actor.waiting == LIMIT - 1)  # the actor's thread has taken one
        assert len(self.cuda.launchers) == LIMIT
        done("the places are all there")
        self.let_go()
        for reply in replies:
            reply.result(SECONDS)
        wait_for(lambda: self.actor.unanswered == 0)
        done("over")

    def launches_here(self) -> bool:
        self.actor.ask(self.message).result(SECONDS)
        return self.cuda.launchers[-1] == threading.current_thread().name

    def on_signal(self, *_: object) -> None:
        self.came = True
        raise KeyboardInterrupt


class Nowhere(list[Any]):
    """A log that keeps nothing."""

    def append(self, _: object) -> None:
        """Forget it."""


def wait_for(fact: Callable[[], bool]) -> None:
    while not fact():  # the main thread says when it took too long
        time.sleep(0.0005)


def main(seed: int) -> None:
    program = Program(seed)
    signal.signal(signal.SIGINT, program.on_signal)
    ways = [
        program.round_trip,
        program.pipeline,
        program.through_the_mailbox,
        program.listen_look_and_cancel,
        program.sleep,
        program.queue_for_a_place,
    ]
    for number in range(SIGNALS):
        program.interrupt(ways[number % len(ways)])
    program.actor.stop(timeout=SECONDS)
    assert program.actor.unanswered == 0
    sys.stdout.write(f"{SIGNALS} times interrupted\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
