"""SASS of a cubin through nvdisasm, and the opcodes in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

__all__ = ["find_nvdisasm", "opcodes", "sequence"]

OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def find_nvdisasm() -> str | None:
    """The program of the ``nvidia-cuda-nvdisasm`` wheel, else the one on PATH."""
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        for program in sorted(Path(folder).glob("*/bin/nvdisasm")):
            return str(program)
    return shutil.which("nvdisasm")


def opcodes(cubin: bytes, folder: Path) -> set[str]:
    """Every opcode with its modifiers, as ``HMMA.16816.F32.BF16``; ``folder`` takes the temporary file."""
    return set(OPCODE.findall(_disassemble(cubin, folder)))


def sequence(cubin: bytes, folder: Path) -> list[str]:
    """The instructions in their order, with operands."""
    return [line.split("*/", 1)[1].strip() for line in _disassemble(cubin, folder).splitlines() if OPCODE.match(line)]


def _disassemble(cubin: bytes, folder: Path) -> str:
    program = find_nvdisasm()
    assert program is not None, "nvdisasm is not installed: pip install nvidia-cuda-nvdisasm==13.*"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    # -ndf: without analysing where branches lead, which takes a quarter of the time and changes nothing in this text.
    done = subprocess.run([program, "-c", "-ndf", str(path)], capture_output=True, text=True, check=True)
    return done.stdout
