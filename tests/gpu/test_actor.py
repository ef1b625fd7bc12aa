"""The actor on a card: streams, memory, errors. Everything that needs no card is in tests/actor."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn import FlashAttnActor, FlashAttnMsg, FlashAttnPool, FlashAttnProps  # noqa: E402
from tests.gpu.harness import DEVICE, dense, synchronize  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="streams are CUDA's")
PATIENCE = 60.0


def request(seed: int = 0, *, queries: int = 100, keys: int = 120, batch: int = 1, kind: Any = dense, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, 8, 64, generator=generator).half().to(DEVICE)
    k, v = (torch.randn(batch, keys, 2, 64, generator=generator).half().to(DEVICE) for _ in range(2))
    return kind(q, k, v, **{"mask": fa.MaskKind.causal(), **options})


def check(reply: Any, expected: fa.Output) -> None:
    output = reply.result(PATIENCE)
    assert torch.equal(output.out, expected.out)
    assert torch.equal(output.lse, expected.lse)


@pytest.mark.parametrize("stream", ["own", "default", "side"])
def test_answers_are_bitwise_those_of_direct_calls(stream: str) -> None:
    if DEVICE == "cpu" and stream != "own":
        pytest.skip("streams are CUDA's")
    chosen = {"own": lambda: None, "default": lambda: 0, "side": lambda: torch.cuda.Stream(DEVICE)}[stream]()
    requests = [request(seed, keys=100 + seed % 3) for seed in range(20)]
    expected = [fa.run(each) for each in requests]
    synchronize()
    with FlashAttnActor.start(FlashAttnProps(device=DEVICE, stream=chosen)) as actor:
        for _ in range(3):
            for reply, each in zip([actor.ask(FlashAttnMsg.Forward(each)) for each in requests], expected, strict=True):
                check(reply, each)


@needs_cuda
@pytest.mark.parametrize("side", [False, True])
def test_inputs_that_the_callers_stream_has_yet_to_write(side: bool) -> None:
    made = request()
    expected = fa.run(made)
    values = made.q.clone()
    synchronize()
    with FlashAttnActor.start(FlashAttnProps(device=DEVICE)) as actor:
        actor.ask(FlashAttnMsg.Forward(made)).result(PATIENCE)
        stream = torch.cuda.Stream(DEVICE) if side else torch.cuda.current_stream(DEVICE)
        for _ in range(10):
            with torch.cuda.stream(stream):
                made.q.fill_(float("nan"))
                torch.cuda._sleep(20_000_000)
                made.q.copy_(values)
                reply = actor.ask(FlashAttnMsg.Forward(made))
            assert not reply.done()
            check(reply, expected)


@needs_cuda
def test_the_reply_comes_when_the_gpu_is_done_and_the_mailbox_does_not_wait() -> None:
    stream = torch.cuda.Stream(DEVICE)
    made = [request(seed) for seed in range(4)]
    synchronize()
    with FlashAttnActor.start(FlashAttnProps(device=DEVICE, stream=stream)) as actor:
        actor.ask(FlashAttnMsg.Forward(made[0])).result(PATIENCE)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(400_000_000)
        replies = [actor.ask(FlashAttnMsg.Forward(each)) for each in made]
        deadline = time.monotonic() + 5
        while actor.waiting and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not stream.query()
        assert [(reply.running(), reply.done()) for reply in replies] == [(True, False)] * 4
        for reply, each in zip(replies, made, strict=True):
            check(reply, fa.run(each))


@needs_cuda
def test_memory_that_callers_drop_is_never_overwritten_too_early_and_none_is_kept() -> None:
    expected = {seed: fa.run(request(seed)) for seed in range(4)}
    wrong: list[int] = []
    with FlashAttnActor.start(FlashAttnProps(device=DEVICE, max_in_flight=8)) as actor:

        def client(number: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
                for round_ in range(100):
                    seed = (number + round_) % 4
                    output = actor.ask(FlashAttnMsg.Forward(request(seed))).result(PATIENCE)
                    torch.empty_like(output.out).fill_(float("nan"))
                    if not torch.equal(output.out, expected[seed].out):
                        wrong.append(round_)

        client(0)
        synchronize()
        before = torch.cuda.memory_allocated(DEVICE)
        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for each in clients:
            each.start()
        for each in clients:
            each.join(PATIENCE)
        synchronize()
        assert wrong == []
        assert torch.cuda.memory_allocated(DEVICE) <= before + (1 << 20)


@needs_cuda
def test_a_tensor_freed_early_fails_alone() -> None:
    with FlashAttnActor.start(FlashAttnProps(device=DEVICE, stream=(stream := torch.cuda.Stream(DEVICE)))) as actor:
        bad, good = request(0), request(1)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
        replies = [actor.ask(FlashAttnMsg.Forward(each)) for each in (bad, good)]
        kept = bad.k.clone()
        bad.k.untyped_storage().resize_(0)
        with pytest.raises(fa.StaleArrayError, match="k"):
            replies[0].result(PATIENCE)
        check(replies[1], fa.run(good))
        assert kept.shape == bad.k.shape


LOSE_THE_DEVICE = """
from dataclasses import replace
import torch
import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays.read import read_array
q, k, v = (torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))
good = fa.FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, k, v))
nowhere = replace(read_array(k, "k"), ptr=16, source=None)
bad = fa.FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, nowhere, v))
actor = fa.FlashAttnActor.start(fa.FlashAttnProps(device="cuda:0", max_in_flight=2))
assert actor.ask(good).result(60).out is not None
replies = [actor.ask(message) for message in (bad, good, good, good)] if actor.is_alive else []
for reply in replies:
    assert isinstance(reply.exception(60), fa.DeviceLostError), reply.exception(60)
try:
    actor.ask(good)
except fa.ActorStoppedError as error:
    assert isinstance(error.__cause__, fa.DeviceLostError)
else:
    raise SystemExit("the actor took a request after its device was lost")
actor.stop(timeout=10)
print("lost as it should be", flush=True)
import os
os._exit(0)
"""


@needs_cuda
def test_a_sticky_error_fails_every_future_and_stops_the_actor() -> None:
    done = subprocess.run([sys.executable, "-c", LOSE_THE_DEVICE], capture_output=True, text=True, check=False, timeout=120)
    assert "lost as it should be" in done.stdout, done.stderr[-3000:]


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_actor_per_gpu() -> None:
    requests = {}
    for index in range(2):
        q, k, v = (torch.randn(1, 64, 4, 64, device=f"cuda:{index}", dtype=torch.float16) for _ in range(3))
        requests[index] = fa.Fa2FwdRequest(q, k, v)
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as first, FlashAttnActor.start(FlashAttnProps(device="cuda:1")) as second:
        with pytest.raises(fa.DeviceMismatchError):
            first.ask(FlashAttnMsg.Forward(requests[1]))
        for _ in range(50):
            replies = [actor.ask(FlashAttnMsg.Forward(requests[index])) for index, actor in enumerate((first, second))]
            for index, reply in enumerate(replies):
                check(reply, fa.run(requests[index]))


@needs_cuda
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.filterwarnings("ignore")
def test_a_pool_on_two_gpus_survives_the_loss_of_a_worker() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        made = [request(seed) for seed in range(20)]
        with FlashAttnPool.start(2, FlashAttnProps(device="cuda")) as pool:
            replies = [pool.ask(FlashAttnMsg.Forward(each)) for each in made]
            ray.kill(pool._members[0].actor)
            for reply, each in zip(replies, made, strict=True):
                check(reply, fa.run(each))
    finally:
        ray.shutdown()
