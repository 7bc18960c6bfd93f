"""The Debian package on a booted machine: installed, upgraded, removed and purged with dpkg, with packages from a folder of wheels.

The tests share one machine, in their order.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.booted import Machine, copied_sources, packages
from support.wheelhouse import locked, names_in

ROOT = Path(__file__).parents[2]
WHEELS = Path("/srv/wheels")
UNITS = ("potluck-coordinator.service", "potluck-node.service")
POTLUCK = "/usr/bin/potluck"
ENVIRONMENT = ("env", "POTLUCK_EXTRA=core", f"POTLUCK_WHEELS={WHEELS}", "DEBIAN_FRONTEND=noninteractive")
DPKG = "var/lib/dpkg/"
"""Where dpkg keeps its own notes."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders: wheels of all that potluck needs without extras, and the lock file for them."""
    folder, requirements = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("requirements")
    (requirements / "core.txt").write_text(locked(names_in(ROOT / "requirements/core.txt"), folder))
    return folder, requirements


@pytest.fixture(scope="module")
def machine(bootable: None, wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Of this machine's packages, dpkg there knows those that ours depends on."""
    shown = {place: here for place, here in packages().items() if place.name != "site-packages"}
    made = Machine(tmp_path_factory.mktemp("machine"), shown={WHEELS: wheels[0], **shown}, overlaid=True)
    for name in ("info", "updates", "triggers"):
        made.path(f"/var/lib/dpkg/{name}").mkdir(parents=True)
    status = Path("/var/lib/dpkg/status").read_text(encoding="utf-8")
    needed = [one for one in status.split("\n\n") if re.match(r"Package: python3(-venv)?\n", one)]
    made.path("/var/lib/dpkg/status").write_text("\n\n".join(needed) + "\n\n")
    try:
        made.boot()
        assert made.settled() == "running"
        version = f"Python {sys.version_info[0]}.{sys.version_info[1]}."
        if not made.run("python3", "--version").startswith(version):
            # The wheels are those of the Python that runs this test.
            made.run(
                "ln",
                "-s",
                f"{sys.base_prefix}/bin/python{sys.version_info[0]}.{sys.version_info[1]}",
                "/usr/local/bin/python3",
            )
        yield made
    finally:
        made.shut_down()


def package(machine: Machine, requirements: Path, *, sources: Path = ROOT) -> str:
    """Where the container has a package of these sources."""
    command = [sys.executable, str(ROOT / "packaging/deb/build.py"), "--output", str(machine.path("/root"))]
    command += ["--sources", str(sources), "--requirements", str(requirements)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    return f"/root/{Path(built.stdout.strip()).name}"


def dpkg(machine: Machine, *arguments: str) -> None:
    machine.run(*ENVIRONMENT, "dpkg", *arguments, seconds=200)


def active(machine: Machine) -> bool:
    return all(machine.fact(unit, "ActiveState") == "active" for unit in UNITS)


@pytest.fixture(scope="module")
def before(machine: Machine) -> set[str]:
    """What is on the disk without the package."""
    return machine.files()


def test_what_cannot_be_installed_says_why_and_can_be_put_right(
    machine: Machine, wheels: tuple[Path, Path], before: set[str]
) -> None:
    """A folder of others in /opt is left alone. Missing packages are told of. Then it is installed, and nothing runs unasked."""
    foreign = machine.path("/opt/potluck/ours")
    foreign.parent.mkdir()
    foreign.write_text("")
    built = package(machine, wheels[1])
    code, said = machine.fails(*ENVIRONMENT, "dpkg", "--install", built)
    machine.path(built).unlink()
    assert code != 0
    assert "move it away" in said
    assert foreign.exists()
    shutil.rmtree(foreign.parent)

    code, said = machine.fails(*ENVIRONMENT, "POTLUCK_WHEELS=/home", "dpkg", "--configure", "potluck")
    assert code != 0
    assert "POTLUCK_WHEELS=FOLDER dpkg --configure potluck" in said

    dpkg(machine, "--configure", "potluck")
    assert machine.run(POTLUCK, "--version") == "potluck 0.1.0"
    assert machine.run("systemctl", "list-units", "--all", "--no-legend", "potluck*") == ""


def test_an_upgrade_restarts_what_was_installed_and_keeps_its_data(
    machine: Machine, wheels: tuple[Path, Path], before: set[str], tmp_path: Path
) -> None:
    machine.run(POTLUCK, "service", "install", "--role", "coordinator", "--cluster", "attic")
    machine.until(lambda: active(machine), 60)
    pids = [machine.pid(unit) for unit in UNITS]
    identity = machine.path("/var/lib/private/potluck-node/node-id").read_text()

    built = package(machine, wheels[1], sources=copied_sources(tmp_path / "newer", version="0.1.0.post7"))
    dpkg(machine, "--install", built)
    machine.path(built).unlink()
    machine.until(lambda: active(machine) and not set(pids) & {machine.pid(unit) for unit in UNITS}, 60)
    (node,) = json.loads(machine.run(POTLUCK, "nodes", "--cluster", "attic", "--json"))
    assert node["software"]["potluck"] == "0.1.0.post7"
    assert machine.path("/var/lib/private/potluck-node/node-id").read_text() == identity


def test_removed_it_leaves_the_data_and_purged_nothing(machine: Machine, before: set[str]) -> None:
    dpkg(machine, "--remove", "potluck")
    assert machine.listening() == set()
    left = machine.files() - before
    data = ("etc/potluck", "var/lib/potluck-", "var/lib/private/potluck-", DPKG)
    assert {"etc/potluck/node.toml", "var/lib/private/potluck-node/node-id"} <= left
    assert [place for place in left if not place.startswith(data)] == []

    dpkg(machine, "--purge", "potluck")
    left = machine.files() ^ before
    assert [place for place in left if not place.startswith(DPKG)] == []
    assert machine.run("find", "/run", "/tmp", "-name", "*potluck*") == ""
