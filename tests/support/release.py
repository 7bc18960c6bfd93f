"""The last release, from the repository's history: what programs of today must still understand.

It is the newest tag `v*` before this commit. Where none is known, it is the commit in `last_release.txt`: clones may come without tags.
A release changes that file.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("last_release.txt")
PARTS = ("potluck", "node", "coordinator", "tests/contract/golden")


def commit(root: Path = ROOT, recorded: Path = RECORDED) -> str:
    """The commit of the last release. Skips the test in a clone that cannot have it; fails where it should be there."""
    if not (root / ".git").exists():
        pytest.skip("the last release is not here: this is no git repository")
    tag = _git(root, "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", "HEAD^")
    name = tag.stdout.decode().strip() if tag.returncode == 0 else recorded.read_text().split()[0]
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if found.returncode == 0:
        return found.stdout.decode().strip()
    if _git(root, "rev-parse", "--is-shallow-repository").stdout.strip() == b"true":
        pytest.skip("the last release is not here: this clone is shallow (git fetch --unshallow --tags)")
    pytest.fail(f"{name} is not in this repository: {recorded.name} must name the commit of the last release")


def unpacked(folder: Path) -> Path:
    """The folder with the last release's packages, for PYTHONPATH. Nothing is written into the repository, as a work tree would be."""
    archive = _git(ROOT, "archive", "--format=tar", commit(), *PARTS)
    assert archive.returncode == 0, archive.stderr.decode()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    # Who runs the tests may not be who owns the clone (git-config(1), safe.directory).
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=60)
    except FileNotFoundError:
        pytest.skip("the last release is not here: git is not installed")
