"""DDP and FSDP2, eager and compiled: two processes, on the CPU or with a GPU each, train as one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

WORKER = Path(__file__).with_name("two_processes.py")
PATIENCE = {"gloo": None, "nccl": 110}  # seconds: of a card somebody waits for the end, and a busy machine is no failure
AVAILABLE = torch.distributed.is_available()


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("gloo", marks=pytest.mark.skipif(not (AVAILABLE and torch.distributed.is_gloo_available()), reason="no gloo")),
        pytest.param(
            "nccl",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not (AVAILABLE and torch.distributed.is_nccl_available() and torch.cuda.device_count() >= 2), reason="needs two GPUs"
                ),
            ],
        ),
    ],
)
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_steps_of_two_processes_are_those_of_one(way: str, compiled: str, backend: str):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    workers = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(WORKER), backend, way, compiled]
        workers.append(subprocess.Popen(command, env=os.environ | place, stderr=subprocess.PIPE, text=True))
    try:
        errors = [worker.communicate(timeout=PATIENCE[backend])[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(each[-3000:] for each in errors)
