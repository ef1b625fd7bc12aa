"""A handle in a forked child: its threads stayed in the parent, so it refuses, and does not wait for ever."""

from __future__ import annotations

import subprocess
import sys

FORK = """
import os, signal
import numpy as np
import atomr_accel_flashattn as fa

q, k, v = np.ones((3, 1, 4, 2, 16), np.float16)
message = fa.FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, k, v))
with fa.FlashAttnActor.start(fa.FlashAttnProps(device="cpu")) as actor:
    assert actor.ask(message).result(60).out is not None
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # SIGALRM ends a child that waits for ever
        refused = 0
        for call in (actor.ask, actor.tell):
            try:
                call(message)
            except fa.ActorStoppedError as error:
                refused += "forked" in str(error)
        actor.stop()
        os._exit(0 if refused == 2 and not actor.is_alive else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child waited, or was answered"
    assert actor.ask(message).result(60).out is not None
"""


LEAVE = """
import os, sys
import numpy as np
import atomr_accel_flashattn as fa

actors = [fa.FlashAttnActor.start(fa.FlashAttnProps(device="cpu")) for _ in range(3)]
q, k, v = np.ones((3, 1, 4, 2, 16), np.float16)
held = actors[0].ask(fa.FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, k, v)))
held.result(60)
child = os.fork()
if child == 0:
    sys.exit(0)  # runs what is registered for the end of an interpreter
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
for actor in actors:
    actor.stop()
"""


def test_a_forked_child_that_ends_leaves_the_parents_actors_alone() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", LEAVE], check=True, timeout=300)


def test_a_handle_in_a_forked_child_is_refused_and_the_parents_goes_on() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=300)
