"""One of two processes that train a small layer for two steps: ``python two_processes.py gloo|nccl ddp|fsdp2 eager|compiled STORE 0|1``.

They meet in a file, STORE, as a port that is free now may be taken the moment after. The last argument says which of them it is. It exits
with 0 where its parameters are those of one process that saw all the data. With nccl each has a GPU of its own, whose attention is in
bfloat16.
"""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import atomr_accel_flashattn as fa

PATIENCE = {"gloo": timedelta(hours=1), "nccl": timedelta(seconds=60)}  # of a process that lost the other one
LIMIT = {"gloo": 1e-4, "nccl": 1e-2}  # of what a parameter learned, norm of the difference over norm: float32, and bfloat16 in attention


class Layer(torch.nn.Module):
    """Attention with a learned sink, between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.sink = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: Any) -> Any:
        """The same shape from x (B, S, 16)."""
        heads = self.qkv(x).view(*x.shape[:2], 3, 2, 8)
        q, k, v = (heads.bfloat16() if x.is_cuda else heads).unbind(2)
        made = fa.flash_attn_func(q, k, v, causal=True, learned_sink=self.sink)
        return self.out(made.to(x.dtype).flatten(2)) + x


def train(model: Any, data: Any) -> None:
    """A step for each of the batches of ``data``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def values(model: Any) -> list[Any]:
    """Whole parameters, on every process."""
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def main(backend: str, way: str, compiled: bool, store: Path, rank: int) -> None:
    """Train alone on all the data, and with the other process on half of it each; compare. Ends the process."""
    dist.init_process_group(backend, store.as_uri(), timeout=PATIENCE[backend], world_size=2, rank=rank)
    device = "cpu"
    if backend == "nccl":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    torch.manual_seed(0)
    plain, model, data = Layer(), Layer(), torch.randn(2, 4, 9, 16)
    model.load_state_dict(plain.state_dict())
    plain, model, data = plain.to(device), model.to(device), data.to(device)
    before = values(plain)
    train(plain, data)
    wrapped: Any = DistributedDataParallel(model) if way == "ddp" else fully_shard(model) or model
    train(torch.compile(wrapped, backend="aot_eager") if compiled else wrapped, data[:, 2 * rank : 2 * rank + 2])
    for made, expected, start in zip(values(wrapped), values(plain), before, strict=True):
        learned, error = (expected - start).norm(), (made - expected).norm()
        assert learned > 0, "a parameter did not train"
        assert error <= LIMIT[backend] * learned, f"differs by {error / learned:.1e} of what it learned; allowed is {LIMIT[backend]}"

    # Nothing is freed: the last reference to a group of gloo waits, with the GIL, for a thread that may want it to free what the last
    # collective kept (torch 2.13; pytorch/pytorch#190489).
    os._exit(0)


if __name__ == "__main__":
    atexit.register(os._exit, 1)  # after an error, likewise; its traceback is written by then
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "compiled", Path(sys.argv[4]), int(sys.argv[5]))
