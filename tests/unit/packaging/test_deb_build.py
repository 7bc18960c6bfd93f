"""How the Debian package is built: versions in Debian's order, and scripts that a shell can read."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "packaging/deb"
SPEC = importlib.util.spec_from_file_location("deb_build", FOLDER / "build.py")
assert SPEC is not None
assert SPEC.loader is not None
BUILD = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BUILD)


def test_versions_keep_their_order() -> None:
    versions = ["1.0.dev1", "1.0a1", "1.0rc2", "1.0", "1.0.post1", "1.1"]
    debian = [BUILD.debian_version(version) for version in versions]
    assert debian == ["1.0~dev1", "1.0~a1", "1.0~rc2", "1.0", "1.0.post1", "1.1"]


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="dpkg is not installed: not on Debian or Ubuntu")
@pytest.mark.parametrize(
    ("older", "newer"), [("1.0a1", "1.0"), ("1.0rc2", "1.0"), ("1.0", "1.0.post1"), ("1.0rc1", "1.0rc2")]
)
def test_dpkg_agrees(older: str, newer: str) -> None:
    order = ["dpkg", "--compare-versions", BUILD.debian_version(older), "lt", BUILD.debian_version(newer)]
    assert subprocess.run(order, check=False, timeout=20).returncode == 0


@pytest.mark.parametrize("name", BUILD.SCRIPTS)
def test_a_script_for_dpkg_is_one_for_any_shell(name: str) -> None:
    done = subprocess.run(["sh", "-n", str(FOLDER / name)], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 0, done.stderr
