"""Builds potluck's Debian package with `dpkg-deb`, and prints where it is: `make deb`.

The package holds a wheel and lock files. Its `postinst` makes an environment of them in /opt/potluck, with the machine's own Python.
Services are installed and removed by `potluck service` there: nothing of that is here a second time.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from potluck.service import installing

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LIBRARY = Path("usr/lib/potluck")
SCRIPTS = ("postinst", "prerm", "postrm")


def build(sources: Path, requirements: Path, target: Path) -> Path:
    """The package of these sources, with the lock files in `requirements`, in the folder `target`."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        library = tree / LIBRARY
        library.mkdir(parents=True)
        wheel = _wheel(sources, library)
        for lock in sorted(requirements.glob("*.txt")):
            shutil.copy(lock, library)
        (tree / "usr/bin").mkdir()
        (tree / "usr/bin/potluck").symlink_to("/opt/potluck/bin/potluck")
        documents = tree / "usr/share/doc/potluck"
        documents.mkdir(parents=True)
        shutil.copy(sources / "LICENSE", documents / "copyright")
        with gzip.GzipFile(documents / "changelog.gz", "wb", mtime=0) as file:
            file.write((ROOT / "CHANGELOG.md").read_bytes())
        version = debian_version(wheel.name.split("-")[1])
        _control(tree, version)
        _modes(tree)
        package = target / f"potluck_{version}_all.deb"
        target.mkdir(parents=True, exist_ok=True)
        _run("dpkg-deb", "--root-owner-group", "--build", str(tree), str(package))
    return package


def debian_version(version: str) -> str:
    """A version of Python's as Debian orders it: 1.0rc1 comes before 1.0 (`~`), 1.0.post1 after it."""
    return re.sub(r"\.?(a|b|rc|dev)(\d+)", r"~\1\2", version)


def _wheel(sources: Path, target: Path) -> Path:
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    return target / _run(sys.executable, "-P", "-c", code, str(target), folder=sources).split()[-1]


def _control(tree: Path, version: str) -> None:
    """The files for dpkg itself: what is particular to this build is written into them."""
    control = tree / "DEBIAN"
    control.mkdir()
    kilobytes = sum(file.stat().st_size for file in tree.rglob("*") if file.is_file() and not file.is_symlink()) // 1024
    units = {daemon: installing.UNITS / installing.unit(daemon) for daemon in installing.DAEMONS}
    facts = {
        "VERSION": version,
        "INSTALLED_SIZE": str(kilobytes),
        "COORDINATOR_UNIT": str(units["coordinator"]),
        "NODE_UNIT": str(units["node"]),
        "SETTINGS": str(installing.SETTINGS),
        "PURGED": " ".join(str(path) for daemon in installing.DAEMONS for path in installing.kept(daemon)),
    }
    for name in ("control", *SCRIPTS):
        text = (HERE / name).read_text(encoding="utf-8")
        (control / name).write_text(re.sub(r"@([A-Z_]+)@", lambda found: facts[found[1]], text), encoding="utf-8")


def _modes(tree: Path) -> None:
    """As Debian wants them, whatever the umask and the checkout are."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.name in SCRIPTS else 0o644)


def _run(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stdout}{done.stderr}")
    return done.stdout


def _environment() -> dict[str, str]:
    """With the time of the last commit in place of the present one: the same sources give the same package, bit for bit."""
    if "SOURCE_DATE_EPOCH" in os.environ or shutil.which("git") is None:
        return dict(os.environ)
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return os.environ | ({"SOURCE_DATE_EPOCH": done.stdout.strip()} if done.returncode == 0 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=ROOT, help="a checkout (default: this one)")
    parser.add_argument("--requirements", type=Path, default=ROOT / "requirements", help="the folder of lock files")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="the folder for the package")
    given = parser.parse_args()
    if shutil.which("dpkg-deb") is None:
        sys.exit("dpkg-deb is missing: build on Debian or Ubuntu, or install dpkg")
    sys.stdout.write(f"{build(given.sources, given.requirements, given.output.resolve())}\n")


if __name__ == "__main__":
    main()
