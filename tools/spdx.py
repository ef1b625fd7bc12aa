"""Put the licence line at the top of every CUDA header that lacks it: ``python tools/spdx.py``. Says which; --check only fails."""

from __future__ import annotations

import sys
from pathlib import Path

LINE = "// SPDX-License-Identifier: Apache-2.0\n"
CUDA = Path(__file__).parents[1] / "src" / "atomr_accel_flashattn" / "cuda"


def without_line(folder: Path = CUDA) -> list[Path]:
    """The headers under ``folder`` that do not begin with the line, sorted."""
    return sorted(path for path in folder.rglob("*.cuh") if not path.read_text(encoding="utf-8").startswith(LINE))


if __name__ == "__main__":
    missing = without_line()
    for header in missing:
        print(header.relative_to(CUDA))
        if "--check" not in sys.argv:
            header.write_text(LINE + header.read_text(encoding="utf-8"), encoding="utf-8")
    sys.exit(bool(missing) and "--check" in sys.argv)
