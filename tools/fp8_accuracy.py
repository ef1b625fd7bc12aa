"""Errors of fp8 attention, ours and those of FlashAttention-3 and cuDNN where they are installed: a table, a JSON record, a picture.

``PYTHONPATH=src:. python tools/fp8_accuracy.py --out folder [--device cuda:0] [--picture docs/images/fp8_error.png] [--longest 8192]``.
Errors are those of attention itself: against float64 rows of the values that the fp8 elements mean. Five questions:

- normal: head dims 64, 128 and 256, where the error may be 1.03 times FlashAttention-3's;
- length: 512 keys to 128k;
- spread: standard deviations of scores from 1/4 to 4;
- rising: the same with keys whose scores rise from the first to the last;
- ones: V = 1, whose error is the largest of a row. The others are relative (Frobenius), and those of the LSE absolute and the largest.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.bench.cells import Cell
from atomr_accel_flashattn.bench.cudnn_frontend import CudnnFrontend
from atomr_accel_flashattn.bench.inputs import Inputs
from atomr_accel_flashattn.bench.record import make_record, write_record

LENGTHS = (512, 2048, 8192, 32768, 131072)
SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0)  # powers of two: a q of fp8 times one of them is exact, so that no peer has to take a scale
Y_TICKS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4)
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
QUERIES, HEADS, WIDTH, CHUNK = 128, 2, 128, 16384
LIMIT = 1.03  # of FlashAttention-3's error on normal input
OURS, FA3, CUDNN = "ours", "FlashAttention-3", "cuDNN"
COLUMNS = (OURS, FA3, CUDNN)

Answer = tuple[torch.Tensor, torch.Tensor | None]  # o, and the LSE (1, H, Sq) of whoever tells it


@dataclass(frozen=True)
class Point:
    """One set of inputs."""

    axis: str
    type: str
    keys: int
    spread: float = 1.0
    width: int = WIDTH

    def inputs(self, device: str) -> tuple[torch.Tensor, ...]:
        """Q (1, 128, 2, D), k and v (1, keys, 2, D)."""
        generator = torch.Generator().manual_seed(self.keys + self.width)
        q, k, v = (torch.randn(1, length, HEADS, self.width, generator=generator) for length in (QUERIES, self.keys, self.keys))
        if self.axis == "rising":
            q = q[:, :1] + 0.1 * q
            order = torch.einsum("d,kd->k", q[0, 0, 0], k[0, :, 0]).argsort()
            k, v = k[:, order], v[:, order]
        if self.axis == "ones":
            v = torch.ones_like(v)
        kind = TYPES[self.type]
        return (q.to(kind).float() * self.spread).to(kind).to(device), k.to(kind).to(device), v.to(kind).to(device)

    def error(self, o: torch.Tensor, right: torch.Tensor) -> float:
        """Of an answer, against the right one."""
        off = o.double() - right
        return float(off.abs().max()) if self.axis == "ones" else float(off.norm() / right.norm())


def points(longest: int) -> Iterator[Point]:
    """Every one of them, of at most so many keys."""
    middle = min(4096, longest)
    for name in TYPES:
        yield from (Point("normal", name, middle, width=width) for width in (64, 128, 256))
        yield from (Point("length", name, keys) for keys in LENGTHS if keys <= longest)
        yield from (Point(axis, name, middle, spread) for axis in ("spread", "rising") for spread in SPREADS)
        yield from (Point("ones", name, keys, std) for keys in (128, 4096, 131072) if keys <= longest for std in (0.0, 0.5, 2.0, 8.0))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """O and the LSE in float64, keys chunk by chunk."""
    wide = q[0].double().transpose(0, 1) * q.shape[-1] ** -0.5
    top = torch.full(wide.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    total, out = torch.zeros_like(top), torch.zeros(*top.shape, v.shape[-1], dtype=torch.float64, device=q.device)
    for begin in range(0, k.shape[1], CHUNK):
        keys, values = (x[0, begin : begin + CHUNK].double().transpose(0, 1) for x in (k, v))
        scores = wide @ keys.transpose(1, 2)
        peak = torch.maximum(top, scores.amax(-1))
        weights, decay = torch.exp(scores - peak[..., None]), torch.exp(top - peak)
        total, out, top = total * decay + weights.sum(-1), out * decay[..., None] + weights @ values, peak
    return (out / total[..., None]).transpose(0, 1)[None], (top + total.log())[None]


def ours(_point: Point, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
    """O in bfloat16, as a functional call gives it."""
    made = fa.run(fa.DenseFwdRequest(q, k, v))
    return made.out, made.lse


def flash_attention_3(_point: Point, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
    """With the LSE where its version returns it."""
    package: Any = importlib.import_module("flash_attn_interface")
    try:
        made = package.flash_attn_func(q, k, v, return_attn_probs=True)
    except TypeError:  # an older one, which has no such argument and always returns it
        made = package.flash_attn_func(q, k, v)
    return (made[0], made[1]) if isinstance(made, tuple) else (made, None)


def cudnn(point: Point, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
    """The graph that the benchmark times."""
    kind = fa.DType.F8E4M3 if point.type == "e4m3" else fa.DType.F8E5M2
    shape: dict[str, Any] = {"head_dim": point.width, "heads": HEADS, "heads_kv": HEADS, "lengths": (QUERIES,), "length_k": point.keys}
    cell = Cell(group="fp8", causal=False, dtype=kind, **shape)
    return CudnnFrontend().prepare(cell, Inputs(q, k, v, None, None, QUERIES))(), None


def measured(device: str, longest: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Each point with everybody's errors, and who refused what; a refusal ends no run."""
    callers: dict[str, Callable[..., Answer]] = {OURS: ours}
    if device != "cpu":
        callers |= {FA3: flash_attention_3, CUDNN: cudnn}
    rows, refused = [], []
    for point in points(longest):
        arrays = point.inputs(device)
        right, right_lse = exact(*arrays)
        row: dict[str, Any] = {**asdict(point), "errors": {}, "lse_errors": {}}
        for who, call in callers.items():
            try:
                o, lse = call(point, *arrays)
                row["errors"][who] = point.error(o, right)
                if lse is not None:
                    row["lse_errors"][who] = float((lse.double().reshape(right_lse.shape) - right_lse).abs().max())
            except Exception as refusal:  # noqa: BLE001 - another package's refusals have any type, and ours are told too
                refused.append(f"{who}: {point}: {type(refusal).__name__}: {refusal}".split("\n")[0][:300])
        rows.append(row)
    return rows, refused


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line a point, then what the limits say."""
    yield f"{'axis':7} {'type':5} {'width':>5} {'keys':>7} {'spread':>6} " + " ".join(f"{who:>17} {'LSE':>8}" for who in COLUMNS)
    for row in rows:
        found = (f"{_number(row['errors'], who, '17.5f')} {_number(row['lse_errors'], who, '8.1e')}" for who in COLUMNS)
        yield f"{row['axis']:7} {row['type']:5} {row['width']:5} {row['keys']:7} {row['spread']:6g} " + " ".join(found)
    ratios = {
        f"{row['type']}, {row['width']}, {row['axis']} {row['keys']}": row["errors"][OURS] / row["errors"][FA3]
        for row in rows
        if row["axis"] in {"normal", "length"} and {OURS, FA3} <= row["errors"].keys()
    }
    if ratios:
        worst = max(ratios, key=lambda name: ratios[name])
        verdict = "kept" if ratios[worst] <= LIMIT else "EXCEEDED"
        yield f"normal input: at most {ratios[worst]:.3f} of {FA3}'s error, at {worst} (limit {LIMIT}: {verdict})"
    for name in TYPES:
        for axis in ("spread", "rising"):
            errors = [row["errors"][OURS] for row in rows if (row["axis"], row["type"]) == (axis, name) and OURS in row["errors"]]
            if errors:
                yield f"{axis}, {name}: ours {min(errors):.4f} to {max(errors):.4f} over spreads {SPREADS[0]} to {SPREADS[-1]:g}"


def _number(found: dict[str, float], who: str, form: str) -> str:
    return format(found[who], form) if who in found else "-".rjust(int(form.split(".", maxsplit=1)[0]))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels, a line for each type and package."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    spreads = "standard deviation of scores"
    panels = (("length", "keys", "keys"), ("spread", "spread", spreads), ("rising", "spread", f"{spreads}, rising keys"))
    for panel, (axis, x, label) in zip(axes, panels, strict=True):
        for who in COLUMNS:
            for kind in TYPES:
                own = [row for row in rows if (row["axis"], row["type"]) == (axis, kind) and who in row["errors"]]
                if own:
                    panel.plot([row[x] for row in own], [row["errors"][who] for row in own], marker="o", label=f"{who}, {kind}")
        panel.set(xscale="log", yscale="log", xlabel=label)
        ticks = LENGTHS if x == "keys" else SPREADS
        panel.set_xticks(ticks, [f"{tick / 1024:g}k" if tick >= 1024 else str(tick) for tick in ticks])
        panel.set_yticks(Y_TICKS, map(str, Y_TICKS))
        panel.minorticks_off()
        panel.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("relative error of o")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="keys")
    parser.add_argument("--out", type=Path, help="folder of the JSON record")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--commit", help="what the record calls the code")
    arguments = parser.parse_args()
    rows, refused = measured(arguments.device, arguments.longest)
    lines = [*table(rows), *(f"refused: {line}" for line in refused)]
    print("\n".join(lines))
    if arguments.out:
        record = make_record("fp8_accuracy", {"rows": rows, "refused": refused, "lines": lines}, commit=arguments.commit)
        print(write_record(record, arguments.out))
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
