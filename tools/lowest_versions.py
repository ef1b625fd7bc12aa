"""The lowest versions that pyproject.toml allows, as constraints of pip: ``python tools/lowest_versions.py > constraints.txt``.

``name>=1.2`` gives ``name==1.2``, and ``name==13.*`` gives ``name==13.0.0``. A bound that names no release so fails the install.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[\w,-]+\])?(?P<bound>>=|==)(?P<version>[\d.]+)(?P<any>\*?)")


def constraints(pyproject: str) -> list[str]:
    """A line for each dependency, those of extras included, sorted.

    Raises:
        ValueError: a dependency without a lower bound.
    """
    project = tomllib.loads(pyproject)["project"]
    wanted = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    lines = set()
    for requirement in wanted:
        if requirement.partition("[")[0] == project["name"]:  # an extra that names other extras
            continue
        found = _REQUIREMENT.match(requirement)
        if found is None:
            raise ValueError(f"{requirement}: no lower bound; write it as name>=1.2 or name==1.*")
        lines.add(f"{found['name']}=={found['version'] + '0.0' if found['any'] else found['version']}")
    return sorted(lines)


if __name__ == "__main__":
    sys.stdout.write("\n".join(constraints(PYPROJECT.read_text(encoding="utf-8"))) + "\n")
