"""The lock files for releases: they fit pyproject.toml, pin everything by hash, and know nothing of the machine that made them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
EXTRAS = {"core": (), "engine": ("engine",), "litert": ("litert",)}
PINNED = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>[^ ;\\]+)(?: ; (?P<marker>[^\\]+?))?(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
)


def pinned(name: str) -> list[tuple[str, str, str]]:
    """(package, version, marker) of each entry. Every line belongs to an entry, or is a comment at the top."""
    text = (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8")
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    found = list(PINNED.finditer(body))
    assert "".join(one[0] for one in found) == body
    return [(one["name"], one["version"], one["marker"] or "") for one in found]


@pytest.mark.parametrize("name", EXTRAS)
def test_it_pins_all_that_is_required_at_versions_that_are_allowed(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(one for extra in EXTRAS[name] for one in project["optional-dependencies"][extra]),
    ]
    entries = pinned(name)
    for requirement in map(Requirement, wanted):
        versions = [version for package, version, _ in entries if package == requirement.name.lower()]
        assert versions, f"{requirement} is not in requirements/{name}.txt: make lock"
        assert all(version in requirement.specifier for version in versions), (
            f"{requirement}, but {versions}: make lock"
        )


def test_there_is_one_for_each_set_of_packages() -> None:
    assert {path.stem for path in (ROOT / "requirements").glob("*.txt")} == set(EXTRAS)
