"""Attention by mailbox: requests go in from any thread or event loop, answers come back when the device is done. See docs/actor.md.

::

    caller's thread     handle: checks, outputs, a place in the mailbox            handle.py, mailbox.py
                        a launch that repeats one of before, when nobody waits     engine.py
                        finds out whether it is done -> the future                 reply.py, flights.py
    actor's thread      Pykka inbox -> all other launches, several decodes as one  actor.py, engine.py, fusion.py
    completion thread   waits for the device for whoever sleeps -> the future      flights.py
"""

from __future__ import annotations

from .actor import FlashAttnActor
from .handle import FlashAttnHandle
from .inner import FlashAttnInner, Flight, Job
from .messages import FlashAttnMsg
from .props import FlashAttnProps, Overflow
from .ray_pool import FlashAttnPool
from .reply import Reply

__all__ = [
    "FlashAttnActor",
    "FlashAttnHandle",
    "FlashAttnInner",
    "FlashAttnMsg",
    "FlashAttnPool",
    "FlashAttnProps",
    "Flight",
    "Job",
    "Overflow",
    "Reply",
]
