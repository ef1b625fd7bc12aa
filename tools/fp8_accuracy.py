"""Relative error of fp8 attention against the length and against the spread of scores: ours, and FlashAttention-3 where it is installed.

``PYTHONPATH=src:. python tools/fp8_accuracy.py docs/images/fp8_error.png [cuda:0]``. One JSON object a point, and a picture. The error is
that of attention itself: against float64 rows of the values that the fp8 elements mean.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import atomr_accel_flashattn as fa

LENGTHS = (512, 2048, 8192, 32768, 131072)
SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0)
Y_TICKS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4)
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
QUERIES, HEADS, WIDTH, CHUNK = 128, 2, 128, 16384


def inputs(kind: torch.dtype, keys: int, device: str, *, rising: bool) -> tuple[torch.Tensor, ...]:
    """Q (1, 128, 2, 128), k and v (1, keys, 2, 128), normal; ``rising``: scores grow from the first key to the last."""
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(1, length, HEADS, WIDTH, generator=generator) for length in (QUERIES, keys, keys))
    if rising:
        q = q[:, :1] + 0.1 * q
        order = torch.einsum("d,kd->k", q[0, 0, 0], k[0, :, 0]).argsort()
        k, v = k[:, order], v[:, order]
    return tuple(x.to(kind).to(device) for x in (q, k, v))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """In float64, keys chunk by chunk."""
    wide = q[0].double().transpose(0, 1)
    top = torch.full((HEADS, QUERIES), -torch.inf, dtype=torch.float64, device=q.device)
    total, out = torch.zeros_like(top), torch.zeros(HEADS, QUERIES, WIDTH, dtype=torch.float64, device=q.device)
    for begin in range(0, k.shape[1], CHUNK):
        keys, values = (x[0, begin : begin + CHUNK].double().transpose(0, 1) for x in (k, v))
        scores = scale * wide @ keys.transpose(1, 2)
        peak = torch.maximum(top, scores.amax(-1))
        weights, decay = torch.exp(scores - peak[..., None]), torch.exp(top - peak)
        total, out, top = total * decay + weights.sum(-1), out * decay[..., None] + weights @ values, peak
    return (out / total[..., None]).transpose(0, 1)[None]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """O in bfloat16, as a functional call gives it."""
    made: torch.Tensor = fa.flash_attn_func(q, k, v, softmax_scale=scale)
    return made


def peers(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """FlashAttention-3 on a GPU where it imports."""
    if device == "cpu":
        return {}
    try:
        package: Any = importlib.import_module("flash_attn_interface")
    except ImportError:
        return {}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        made = package.flash_attn_func(q, k, v, softmax_scale=scale)
        return made[0] if isinstance(made, tuple) else made

    return {"FlashAttention-3": call}


def errors(device: str) -> list[dict[str, Any]]:
    """Every point that somebody answers."""
    points = [("length", keys, 1.0, False) for keys in LENGTHS]
    points += [(axis, 4096, spread, axis == "rising") for axis in ("spread", "rising") for spread in SPREADS]
    found = []
    for name, kind in TYPES.items():
        for axis, keys, spread, rising in points:
            q, k, v = inputs(kind, keys, device, rising=rising)
            scale = spread * WIDTH**-0.5
            right = exact(q, k, v, scale)
            for who, call in ({"ours": ours} | peers(device)).items():
                try:
                    made = call(q, k, v, scale).double()
                except Exception as refusal:  # noqa: BLE001 - another package's refusals have any type, and ours are told too
                    sys.stderr.write(f"{who}, {name}, {axis}: {refusal}\n")
                    continue
                error = float((made - right).norm() / right.norm())
                found.append({"who": who, "type": name, "axis": axis, "keys": keys, "spread": spread, "error": error})
                print(json.dumps(found[-1]), flush=True)
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Three panels, a line for each type and package."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    spreads = "standard deviation of scores"
    panels = (("length", "keys", "keys"), ("spread", "spread", spreads), ("rising", "spread", f"{spreads}, rising keys"))
    for panel, (axis, x, label) in zip(axes, panels, strict=True):
        for who, kind in dict.fromkeys((point["who"], point["type"]) for point in found):
            own = [point for point in found if (point["who"], point["type"], point["axis"]) == (who, kind, axis)]
            panel.plot([point[x] for point in own], [point["error"] for point in own], marker="o", label=f"{who}, {kind}")
        panel.set(xscale="log", yscale="log", xlabel=label)
        ticks = LENGTHS if x == "keys" else SPREADS
        panel.set_xticks(ticks, [f"{tick / 1024:g}k" if tick >= 1024 else str(tick) for tick in ticks])
        panel.set_yticks(Y_TICKS, map(str, Y_TICKS))
        panel.minorticks_off()
        panel.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("relative error of o")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(errors(sys.argv[2] if len(sys.argv) > 2 else "cpu"), Path(sys.argv[1]))
