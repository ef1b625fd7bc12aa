"""A driver made of Python: streams and events that note what was asked of them, and kernels that the CPU backend computes."""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnHandle, FlashAttnMsg, FlashAttnProps
from atomr_accel_flashattn.actor import gpu, inner
from atomr_accel_flashattn.arrays import new, read as arrays
from atomr_accel_flashattn.problem import ArrayInfo, AttentionProblem
from atomr_accel_flashattn.reference import attention
from atomr_accel_flashattn.runtime import execute, plan as plan_store
from atomr_accel_flashattn.types import Device
from tests.actor.devices import PATIENCE


class _Flags:
    CU_EVENT_DISABLE_TIMING = 2
    CU_STREAM_NON_BLOCKING = 1


class FakeArray:
    """Host memory that says it is on a GPU."""

    def __init__(self, array: np.ndarray, index: int = 0) -> None:
        self.array = array
        self.index = index

    def info(self) -> ArrayInfo:
        host = arrays.read_array(self.array, "x")
        return ArrayInfo(host.ptr, host.shape, host.strides, host.dtype, host.dtype_name, Device("cuda", self.index), self)


@dataclass
class FakeDriver:
    """What ``driver()`` returns; ``log`` is what happened, in order."""

    log: list[tuple[Any, ...]] = field(default_factory=list)
    sticky: bool = False
    events: Any = field(default_factory=lambda: count(1000))
    alive: set[int] = field(default_factory=set)  # events that are not destroyed
    busy: bool = False  # no launch is finished when it is asked for; who waits for one does get it
    current: int = 0  # the context of every thread
    completed: threading.Event = field(default_factory=threading.Event)  # waits for an event end when it is set
    launchers: list[str] = field(default_factory=list)  # names of the threads that launched

    def __post_init__(self) -> None:
        self.completed.set()

    @property
    def live_events(self) -> int:
        """How many events are not destroyed."""
        return len(self.alive)

    CUevent_flags = _Flags
    CUstream_flags = _Flags

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:  # noqa: N802 - CUDA's name
        self.log.append(("stream", flags))
        return 0, 500

    def cuStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.log.append(("destroy", stream))
        return (0,)

    def cuEventCreate(self, flags: int) -> tuple[int, int]:  # noqa: N802, ARG002 - CUDA's name
        event = next(self.events)
        self.alive.add(event)
        return 0, event

    def cuEventDestroy(self, event: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.alive.remove(event)
        return (0,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        assert event in self.alive, "a destroyed event was recorded"
        self.log.append(("record", event, stream))
        return (0,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:  # noqa: N802, ARG002 - CUDA's name
        assert event in self.alive, "a stream waits for a destroyed event"
        self.log.append(("wait", event, stream))
        return (0,)

    def cuEventSynchronize(self, event: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.log.append(("synchronize", event))
        assert self.completed.wait(PATIENCE), "the test forgot to complete a launch"
        return (700 if self.sticky else 0,)

    def cuEventQuery(self, event: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.log.append(("query", event))
        return (700 if self.sticky else 600 if self.busy else 0,)

    def cuCtxGetCurrent(self) -> tuple[int, int]:  # noqa: N802 - CUDA's name
        return 0, self.current

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:  # noqa: N802 - CUDA's name
        self.log.append(("context", context))
        return (0,)


class FakeLaunch:
    """A launch to be repeated: computes with what lies at the addresses that it is given."""

    def __init__(self, fake: FakeDriver, problem: AttentionProblem, out: ArrayInfo) -> None:
        self.fake = fake
        self.infos = (problem.q, problem.k, problem.v, out)
        self.problem = replace(problem, q=None, k=None, v=None)
        self.fail: BaseException | None = None

    def launch(self, stream: int, pointers: tuple[int, ...]) -> None:
        self.fake.launchers.append(threading.current_thread().name)
        if self.fail is not None:
            raise self.fail
        self.fake.log.append(("launch", stream, pointers[:3]))
        q, k, v, out = (_at(*pair) for pair in zip(self.infos, pointers[:4], strict=True))
        host = {name: arrays.read_array(array, name) for name, array in zip("qkv", (q, k, v), strict=True)}
        attention.forward(replace(self.problem, **host), out, None, None)


def _at(info: ArrayInfo, ptr: int) -> np.ndarray:
    dtype = arrays.numpy_dtype(info.dtype_name)
    memory = (ctypes.c_char * (int(np.prod(info.shape)) * dtype.itemsize)).from_address(ptr)
    return np.frombuffer(memory, dtype).reshape(info.shape)


def install(monkeypatch: Any, *, plans: bool = False) -> FakeDriver:
    """Put the fake where the GPU inner looks for the driver, and for the way to a kernel. ``plans``: launches can be repeated."""
    fake = FakeDriver()
    monkeypatch.setattr(plan_store, "_plans", {})

    @contextmanager
    def current_context(index: int) -> Any:
        fake.log.append(("push", index))
        yield

    def fill(request: Any, outputs: Any, plan: Any = None, *, stream: int) -> None:
        if plan is not None:
            plan.launch(stream, plan_store.addresses_of(request.problem, outputs))
            return
        fake.launchers.append(threading.current_thread().name)
        fake.log.append(("launch", stream, (request.problem.q.ptr, request.problem.k.ptr, request.problem.v.ptr)))
        out, lse = (None if info is None else info.source for info in (outputs.out, outputs.lse))
        host = [arrays.read_array(info.source.array, "x") for info in (request.problem.q, request.problem.k, request.problem.v)]
        problem = replace(request.problem, q=host[0], k=host[1], v=host[2])
        attention.forward(problem, out.array, None if lse is None else lse.array, None)
        if plans:
            launch: Any = FakeLaunch(fake, request.problem, outputs.out)
            plan_store.keep(request, plan_store.Plan((launch,), outputs.out.strides))

    def empty(like: ArrayInfo, shape: tuple[int, ...], dtype_name: str | None = None) -> ArrayInfo:
        if like.device.kind == "cpu":
            return new.empty_like_framework(like, shape, dtype_name)
        return FakeArray(np.empty(shape, arrays.numpy_dtype(dtype_name or like.dtype_name)), like.device.index).info()

    monkeypatch.setattr(gpu, "driver", lambda: fake)
    monkeypatch.setattr(gpu, "current_context", current_context)
    monkeypatch.setattr(gpu, "primary_context", lambda index: 90 + index)
    monkeypatch.setattr(inner, "fill", fill)
    monkeypatch.setattr(execute, "empty_like_framework", empty)
    return fake


def sent(seed: int = 0, index: int = 0) -> FlashAttnMsg.Forward:
    """A forward call of a few elements on GPU ``index``."""
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 4, 2, 16)).astype(np.float16)
    return FlashAttnMsg.Forward(fa.Fa2FwdRequest(*(FakeArray(array, index).info() for array in (q, k, v))), lse=False)


def expected(message: FlashAttnMsg.Forward) -> np.ndarray:
    """Its answer, by the CPU backend."""
    return fa.run(fa.Fa2FwdRequest(*(info.source.array for info in (message.request.q, message.request.k, message.request.v)))).out


def start(**props: Any) -> FlashAttnHandle:
    """An actor that has launched once, so that all launches of these tests repeat that one."""
    actor = FlashAttnActor.start(FlashAttnProps(device="cuda:0", **props))
    actor.ask(sent()).result(PATIENCE)
    return actor


def hold(cuda: FakeDriver) -> None:
    """From now on no launch is finished, until ``cuda.completed`` is set again."""
    cuda.busy = True
    cuda.completed.clear()
