"""The packages that `pyproject.toml` requires, at the lowest allowed versions, one per line: for `make test-lowest`.

    python tests/support/bounds.py >lowest.txt && pip install --constraint lowest.txt --editable '.[engine,broker]'

Packages that only tests and checks need are not tried at their lowest: nobody else installs them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_OURS = ("dev", "gpu")
"""Extras whose bounds are not tried: packages for tests, and packages for machines with a GPU."""
LEAST = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^\]]*\])?[^;]*?>=(?P<version>[0-9.]+)")


def lowest(project: dict[str, object]) -> list[str]:
    """`name==version` of each requirement. Raises ValueError for a requirement without a lower bound."""
    wanted = list(project["dependencies"])  # type: ignore[call-overload]
    for extra, packages in project["optional-dependencies"].items():  # type: ignore[attr-defined]
        if extra not in NOT_OURS:
            wanted += packages
    found: dict[str, str] = {}
    for requirement in wanted:
        match = LEAST.match(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound")
        found[match["name"]] = match["version"]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sys.stdout.writelines(f"{line}\n" for line in lowest(project))


if __name__ == "__main__":
    main()
