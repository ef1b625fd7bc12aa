"""Functional calls as values, run on the fake GPU and on the CPU backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import atomr_accel_flashattn as fa
from tests.fakes.tensors import fake


@dataclass(frozen=True)
class Call:
    """One functional call; ``offset``, ``pad`` and ``heads_first`` shift, stretch and reorder those of q, k and v that ``moved`` names."""

    seed: int = 0
    batch: int = 2
    seqlen_q: int = 5
    seqlen_k: int = 9
    heads: int = 4
    heads_kv: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    dtype: str = "float16"
    offset: int = 0
    pad: int = 0
    heads_first: bool = False
    moved: str = "qkv"
    scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink_tokens: int = 0
    slopes: int = 0  # dimensions
    learned_sink: bool = False
    out: bool = False
    lse: bool = False
    packed: bool = False
    split: int = 2  # where the first of two packed sequences ends

    def tensor(self, number: int, rows: int, heads: int, head_dim: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(10 * self.seed + number)
        offset, pad, heads_first = (self.offset, self.pad, self.heads_first) if "qkv"[number] in self.moved else (0, 0, False)
        sizes = (self.batch, heads, rows, head_dim + pad) if heads_first else (self.batch, rows, heads, head_dim + pad)
        flat = torch.randn(torch.Size(sizes).numel() + offset, generator=generator).to(getattr(torch, self.dtype))
        tensor = flat[offset:].view(sizes)[..., :head_dim]
        return tensor.transpose(1, 2) if heads_first else tensor

    def run(self, wrap: Any) -> Any:
        """The call on tensors that ``wrap`` puts somewhere; (out, lse or None)."""
        q = self.tensor(0, self.seqlen_q, self.heads, self.head_dim)
        k = self.tensor(1, self.seqlen_k, self.heads_kv, self.head_dim)
        v = self.tensor(2, self.seqlen_k, self.heads_kv, self.v_head_dim)
        sequences = 2 if self.packed else self.batch
        slopes = torch.rand((sequences, self.heads)[2 - self.slopes :]) if self.slopes else None
        sink = torch.rand(self.heads) if self.learned_sink else None
        out_shape = (self.batch, self.seqlen_q, self.heads, self.v_head_dim)
        packing: tuple[Any, ...] = ()
        if self.packed:
            q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
            out_shape = (self.batch * self.seqlen_q, self.heads, self.v_head_dim)
            ends = [[0, min(self.split, x.shape[0]), x.shape[0]] for x in (q, k)]
            packing = (*(wrap(torch.tensor(each, dtype=torch.int32)) for each in ends), q.shape[0], k.shape[0])
        function = fa.flash_attn_varlen_func if self.packed else fa.flash_attn_func
        slopes, sink = (None if x is None else wrap(x) for x in (slopes, sink))
        result = function(
            *(wrap(x) for x in (q, k, v)),
            *packing,
            softmax_scale=self.scale,
            causal=self.causal,
            window_size=self.window,
            softcap=self.softcap,
            alibi_slopes=slopes,
            return_attn_probs=self.lse,
            out=wrap(torch.full(out_shape, torch.nan, dtype=getattr(torch, self.dtype))) if self.out else None,
            learned_sink=sink,
            sink_tokens=self.sink_tokens,
        )
        return result[:2] if self.lse else (result, None)

    def check(self) -> None:
        """The fake GPU, through plans, gives what the CPU backend gives."""
        torch.manual_seed(self.seed)
        made = self.run(fake)
        torch.manual_seed(self.seed)
        expected = self.run(lambda tensor: tensor)
        assert made[0].shape == expected[0].shape
        np.testing.assert_allclose(host(made[0]), host(expected[0]), rtol=1e-2, atol=2e-3)
        assert (made[1] is None) == (expected[1] is None)
        if made[1] is not None:
            np.testing.assert_allclose(host(made[1]), host(expected[1]), rtol=1e-3, atol=1e-3)


def host(tensor: Any) -> np.ndarray:
    return torch.Tensor.float(tensor.as_subclass(torch.Tensor)).numpy()


# One change each to the numbers of a call, its arrays or its layout: calls that differ so share no plan.
CHANGES: dict[str, dict[str, Any]] = {
    "batch": {"batch": 3},
    "seqlen_q": {"seqlen_q": 6},
    "seqlen_k": {"seqlen_k": 8},
    "heads": {"heads": 8},
    "heads_kv": {"heads_kv": 1},
    "dtype": {"dtype": "bfloat16"},
    **{f"address_of_{name}": {"offset": 1, "moved": name} for name in "qkv"},
    **{f"strides_of_{name}": {"pad": 8, "moved": name} for name in "qkv"},
    **{f"order_of_{name}": {"heads_first": True, "moved": name} for name in "qkv"},
    "scale": {"scale": 0.5},
    "scale_zero": {"scale": 0.0},
    "causal": {"causal": True},
    "window": {"window": (2, 0)},
    "window_right": {"window": (-1, 2)},
    "softcap": {"softcap": 2.0},
    "sink_tokens": {"window": (1, 0), "sink_tokens": 1},
    "slopes": {"slopes": 1},
    "slopes_per_batch": {"slopes": 2},
    "learned_sink": {"learned_sink": True},
    "out": {"out": True},
}
