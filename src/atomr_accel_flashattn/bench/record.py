"""What every record says about where it was made, and the file it is written to."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..env import settings

__all__ = ["commit_id", "device_facts", "load_average", "make_record", "versions", "write_record"]

PACKAGES = ("atomr-accel-flashattn", "torch", "numpy", "ml_dtypes", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13")
# Distribution of each peer, and what is imported of it: some are on the path without being installed.
PEERS = {
    "nvidia-cudnn-frontend": "cudnn",
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
    "tokenspeed-fa3": "flash_attn_interface",
    "flashinfer-python": "flashinfer",
    "xformers": "xformers",
}
_VERSION = re.compile(r"""^(?:__version__|version)\s*(?::\s*\w+\s*)?=\s*(?:__version__\s*=\s*)?["']([^"']+)["']""", re.MULTILINE)


def commit_id(given: str | None = None) -> str:
    """The commit that was measured: the argument, else ``ATOMR_FLASHATTN_COMMIT``, else git's.

    ``-dirty`` is added when git sees changes in tracked files; ``unknown`` without any of them.
    """
    named = given or settings().commit
    if named:
        return named
    root = Path(__file__).resolve().parents[3]
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if dirty else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)  # noqa: S603, S607 - fixed program
    return done.stdout.strip()


def device_facts(index: int = 0) -> dict[str, Any]:
    """Name, compute capability, multiprocessors, memory, L2 and driver of a CUDA device; the processor, named "cpu", without one."""
    import torch

    if not torch.cuda.is_available():
        return {"name": "cpu", "processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts = torch.cuda.get_device_properties(index)
    return {
        "name": facts.name,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "driver": _driver_version(),
        "cuda_of_driver": _cuda_of_driver(),
        "count": torch.cuda.device_count(),
    }


def _driver_version() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603 - fixed program
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def _cuda_of_driver() -> str:
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def versions() -> dict[str, str]:
    """Python and the packages that matter here, those that are there; a peer without its metadata by its own word, else ``unknown``."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *PEERS):
        number = _installed_version(package) or _own_version(PEERS.get(package, ""))
        if number:
            found[package] = number
    return found


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _own_version(module: str) -> str:
    """What a package on the path says in its source, without importing it; empty when it is not there."""
    try:
        spec = find_spec(module) if module else None
    except (ImportError, ValueError):  # the package around it is missing or does not import
        spec = None
    if spec is None:
        return ""
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [folder / name for folder in folders for name in ("version.py", "_version.py", "__init__.py")]
    for file in (*files, *([Path(spec.origin)] if spec.origin else [])):
        said = _VERSION.search(file.read_text(encoding="utf-8", errors="replace")) if file.suffix == ".py" and file.is_file() else None
        if said:
            return said[1]
    return "unknown"


def load_average() -> list[float] | None:
    """Processes that ran or waited for a core, over the last 1, 5 and 15 minutes; None where the system does not count them."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def make_record(kind: str, body: dict[str, Any], *, commit: str | None = None) -> dict[str, Any]:
    """A record of one run: kind, time (UTC), commit, command (of absolute paths the last part), device, versions, load, then ``body``."""
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    head: dict[str, Any] = {
        "kind": kind,
        "timestamp": now.isoformat(),
        "commit": commit_id(commit),
        "command": shlex.join(Path(word).name if Path(word).is_absolute() else word for word in (Path(sys.argv[0]).name, *sys.argv[1:])),
        "device": device_facts(),
        "versions": versions(),
        "load_average": load_average(),
    }
    return head | body


def write_record(record: dict[str, Any], folder: Path) -> Path:
    """Write ``<kind>_<device>_<time>.json`` into ``folder`` (made when missing) and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "".join(c if c.isalnum() else "-" for c in record["device"]["name"].lower())
    stamp = record["timestamp"].replace("-", "").replace(":", "").split("+")[0]
    path = folder / f"{record['kind']}_{device}_{stamp}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
