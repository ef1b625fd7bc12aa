"""Attention by mailbox: requests go in from any thread, answers come back when the device is done.

See docs/actor.md::

    caller's thread     handle: checks, outputs, a place in the mailbox      client.py, mailbox.py
                        what forward and backward requests differ in         kinds.py
                        a launch that repeats one of before                  engine.py
                        polls until it is done -> the future                 reply.py, in_flight.py
    actor's thread      Pykka inbox -> all other launches                    actor.py, engine.py
    completion thread   waits for the device for whoever sleeps              in_flight.py
    many GPUs           a pool of actors, on Ray                             ray/
"""

from __future__ import annotations

from .actor import FlashAttnActor
from .handle import FlashAttnHandle
from .inner import FlashAttnInner, Job, PendingLaunch
from .messages import FlashAttnMsg
from .props import FlashAttnProps, Overflow
from .ray import FlashAttnPool
from .reply import Reply

__all__ = [
    "FlashAttnActor",
    "FlashAttnHandle",
    "FlashAttnInner",
    "FlashAttnMsg",
    "FlashAttnPool",
    "FlashAttnProps",
    "Job",
    "Overflow",
    "PendingLaunch",
    "Reply",
]
