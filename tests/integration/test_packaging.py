"""The packages, and what an installation finds: built and installed as pip does it, in an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from potluck import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("potluck", "node", "coordinator")
STALE = "build/lib/potluck/stale.py"
"""A file that a build with setuptools would leave behind, and that the next build would pack."""


def run(*command: str | Path, cwd: Path, code: int = 0, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "POTLUCK_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(kind: str, source: Path, target: Path) -> Path:
    """Through the hooks that pip calls (PEP 517), with the backend that is installed here."""
    code = f"import sys; from hatchling.build import build_{kind}; print(build_{kind}(sys.argv[1]))"
    return target / run(sys.executable, "-P", "-c", code, target, cwd=source).split()[-1]


@dataclass
class Built:
    sdist: Path
    wheel: Path
    source: Path
    """The sdist, unpacked."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of this checkout, and a wheel of that sdist."""
    folder = tmp_path_factory.mktemp("built")
    sdist = build("sdist", ROOT, folder)
    run("tar", "-xzf", sdist, cwd=folder)  # not tarfile: its filter= is newer than Debian 12's Python 3.11.2
    source = folder / f"potluck-{__version__}"
    (source / STALE).parent.mkdir(parents=True)
    (source / STALE).write_text("")
    return Built(sdist, build("wheel", source, folder), source)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with that wheel, and with our dependencies (without asking an index)."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", built.wheel, cwd=folder)
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site(folder) / "dependencies.pth").write_text("\n".join(packages))
    return folder


def site(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def sources(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for name in PACKAGES for path in (folder / name).rglob("*.py")}


def test_the_sdist_has_what_the_repository_has(built: Built) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout, or no git: what belongs to it is not known")
    tracked = set(run("git", "ls-files", cwd=ROOT).split("\n")) - {""}
    with tarfile.open(built.sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    assert tracked <= packed
    assert {name for name in packed if name.startswith(("build", "."))} <= tracked


def is_whole(wheel: Path, source: Path) -> None:
    """It has these sources' packages, units and settings, says that it is typed, and has no other data."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == sources(source)
    assert "potluck/py.typed" in names
    data = {name.partition(".data/data/")[2] for name in names} - {""}
    assert data == {
        f"share/potluck/{folder}/{path.name}"
        for folder in ("configs", "systemd")
        for path in (source / folder).iterdir()
    }


def test_a_wheel_of_a_clean_clone_is_whole(tmp_path: Path) -> None:
    """Nothing that it needs lies in somebody's checkout alone."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout, or no git: there is nothing to clone")
    clone = tmp_path / "clone"
    run("git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", clone, cwd=tmp_path)
    is_whole(build("wheel", clone, tmp_path), clone)


def test_the_wheel_has_packages_units_and_settings_and_nothing_else(built: Built) -> None:
    is_whole(built.wheel, ROOT)
    assert not (built.source / "build/bdist").exists()
    assert sorted(path.name for path in (built.source / "build").rglob("*")) == ["lib", "potluck", "stale.py"]


def test_an_installation_runs_and_finds_its_units_and_settings(installed: Path, tmp_path: Path) -> None:
    for program in ("potluck", "potluck-node", "potluck-coordinator"):
        assert run(installed / "bin" / program, "--version", cwd=tmp_path) == f"potluck {__version__}\n"
    folder = Path(run(installed / "bin/potluck", "files", cwd=tmp_path).strip())
    assert folder == installed / "share/potluck"
    assert (folder / "configs/node.toml").read_text() == (ROOT / "configs/node.toml").read_text()
    assert (folder / "systemd/potluck-node.service").is_file()
    assert run(sys.executable, "-P", "-m", "potluck.cli.main", "files", cwd=tmp_path).strip() == str(ROOT)


@pytest.mark.parametrize("name", ["node", "coordinator"])
def test_another_module_with_the_name_of_a_daemon_is_not_run(installed: Path, tmp_path: Path, name: str) -> None:
    program = installed / "bin" / f"potluck-{name}"
    other = tmp_path / f"{name}.py"
    other.write_text("raise SystemExit('imported')\n")
    assert "usage" in run(program, "--help", cwd=tmp_path)
    said = run(program, "--help", cwd=tmp_path, code=2, PYTHONPATH=str(tmp_path))
    assert str(other) in said
    assert str(site(installed) / name / "__init__.py") in said


def test_a_module_that_another_distribution_overwrote_is_noticed(installed: Path, tmp_path: Path) -> None:
    """Also if the other package has no `__init__.py`, and so merges with ours; not if it only adds modules, or lies deeper."""
    ours, record = site(installed) / "node" / "executor.py", site(installed) / "trees-1.0.dist-info" / "RECORD"
    kept = ours.read_text()
    record.parent.mkdir()
    try:
        record.write_text("trees.py,,\nnode/executor.py,sha256=x,1\nnode/oak.py,sha256=x,1\n")
        assert "usage" in run(installed / "bin/potluck-node", "--help", cwd=tmp_path)
        ours.write_text('"""Of trees."""\n')
        said = run(installed / "bin/potluck-node", "--help", cwd=tmp_path, code=2)
        assert f"{ours} is not potluck's any more: trees-1.0 has a package 'node'" in said
    finally:
        ours.write_text(kept)
        shutil.rmtree(record.parent)


def test_a_package_that_another_distribution_overwrote_is_noticed(installed: Path, tmp_path: Path) -> None:
    ours = site(installed) / "node" / "__init__.py"
    kept = ours.read_text()
    try:
        ours.write_text('"""Nodes of trees."""\n')
        said = run(installed / "bin/potluck-node", "--help", cwd=tmp_path, code=2)
        assert f"{ours} is not potluck's any more" in said
        assert str(site(installed) / "potluck") in said
        ours.unlink()  # as when the other distribution is uninstalled
        assert "install potluck again" in run(installed / "bin/potluck-node", "--help", cwd=tmp_path, code=2)
    finally:
        ours.write_text(kept)
