"""What the mailbox costs: a round trip, a message in a pipeline, throughput beside direct calls, and Ray's object store.

``python -m atomr_accel_flashattn.bench.actor`` on a machine with a GPU and torch; ``--device cpu`` runs the same on the CPU backend, where
only the differences to the direct calls mean something. ``--ray`` adds a local pool. Writes ``actor_<device>_<time>.json`` and a picture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ..actor import FlashAttnActor, FlashAttnHandle, FlashAttnMsg, FlashAttnPool, FlashAttnProps
from ..errors import FlashAttnError
from ..fa2 import Fa2FwdRequest, MaskKind
from ..runtime.execute import run
from .record import make_record, write_record

__all__ = ["ActorOptions", "draw_actor", "main_actor", "run_actor"]

Say = Callable[[str], None]
ROUND_TRIP_BAR_US: Final = 80.0  # over a direct synchronised call, on an H100
MESSAGE_BAR_US: Final = 30.0  # per message of a pipeline
WINDOW: Final = 8
SIZES: Final = ((1, 1024), (128, 128), (512, 512), (2048, 2048), (4096, 4096))  # (queries, keys) of the throughput part
CPU_SIZES: Final = ((1, 64), (32, 32), (64, 256))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorOptions:
    """``requests`` of each part and repeat; ``ray`` adds the pool."""

    device: str = "cuda:0"
    requests: int = 1000
    repeats: int = 5
    ray: bool = False


def run_actor(options: ActorOptions, say: Say = print) -> dict[str, Any]:
    """All parts, on one GPU or on the CPU backend.

    Returns:
        ``round_trip_us``, ``pipelined_us``, ``throughput`` rows and, when asked for, ``ray``.
    """
    body: dict[str, Any] = {"bars_us": {"round_trip_over_direct": ROUND_TRIP_BAR_US, "pipelined_message": MESSAGE_BAR_US}}
    for part, found in _parts(options):
        body[part] = found
        for line in _lines(part, found):
            say(line)
    return body


def _parts(options: ActorOptions) -> Iterator[tuple[str, Any]]:
    """Name and figures of each part, as soon as it is done."""
    with FlashAttnActor.start(FlashAttnProps(device=options.device, max_in_flight=WINDOW, mailbox_limit=1 << 20)) as actor:
        small = _message(options, 1, 64)
        yield "round_trip_us", _round_trip(actor, small, options)
        yield "pipelined_us", _pipelined(actor, small, options)
        sizes = SIZES if options.device.startswith("cuda") else CPU_SIZES
        yield "throughput", [_throughput(actor, _message(options, *size), size, options) for size in sizes]
    if options.ray:
        yield "ray", _ray(options)


def _message(options: ActorOptions, queries: int, keys: int) -> FlashAttnMsg.Forward:
    """16 heads over 4, head dim 128, causal; bf16 on a GPU, float32 on the CPU."""
    import torch

    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    shapes = ((queries, 16), (keys, 4), (keys, 4))
    q, k, v = (torch.randn(1, length, heads, 128, dtype=dtype, device=options.device) for length, heads in shapes)
    return FlashAttnMsg.Forward(Fa2FwdRequest(q, k, v, mask=MaskKind.causal()), lse=False)


def _synchronize(options: ActorOptions) -> None:
    if options.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(options.device)


def _round_trip(actor: FlashAttnHandle, message: FlashAttnMsg.Forward, options: ActorOptions) -> dict[str, float]:
    """Microseconds from call to answer, one at a time: median of a direct synchronised call, and median and 99th percentile of ask."""

    def direct() -> None:
        run(message.request, lse=False)
        _synchronize(options)

    found: dict[str, float] = {}
    for name, call in (("direct", direct), ("actor", lambda: actor.ask(message).result())):
        times = []
        for _ in range(options.requests + 100):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e6)
        times = sorted(times[100:])
        found |= {name: statistics.median(times), f"{name}_p99": times[int(0.99 * len(times))]}
    return found | {"over_direct": found["actor"] - found["direct"]}


def _pipelined(actor: FlashAttnHandle, message: FlashAttnMsg.Forward, options: ActorOptions) -> dict[str, float]:
    """Microseconds per message when all are sent before any answer is looked at; for direct calls, until the device is done.

    The medians and the least of three times the repeats, which take turns: on cores that others use as well, the two lie far apart.
    """

    def direct() -> None:
        for _ in range(options.requests):
            run(message.request, lse=False)
        _synchronize(options)

    def mailbox() -> None:
        for reply in [actor.ask(message) for _ in range(options.requests)]:
            reply.result()

    direct()
    mailbox()
    times = [(_once(direct, options), _once(mailbox, options)) for _ in range(3 * options.repeats)]
    found: dict[str, float] = {}
    for name, us in zip(("direct", "actor"), zip(*times, strict=True), strict=True):
        found |= {name: statistics.median(us), f"{name}_least": min(us)}
    return found


def _once(call: Callable[[], None], options: ActorOptions) -> float:
    """Microseconds per request."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) / options.requests * 1e6


def _per_call(call: Callable[[], None], options: ActorOptions) -> float:
    call()
    return statistics.median(_once(call, options) for _ in range(options.repeats))


def _throughput(actor: FlashAttnHandle, message: FlashAttnMsg.Forward, size: tuple[int, int], options: ActorOptions) -> dict[str, Any]:
    """Calls per second with at most eight unfinished: direct calls that wait for an event, and replies that are waited for."""

    def direct() -> None:
        window: deque[Any] = deque()
        for _ in range(options.requests):
            if len(window) == WINDOW:
                window.popleft()()
            run(message.request, lse=False)
            window.append(_marker(options))
        _synchronize(options)

    def mailbox() -> None:
        window: deque[Any] = deque()
        for _ in range(options.requests):
            if len(window) == WINDOW:
                window.popleft().result()
            window.append(actor.ask(message))
        for reply in window:
            reply.result()

    rates = {name: 1e6 / _per_call(call, options) for name, call in (("direct", direct), ("actor", mailbox))}
    return {"queries": size[0], "keys": size[1], **rates, "ratio": rates["actor"] / rates["direct"]}


def _marker(options: ActorOptions) -> Callable[[], Any]:
    """Waits for what is enqueued now."""
    if not options.device.startswith("cuda"):
        return lambda: None
    import torch

    event = torch.cuda.Event()
    event.record()
    wait: Callable[[], Any] = event.synchronize
    return wait


def _ray(options: ActorOptions) -> dict[str, Any]:
    """Milliseconds to put and get arrays, and of a round trip through a pool of one worker, by MiB of q, k and v."""
    import numpy as np
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    rows = []
    with FlashAttnPool.start(1, FlashAttnProps(device=options.device)) as pool:
        for keys in (16, 1024, 16384):
            message = _message(options, 1, keys)
            array = np.zeros(2 * keys * 4 * 128, np.uint16)
            put, reference = _timed(lambda: ray.put(array))  # noqa: B023 - called at once
            get, _ = _timed(lambda: ray.get(reference))  # noqa: B023 - called at once
            trip, _ = _timed(lambda: pool.ask(message).result())  # noqa: B023 - called at once
            rows.append({"mib": array.nbytes / 2**20, "put_ms": put, "get_ms": get, "round_trip_ms": trip})
    ray.shutdown()
    return {"rows": rows}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Median of 20 in milliseconds, and the last result."""
    times, result = [], None
    for _ in range(22):
        began = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:]), result


def _lines(part: str, found: Any) -> list[str]:
    """What to say of a part."""
    if part == "round_trip_us":
        return [f"round trip: direct {found['direct']:.1f} us, actor {found['actor']:.1f} us, over direct {found['over_direct']:.1f} us"]
    if part == "pipelined_us":
        least = f"least {found['direct_least']:.1f} and {found['actor_least']:.1f}"
        return [f"pipelined: direct {found['direct']:.1f} us, actor {found['actor']:.1f} us a message; {least}"]
    if part == "throughput":
        return [
            f"{row['queries']} x {row['keys']}: direct {row['direct']:.0f}/s, actor {row['actor']:.0f}/s, ratio {row['ratio']:.3f}"
            for row in found
        ]
    return [
        f"ray, {row['mib']:.2f} MiB: put {row['put_ms']:.2f} ms, get {row['get_ms']:.2f} ms, round trip {row['round_trip_ms']:.2f} ms"
        for row in found["rows"]
    ]


def draw_actor(record: Mapping[str, Any], path: Path) -> Path:
    """Draw the record: round trip, message in a pipeline, throughput by size; direct calls beside the actor.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", width_ratios=(1, 1, 2))
    for axis, part, title in ((axes[0], "round_trip_us", "round trip, us"), (axes[1], "pipelined_us", "message in a pipeline, us")):
        axis.bar(("direct", "actor"), [record[part][name] for name in ("direct", "actor")], color=("#b0b7c3", "#0b6e4f"))
        axis.set_title(title, fontsize=10)
    on_gpu = record["device"]["name"] != "cpu"
    bars = ((axes[0], record["round_trip_us"]["direct"] + ROUND_TRIP_BAR_US), (axes[1], MESSAGE_BAR_US))
    for axis, height in bars if on_gpu else ():
        axis.axhline(height, color="#a23b3b", linewidth=1, linestyle="--")
    rows: Sequence[Mapping[str, Any]] = record["throughput"]
    for n, (name, colour) in enumerate((("direct", "#b0b7c3"), ("actor", "#0b6e4f"))):
        axes[2].bar([i + 0.4 * n - 0.2 for i in range(len(rows))], [row[name] for row in rows], 0.4, color=colour, label=name)
    axes[2].set_xticks(range(len(rows)), [f"{row['queries']} x {row['keys']}" for row in rows], fontsize=8)
    axes[2].set_yscale("log")
    axes[2].set_title(f"calls per second, {WINDOW} in flight, queries x keys", fontsize=10)
    axes[2].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{record['device']['name']} · commit {record['commit']}{' · dashed: the bar' if on_gpu else ''}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main_actor(
    options: ActorOptions, *, out: Path, commit: str | None = None, picture: bool = True, say: Say = print
) -> tuple[dict[str, Any], Path]:
    """Run it, write the record and draw it; the record and its path."""
    body = run_actor(options, say)
    record = make_record("actor", body | {"options": asdict(options)}, commit=commit)
    path = write_record(record, out)
    say(f"record: {path}")
    if picture:
        say(f"picture: {draw_actor(record, path.with_suffix('.png'))}")
    return record, path


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ray", action="store_true", help="add a local Ray pool")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="what the record calls the code")
    arguments = parser.parse_args()
    options = ActorOptions(device=arguments.device, requests=arguments.requests, repeats=arguments.repeats, ray=arguments.ray)
    try:
        main_actor(options, out=arguments.out, commit=arguments.commit)
    except FlashAttnError as error:
        parser.exit(1, f"{error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
