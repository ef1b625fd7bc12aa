"""Runs the small cases of both kernel families under the tools of compute-sanitizer, and believes a tool only once it has found a fault.

``PYTHONPATH=src:. python tools/sanitizer.py --out results``. For each family and tool, side by side: a planted fault has to be reported
and its sound twin not (tools/sanitizer_faults.py), then the cases (tools/sanitizer_cases.py) have to be right by the oracle and without a
report. Racecheck misses and misreports the asynchronous copies of the wgmma family; what it says of that one is kept to be explained, and
is no failure. Writes ``sanitizer.json`` and ``sanitizer.log``, all that the tools said. The status is 0 when all is as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atomr_accel_flashattn.bench.record import make_record
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskSpec
from atomr_accel_flashattn.kernels.kv_append import KvAppendSpec
from atomr_accel_flashattn.kernels.kvcache import SplitCombineSpec
from atomr_accel_flashattn.kernels.merge_states import MergeStatesSpec
from atomr_accel_flashattn.kernels.spec import Family
from tests.gpu.families import FAMILIES

TOOLS = ("racecheck", "initcheck", "synccheck", "memcheck")  # the slowest first
HERE = Path(__file__).resolve().parent
FOUND = 9  # the tool's exit status when it has something to report
START_UP = 60.0  # seconds beyond those for cases: imports under the tool, and the grace of sanitizer_cases.py
SUMMARY = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)
# Only our kernels are checked (filters add up; requests of the wgmma family launch some of the other one), and no API calls: the driver's
# own search for symbols that it may lack is reported otherwise.
NAMES = (
    *(f"{family.value}_" for family in Family),
    "bwd_",
    DropoutMaskSpec.HEADER,
    SplitCombineSpec.HEADER,
    "step_",
    "fp8_",
    KvAppendSpec.HEADER,
    MergeStatesSpec.HEADER,
)  # how names of ours begin
FILTERS = tuple(word for name in NAMES for word in ("--kernel-name", f"kns={name}"))
OPTIONS = (*FILTERS, "--error-exitcode", str(FOUND), "--report-api-errors", "no", "--print-limit", "50", "--launch-timeout", "60")


@dataclass(frozen=True)
class Outcome:
    """What a program said, and what the tool said of it. ``status`` None: it ran out of time."""

    status: int | None
    output: str
    log: str

    @property
    def summary(self) -> str:
        """The tool's own last word."""
        found = SUMMARY.findall(self.log)
        return str(found[-1]) if found else "no summary"


@dataclass(frozen=True)
class Verdict:
    """One tool on one family: ``sees_faults`` says whether its word counts, ``clean`` what it is, ``numbers`` are those of the cases."""

    family: str
    tool: str
    sees_faults: bool
    clean: bool
    summary: str
    numbers: dict[str, Any]
    seconds: float

    @property
    def fine(self) -> bool:
        """Whether nothing is left to be done."""
        explained = self.tool == "racecheck" and self.family == Family.FA3.value
        return self.sees_faults and (self.clean or explained) and self.numbers.get("failed") == []


def under_tool(tool: str, family: str, program: str, *arguments: str, limit: float) -> Outcome:
    """Run a program of this folder, on one family, under a tool."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        watched = ["compute-sanitizer", "--tool", tool, *OPTIONS, "--log-file", str(log)]
        command = [*watched, sys.executable, str(HERE / program), "--family", family, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            status, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            status, output = None, f"no end after {limit:.0f} s"
        return Outcome(status, output, log.read_text(errors="replace") if log.exists() else "")


def last_json(output: str) -> dict[str, Any]:
    """The object on the last line that holds one; empty when there is none."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}


def examine(family: str, tool: str, seconds: float) -> tuple[Verdict, str]:
    """The verdict of one tool on one family, and all that was said."""
    began = time.perf_counter()
    planted = under_tool(tool, family, "sanitizer_faults.py", "--tool", tool, limit=START_UP)
    sees = planted.status == FOUND and f"{family}_planted_{tool}" in planted.log and f"{family}_sound_{tool}" not in planted.log
    cases = under_tool(tool, family, "sanitizer_cases.py", "--seconds", str(seconds), limit=seconds + START_UP)
    said = "\n".join(
        f"=== {family} {tool}: {name}, status {outcome.status}\n{outcome.log}--- output\n{outcome.output}"
        for name, outcome in (("planted fault", planted), ("cases", cases))
    )
    clean = cases.status == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", cases.summary) is not None
    verdict = Verdict(family, tool, sees, clean, cases.summary, last_json(cases.output), round(time.perf_counter() - began, 1))
    return verdict, said


def compile_first(family: str) -> str:
    """Compile what the cases need; what was said of it."""
    command = [sys.executable, str(HERE / "sanitizer_cases.py"), "--family", family, "--compile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def main() -> int:
    """0 when every tool sees planted faults and has nothing to say of ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for sanitizer.json and sanitizer.log")
    parser.add_argument("--seconds", type=float, default=60, help="for the cases of each tool")
    parser.add_argument("--families", nargs="*", default=[family.value for family in FAMILIES])
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="tools at a time")
    arguments = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error(
            "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit (its bin folder), or with nvidia-cuda-sanitizer-api"
        )
    for family in arguments.families:
        print(f"{family}: {compile_first(family).strip()}", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        examined = [
            pool.submit(examine, family, tool, arguments.seconds)
            for tool in reversed(TOOLS)
            if tool in arguments.tools
            for family in arguments.families
        ]
        results = [each.result() for each in examined]
    for verdict, _ in results:
        print(f"{'ok  ' if verdict.fine else 'FAIL'} {json.dumps(asdict(verdict))}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [asdict(verdict) | {"fine": verdict.fine} for verdict, _ in results]
    record = make_record("sanitizer", {"runs": runs})
    (arguments.out / "sanitizer.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "sanitizer.log").write_text("\n".join(said for _, said in results))
    return int(not all(verdict.fine for verdict, _ in results))


if __name__ == "__main__":
    sys.exit(main())
