"""A first look on a machine with a card: does every head dim and feature run, and is it near float32 attention? Stops at nothing.

``PYTHONPATH=src python tools/gpu_smoke.py --out smoke.json``. Needs torch. ``--device cpu`` tries the script itself on the CPU backend.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from atomr_accel_flashattn import functional as fa
from atomr_accel_flashattn.bench.record import make_record

LIMIT = {torch.float16: 4e-3, torch.bfloat16: 2e-2}  # relative, Frobenius

Options = dict[str, Any]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
    """float32 attention of (B, S, H, D) tensors with flash_attn_func's options (no dropout)."""
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(2, 3) * options.get("softmax_scale", q.shape[-1] ** -0.5)
    cap = options.get("softcap", 0.0)
    s = cap * torch.tanh(s / cap) if cap else s
    p = torch.arange(sq, device=q.device)[:, None] + sk - sq
    j = torch.arange(sk, device=q.device)
    if "alibi_slopes" in options:
        s = s - options["alibi_slopes"][:, None, None] * (p - j).abs()
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    hidden = (j > p + right) & (right >= 0) | (j < p - left) & (left >= 0) & (j >= options.get("sink_tokens", 0))
    return torch.nan_to_num(s.masked_fill(hidden, -math.inf).softmax(-1)).matmul(v).transpose(1, 2)


def dense(device: str, dtype: torch.dtype, shape: tuple[int, ...], options: Options) -> Callable[[], float]:
    """A check of flash_attn_func; ``shape`` is (B, Sq, Sk, Hq, Hkv, D)."""

    def check() -> float:
        b, sq, sk, hq, hkv, d = shape
        q = torch.randn(b, sq, hq, d, device=device, dtype=dtype)
        k, v = (torch.randn(b, sk, hkv, d, device=device, dtype=dtype) for _ in range(2))
        expected = attention(q, k, v, options)
        return _relative(fa.flash_attn_func(q, k, v, **options), expected)

    return check


def packed(device: str, dtype: torch.dtype, d: int, *, causal: bool) -> Callable[[], float]:
    """A check of flash_attn_varlen_func with an empty sequence among four."""

    def check() -> float:
        lengths = [100, 0, 257, 64]
        q, k, v = (torch.randn(sum(lengths), 4, d, device=device, dtype=dtype) for _ in range(3))
        sums = [0, *itertools.accumulate(lengths)]
        offsets = torch.tensor(sums, dtype=torch.int32, device=device)
        got = fa.flash_attn_varlen_func(q, k, v, offsets, offsets, max(lengths), max(lengths), causal=causal)
        parts = [(slice(a, b), causal) for a, b in itertools.pairwise(sums) if b > a]
        expected = torch.cat([attention(q[None, r], k[None, r], v[None, r], {"causal": c})[0] for r, c in parts])
        return _relative(got, expected)

    return check


def dropout(device: str, dtype: torch.dtype) -> Callable[[], float]:
    """Dropout against the pattern that the call returns."""

    def check() -> float:
        q, k, v = (torch.randn(2, 128, 2, 64, device=device, dtype=dtype) for _ in range(3))
        out, _, keep = fa.flash_attn_func(q, k, v, 0.25, return_attn_probs=True)
        s = q.float().transpose(1, 2) @ k.float().permute(0, 2, 3, 1) / 8
        expected = (s.softmax(-1) * keep / 0.75) @ v.float().transpose(1, 2)
        share = abs(keep.float().mean().item() - 0.75)
        return max(_relative(out, expected.transpose(1, 2)), share if share > 0.01 else 0.0)

    return check


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    error = float((got.float() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error


def checks(device: str) -> Iterator[tuple[str, torch.dtype, Callable[[], float]]]:
    """(name, dtype, check), simplest first."""
    bf16 = torch.bfloat16
    for dtype, d, causal in itertools.product((bf16, torch.float16), (64, 128, 32, 96, 192, 256), (False, True)):
        name = f"d{d} {'causal' if causal else 'full'} {str(dtype)[6:]}"
        yield name, dtype, dense(device, dtype, (2, 300, 300, 4, 4, d), {"causal": causal})
    features: dict[str, Options] = {
        "window": {"window_size": (100, 0)},
        "both sides": {"window_size": (70, 30)},
        "sink tokens": {"window_size": (64, 0), "causal": True, "sink_tokens": 4},
        "softcap": {"softcap": 15.0},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device), "causal": True},
        "negative scale": {"softmax_scale": -0.1},
        "zero scale": {"softmax_scale": 0.0},
    }
    for name, options in features.items():
        yield name, bf16, dense(device, bf16, (2, 300, 300, 4, 4, 64), options)
    yield "Sq < Sk", bf16, dense(device, bf16, (1, 60, 400, 4, 4, 64), {"causal": True})
    yield "Sq > Sk", bf16, dense(device, bf16, (1, 400, 60, 4, 4, 64), {"causal": True})
    yield "gqa 6/2", bf16, dense(device, bf16, (2, 300, 300, 6, 2, 128), {"causal": True})
    yield "one token", bf16, dense(device, bf16, (3, 1, 1, 2, 2, 64), {})
    for d in (8, 40, 72, 120, 200):
        yield f"d{d}", bf16, dense(device, bf16, (1, 130, 130, 2, 2, d), {"causal": True})
    for causal in (False, True):
        yield f"varlen {'causal' if causal else 'full'}", bf16, packed(device, bf16, 64, causal=causal)
    yield "dropout", bf16, dropout(device, bf16)


def main() -> int:
    """0 when everything passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, dtype, check in checks(arguments.device):
        began = time.perf_counter()
        row: dict[str, Any] = {"name": name}
        try:
            row["error"] = check()
            row["passed"] = row["error"] <= LIMIT[dtype]
            text = f"{row['error']:.2e}"
        except Exception as error:  # noqa: BLE001 - a first look reports everything and goes on
            row |= {"passed": False, "raised": traceback.format_exc()}
            text = f"{type(error).__name__}: {error}"[:1500]
        row["seconds"] = time.perf_counter() - began
        rows.append(row)
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {name:28} {row['seconds']:6.2f} s  {text}")
    failed = [row["name"] for row in rows if not row["passed"]]
    record = make_record("smoke", {"rows": rows, "failed": failed})
    print(json.dumps({key: record[key] for key in ("device", "versions", "commit")}))
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed: {', '.join(failed)}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
