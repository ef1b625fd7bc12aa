"""Write table and picture of records again: ``tools/render_results.py benchmarks/results/forward_*.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from atomr_accel_flashattn.bench.figure import draw
from atomr_accel_flashattn.bench.report import markdown


def main() -> None:
    """``<record>.md`` and ``<record>.png`` beside each record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    for path in parser.parse_args().records:
        record = json.loads(path.read_text())
        page = path.with_suffix(".md")
        page.write_text(markdown(record))
        print(f"{page}, {draw(record, path.with_suffix('.png'))}")


if __name__ == "__main__":
    main()
