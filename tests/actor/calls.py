"""What tests of the actor send, to whom, and what they expect."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnHandle, FlashAttnInner, FlashAttnMsg, FlashAttnProps
from atomr_accel_flashattn.actor import Reply
from atomr_accel_flashattn.runtime.plan import Output
from tests.fakes.arrays import FakeArray
from tests.fakes.kernel import scale_as_read
from tests.fakes.waiting import PATIENCE, until


def message(seed: int = 0, *, seqlen_q: int = 2, seqlen_k: int = 5, dtype: str = "float32") -> FlashAttnMsg.Forward:
    """A forward call of a few elements."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, seqlen_q, 2, 8)).astype(dtype)
    k, v = rng.standard_normal((2, 1, seqlen_k, 1, 8)).astype(dtype)
    return FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, k, v, mask=fa.MaskKind.causal()))


def paged(seed: int = 0, dtype: Any = np.float32, **asked: Any) -> fa.PagedAttentionRequest:
    """A decode of two sequences over pages of 4."""
    q = np.random.default_rng(seed).standard_normal((2, 1, 2, 8)).astype(dtype)
    cache = fa.PagedKvCache(8, 4, 1, 8, like=q)
    sequences = [cache.allocate(), cache.allocate()]
    k, v = np.random.default_rng(seed + 1).standard_normal((2, 2, 5, 1, 8)).astype(dtype)
    cache.append(sequences, k, v)
    return cache.request(q, sequences, mask=fa.MaskKind.causal(), **asked)


def sent(seed: int = 0, index: int = 0, *, seqlen: int = 4, lse: bool = False) -> FlashAttnMsg.Forward:
    """A forward call of a few elements on GPU ``index``."""
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, seqlen, 2, 16)).astype(np.float16)
    return FlashAttnMsg.Forward(fa.Fa2FwdRequest(*(FakeArray(array, index).info() for array in (q, k, v))), lse=lse)


def expected(message: FlashAttnMsg.Forward) -> Output:
    """The answer to what was :func:`sent`, by the CPU backend, to the last bit."""
    q, k, v = (info.source.array for info in (message.request.q, message.request.k, message.request.v))
    options = fa.AttentionOptions(softmax_scale=scale_as_read(message.request.problem.softmax_scale))
    return fa.run(fa.Fa2FwdRequest(q, k, v, options=options))


def backward(seed: int = 0, *, seqlen_q: int = 2, **more: Any) -> FlashAttnMsg.Backward:
    """The gradients of what :func:`message` computes."""
    request = message(seed, seqlen_q=seqlen_q).request
    done = fa.run(request)
    dout = np.random.default_rng(seed + 100).standard_normal(done.out.shape).astype(done.out.dtype)
    return FlashAttnMsg.Backward(fa.Fa2BwdRequest(request.q, request.k, request.v, done.out, dout, done.lse, mask=request.mask, **more))


def sent_backward(seed: int = 0, index: int = 0, *, seqlen: int = 4, **more: Any) -> FlashAttnMsg.Backward:
    """The gradients of what is :func:`sent`, on GPU ``index``."""
    host = on_host(sent(seed, index, seqlen=seqlen).request)
    done = fa.run(fa.Fa2FwdRequest(*host))
    dout = np.random.default_rng(seed + 100).standard_normal(done.out.shape).astype(np.float16)
    arrays = (*host, *((None, dout, None) if more.get("recompute") else (done.out, dout, done.lse)))
    infos = (None if array is None else FakeArray(array, index).info() for array in arrays)
    return FlashAttnMsg.Backward(fa.Fa2BwdRequest(*infos, **more))


def on_host(request: Any) -> list[np.ndarray]:
    """Q, k and v of a request on the fake GPU."""
    return [info.source.array for info in (request.q, request.k, request.v)]


def check_gradients(answer: fa.Gradients, asked: FlashAttnMsg.Backward) -> None:
    """The answer to what was :func:`sent_backward`, up to the rounding of the CPU backend."""
    given = {name: getattr(asked.request, name) for name in ("out", "dout", "lse")}
    arrays = {name: None if info is None else info.source.array for name, info in given.items()}
    direct = fa.run(fa.Fa2BwdRequest(*on_host(asked.request), **arrays, recompute=asked.request.recompute))
    for name in ("dq", "dk", "dv"):
        np.testing.assert_allclose(getattr(answer, name).array, getattr(direct, name), rtol=1e-2, atol=4e-3)


def start(inner: FlashAttnInner, **props: Any) -> FlashAttnHandle:
    """An actor above ``inner``."""
    return FlashAttnActor.start(FlashAttnProps(device="cpu", **props), inner)


def start_and_launch(index: int = 0, **props: Any) -> FlashAttnHandle:
    """An actor on the fake GPU that has launched once, and rests: callers launch what is :func:`sent` to it alike, which repeats that."""
    actor = FlashAttnActor.start(FlashAttnProps(device=f"cuda:{index}", **props))
    actor.ask(sent(index=index)).result(PATIENCE)
    until(lambda: not actor._engine._busy, "an actor's thread that has nothing to do")
    return actor


def expire(actor: FlashAttnHandle, reply: Reply) -> None:
    """The time of a request that was accepted is over now."""
    (ticket,) = (each for each in actor._mailbox.all_unsettled() if each.reply is reply)
    actor._deadlines.add(ticket, 0.05, time.monotonic() - 1)
