"""Attention by mailbox: one actor from threads and from asyncio, then a pool of workers that loses one and answers everything.

Runs without a GPU:  python examples/actor_pool.py
The pool needs Ray:  pip install 'atomr-accel-flashattn[ray]'
"""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import as_completed
from importlib.util import find_spec

import numpy as np

import atomr_accel_flashattn as fa


def message(seed: int, length: int = 128) -> fa.FlashAttnMsg.Forward:
    """Causal attention of 8 heads over 2 KV heads."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, length, 8, 64)).astype(np.float16)
    k, v = rng.standard_normal((2, 1, length, 2, 64)).astype(np.float16)
    return fa.FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, k, v, mask=fa.MaskKind.causal()))


async def in_asyncio(actor: fa.FlashAttnHandle) -> int:
    """Eight requests at once; the loop stays free while the device works."""
    outputs = await asyncio.gather(*(actor.ask_async(message(seed), timeout=60.0) for seed in range(8)))
    return len(outputs)


def one_actor() -> None:
    """Threads and event loops share one mailbox."""
    props = fa.FlashAttnProps(label="example", device="cpu", max_in_flight=4, mailbox_limit=64)
    with fa.FlashAttnActor.start(props) as actor:
        replies = [actor.ask(message(seed)) for seed in range(16)]
        for reply in as_completed(replies):
            assert reply.result().out.shape == (1, 128, 8, 64)
        print(f"one actor: {len(replies)} answers to a thread, {asyncio.run(in_asyncio(actor))} to an event loop")


def a_pool() -> None:
    """Two workers, one of which is killed while it works."""
    with fa.FlashAttnPool.start(2, fa.FlashAttnProps(device="cpu")) as pool:
        replies = [pool.ask(message(seed, 512)) for seed in range(32)]
        print(f"a pool: unanswered requests by worker {pool.loads}; killing one of {pool.processes()}")
        os.kill(min(pool.processes().values()), signal.SIGKILL)
        answers = sum(reply.result().out is not None for reply in replies)
        print(f"a pool: {answers} answers to {len(replies)} requests; workers now {list(pool.loads)}")


if __name__ == "__main__":
    one_actor()
    if find_spec("ray") is not None:
        a_pool()
    else:
        print("a pool: Ray is not installed")
