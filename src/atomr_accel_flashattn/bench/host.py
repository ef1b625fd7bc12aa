"""What a call costs on the CPU, where each microsecond goes, what starting up costs, and whether memory grows with N or with N squared."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DispatchError
from ..kernels.spec import Family
from .autograd import peak_bytes, training_step
from .breakdown import Steady, call_breakdown, launch_costs, steady
from .cells import Cell
from .forward import chosen_peers
from .host_cache import DENSE_CALL, beyond_dense_us, host_calls
from .inputs import Inputs, make_inputs
from .measure import Options
from .peers import Call, CudnnPeer, Ours, Peer, Refused, TorchFa2
from .timing import Contestant

__all__ = ["HostOptions", "enqueue_us", "import_seconds", "run_host"]

Say = Callable[[str], None]
SMALL = Cell(group="host", head_dim=64, heads=1, heads_kv=1, lengths=(64,), causal=False)
SMALL_PACKED = Cell(group="host", head_dim=64, heads=1, heads_kv=1, lengths=(64, 32), causal=True, packed=True)
MANY_TILES = Cell(group="host", head_dim=64, heads=512, heads_kv=512, lengths=(64,), causal=False)  # more than any GPU has SMs
LAUNCHES_OF_STEP = 8  # at most, of a peer: the queue holds fewer steps than calls
COMPILER = "inductor"  # the backend of torch.compile
MEMORY_LENGTHS = (4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """``calls`` are enqueued between two waits for the device (fewer than the 1024 that CUDA queues); the median of ``repeats`` counts.

    ``warm_up`` calls are made in all, some before each of the repeats.
    """

    calls: int = 500
    repeats: int = 9
    warm_up: int = 200
    startup: bool = True
    memory: bool = True


def run_host(options: HostOptions, say: Say = print) -> dict[str, Any]:
    """All of it on the current CUDA device; the start-up part needs no device.

    Returns:
        ``enqueue_us`` and ``training_step_us`` (forward and backward through autograd, eager
        and compiled) by layout and peer; ``cache_us``, ``enqueue`` by call over a KV cache beside a dense one, ``beyond_dense`` for each
        further launch; by family ``breakdown_us`` (layout, step) and ``launch_us`` (kind of launch);
        ``startup`` seconds and milliseconds; ``memory`` bytes by length.

    Raises:
        RuntimeError: no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("the host benchmark enqueues on a CUDA device; this machine has none")
    body: dict[str, Any] = {}
    with torch.no_grad():
        body["enqueue_us"] = {"dense": _peers_us(SMALL, options, say), "packed": _peers_us(SMALL_PACKED, options, say)}
        body["training_step_us"] = {"dense": _steps_us(SMALL, options, say), "packed": _steps_us(SMALL_PACKED, options, say)}
        body["cache_us"] = _cache_us(options, say)
        for family in Family:
            _family_us(family, options, say, body)
        if options.memory:
            body["memory"] = memory_growth(say)
    if options.startup:
        body["startup"] = startup(say)
    return body


def _peers_us(cell: Cell, options: HostOptions, say: Say) -> dict[str, float | str]:
    """Microseconds to enqueue one call, by peer; a text where a peer does not do it."""
    inputs = _inputs(cell)
    calls = {peer: partial(peer.prepare, cell, inputs) for peer in chosen_peers(Options())}
    return _costs_us("enqueue", cell, calls, options, say)


def _steps_us(cell: Cell, options: HostOptions, say: Say) -> dict[str, float | str]:
    """Microseconds of a training step, forward and backward through autograd, ours and torch's, eager and compiled."""
    inputs = _inputs(cell, dout=True)
    peers: tuple[Peer, ...] = (Ours(), TorchFa2(), CudnnPeer(), _Compiled(Ours()), _Compiled(TorchFa2()))
    calls = {peer: partial(training_step, peer, cell, inputs) for peer in peers}
    return _costs_us("step   ", cell, calls, replace(options, calls=options.calls // LAUNCHES_OF_STEP), say)


def _cache_us(options: HostOptions, say: Say) -> dict[str, dict[str, float]]:
    """Microseconds to enqueue calls over a KV cache and the dense one, in turns, and what each further launch costs."""
    calls = host_calls(_current_device())
    costs = enqueue_us({name: Contestant([each.call], nullcontext) for name, each in calls.items()}, options)
    beyond = beyond_dense_us(calls, costs)
    for name, each in calls.items():
        more = "" if name == DENSE_CALL else f", {beyond[name]:.2f} us beyond dense a further launch"
        say(f"enqueue {name:31} {each.launches} launches {costs[name]:7.2f} us{more}")
    return {"enqueue": costs, "beyond_dense": beyond}


def _current_device() -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device())


class _Compiled(Peer):
    """A peer whose forward and backward are code of torch.compile: of ours, calls of the operators."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.name = f"{peer.name}_compiled"

    def context(self) -> AbstractContextManager[Any]:
        """The peer's."""
        return self.peer.context()

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """In one graph."""
        import torch

        made: Call = torch.compile(self.peer.prepare(cell, inputs), fullgraph=True, backend=COMPILER)
        return made


def _costs_us(
    what: str, cell: Cell, calls: Mapping[Peer, Callable[[], Callable[[], object]]], options: HostOptions, say: Say
) -> dict[str, float | str]:
    """By peer, microseconds of the call that is made here; a text where a peer does not do it."""
    found: dict[str, float | str] = {}
    contestants: dict[str, Contestant] = {}
    for peer, prepare in calls.items():
        try:
            with peer.context():
                call = prepare()
                call()
        except (Refused, RuntimeError) as reason:
            found[peer.name] = str(reason).split("\n")[0]
        else:
            contestants[peer.name] = Contestant([call], peer.context)
    found |= enqueue_us(contestants, options)
    for peer in calls:
        cost = found[peer.name]
        text = cost if isinstance(cost, str) else f"{cost:.2f} us"
        say(f"{what} {cell.mask:6} {'packed' if cell.packed else 'dense':7} {peer.name:12} {text}")
    return {peer.name: found[peer.name] for peer in calls}


def _inputs(cell: Cell, *, dout: bool = False) -> Inputs:
    """One set on the current CUDA device."""
    return make_inputs(cell, _current_device(), l2_bytes=0, dout=dout)[0]


def _family_us(family: Family, options: HostOptions, say: Say, body: dict[str, Any]) -> None:
    """Add to ``body`` where the microseconds of functional calls go that one family answers; nothing, where this GPU has none."""
    steps: dict[str, dict[str, float]] = {}
    try:
        for layout, cell in (("dense", SMALL), ("packed", SMALL_PACKED)):
            steps[layout] = call_breakdown(_steady(cell, family), options.calls, options.repeats)
            _say_costs(f"{family.value} {layout}", steps[layout], say)
        launches = launch_costs(_steady(SMALL, family), _steady(MANY_TILES, family), options.calls, options.repeats)
    except (Refused, DispatchError) as reason:
        say(f"{family.value}: {reason}")
        return
    _say_costs(f"{family.value} launches", launches, say)
    body.setdefault("breakdown_us", {})[family.value] = steps
    body.setdefault("launch_us", {})[family.value] = launches


def _steady(cell: Cell, family: Family) -> Steady:
    return steady(cell, _inputs(cell), family)


def _say_costs(title: str, costs: Mapping[str, float], say: Say) -> None:
    say(title)
    for step, cost in costs.items():
        say(f"  {step:40} {cost:7.2f} us")


def enqueue_us(contestants: Mapping[str, Contestant], options: HostOptions) -> dict[str, float]:
    """By name, the median over ``repeats`` of the CPU microseconds per call in a steady state, in turns.

    The device keeps up: the queue never fills. Before each measurement some calls of the same kind run.
    """
    import torch

    costs: dict[str, list[float]] = {name: [] for name in contestants}
    order, names = random.Random(0), list(contestants)  # noqa: S311 - an order, not a secret
    for _ in range(options.repeats):
        order.shuffle(names)
        for name in names:
            (call,), context = contestants[name].calls, contestants[name].context
            with context():
                for _ in range(options.warm_up // options.repeats):
                    call()
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(options.calls):
                    call()
                costs[name].append((time.perf_counter() - began) / options.calls * 1e6)
                torch.cuda.synchronize()
    return {name: statistics.median(each) for name, each in costs.items()}


def memory_growth(say: Say) -> dict[str, Any]:
    """Peak bytes beyond the inputs by length, one batch, 8 heads of 64: the output and the LSE, so that doubling N doubles them."""
    peaks: dict[int, int] = {}
    ours: Peer = chosen_peers(Options())[0]
    for length in MEMORY_LENGTHS:
        cell = Cell(group="memory", head_dim=64, heads=8, heads_kv=8, lengths=(length,), causal=True)
        inputs = _inputs(cell)
        peaks[length] = peak_bytes(ours.prepare(cell, inputs))
    growth = peaks[MEMORY_LENGTHS[-1]] / max(peaks[MEMORY_LENGTHS[0]], 1)
    times = MEMORY_LENGTHS[-1] // MEMORY_LENGTHS[0]
    say(f"memory beyond the inputs: {peaks} bytes; {growth:.2f} x for {times} x the tokens")
    return {
        "peak_bytes": {str(length): peak for length, peak in peaks.items()},
        "growth": growth,
        "tokens_growth": times,
        "linear": growth <= 1.1 * times,
    }


def startup(say: Say) -> dict[str, float]:
    """Seconds to import without torch (best of five processes), cold compile seconds, disk-cache hit milliseconds."""
    found = {"import_s": min(import_seconds() for _ in range(5))} | _compile_times()
    say(", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


def import_seconds(code: str = "import atomr_accel_flashattn as fa; fa.flash_attn_func, fa.run") -> float:
    """Of a process of its own, by its own clock around the import: a difference of two processes is noise, and can be negative.

    The process is without what a machine's site may import at every start, NumPy for one: it would hide what we import.
    """
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    timed = f"import sys, time; began = time.perf_counter(); {code}; sys.stdout.write(str(time.perf_counter() - began))"
    done = subprocess.run([sys.executable, "-S", "-c", timed], check=True, env=environment, capture_output=True, text=True)  # noqa: S603 - our own interpreter
    return float(done.stdout)


def _compile_times() -> dict[str, float]:
    """Cold compile of d 128 causal bf16 into an empty cache (NVRTC loaded before by another kernel), then hits of it."""
    from ..dispatch import DispatchKey, lookup
    from ..jit.cache import KernelCache
    from ..jit.compile import compile_kernel
    from ..kernels.spec import KernelSpec
    from ..types import DType, SmArch

    first, second = (lookup(DispatchKey(SmArch.SM_90, DType.BF16, d, causal=True)) for d in (64, 128))
    if not isinstance(first, KernelSpec) or not isinstance(second, KernelSpec):
        raise TypeError("lookup gave no kernel for sm_90")
    with tempfile.TemporaryDirectory() as folder:
        cache = KernelCache(Path(folder))
        load_and_compile = compile_kernel(first, cache).seconds
        cold = compile_kernel(second, cache).seconds
        hits = [compile_kernel(second, cache).seconds for _ in range(50)]
    return {"first_compile_s": load_and_compile, "cold_compile_s": cold, "cache_hit_ms": statistics.median(hits) * 1e3}
