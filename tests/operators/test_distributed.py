"""DDP and FSDP2, eager and compiled: two processes, on the CPU or with a GPU each, train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
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
def test_two_steps_of_two_processes_are_those_of_one(way: str, compiled: str, backend: str, tmp_path: Path):
    logs, workers = [tmp_path / "0.log", tmp_path / "1.log"], []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-W", "ignore", str(WORKER), backend, way, compiled, str(tmp_path / "store"), str(rank)]
        with log.open("wb") as stderr:
            workers.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=stderr))
    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(worker.wait, PATIENCE[backend]) for worker in workers]
        try:
            for end in as_completed(ends):
                if end.result() != 0:
                    break  # the other one would wait for it
        finally:
            for worker in workers:
                worker.kill()
    assert [end.result() for end in ends] == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
