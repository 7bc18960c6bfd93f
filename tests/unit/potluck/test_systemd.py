"""The systemd units are valid, without a warning, and allow what the daemons need."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from potluck.errors import CannotListen, GaveWay, InvalidSettings
from potluck.lifecycle import REPORT_SECONDS

FOLDER = Path(__file__).parents[3] / "systemd"
NAMES = ("potluck-coordinator", "potluck-node")
BACKOFF_SINCE = 254
"""The first systemd that knows RestartSteps."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt install systemd)"
)


def verify(unit: Path) -> str:
    """The output of `systemd-analyze verify` for a unit; empty if all is well."""
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    verified = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    said = [line for line in verified.stderr.splitlines() if "potluck" in line or str(unit.parent) in line]
    assert verified.returncode == 0 or said, verified.stderr
    return "\n".join(said)


def copied(name: str, folder: Path) -> Path:
    """The unit with a program that exists: potluck is not installed in /opt/potluck where tests run, but
    `systemd-analyze verify` looks for it. Everything else is verified as it is.
    """
    text = (FOLDER / f"{name}.service").read_text()
    assert f"ExecStart=/opt/potluck/bin/{name} --config /etc/potluck/{name.removeprefix('potluck-')}.toml\n" in text
    copy = folder / f"{name}.service"
    copy.write_text(text.replace(f"/opt/potluck/bin/{name}", "/bin/true"))
    return copy


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_units_are_valid(tmp_path: Path, name: str) -> None:
    assert verify(copied(name, tmp_path)) == ""


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_in_a_unit_would_be_found(tmp_path: Path, name: str) -> None:
    copy = copied(name, tmp_path)
    copy.write_text(copy.read_text().replace("DynamicUser=yes", "DynamicUsers=yes"))
    assert "DynamicUsers" in verify(copy)


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_the_backoff_goes_with_both(tmp_path: Path, name: str) -> None:
    unit = copied(name, tmp_path)
    text = unit.read_text() + (FOLDER / "restart-backoff.conf").read_text()
    unit.write_text(text)
    said = verify(unit).splitlines()
    version = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.split()[1].split(".")[0]) < BACKOFF_SINCE:
        said = [line for line in said if not re.search(r"Unknown key '(RestartSteps|RestartMaxDelaySec)'", line)]
    assert said == []


@pytest.mark.parametrize("name", NAMES)
def test_a_reload_is_a_hangup(name: str) -> None:
    assert "\nExecReload=kill -HUP $MAINPID\n" in (FOLDER / f"{name}.service").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_units_keep_what_the_daemons_need(name: str) -> None:
    lines = (FOLDER / f"{name}.service").read_text().splitlines()
    for line in (
        "Type=notify", "DynamicUser=yes", f"StateDirectory={name}", "Restart=on-failure", "ProcSubset=all", "OOMPolicy=continue",
        "RestartPreventExitStatus=" + {"potluck-node": f"{InvalidSettings.exit_code}"}.get(
            name, f"{InvalidSettings.exit_code} {GaveWay.exit_code}"
        ),
    ):  # fmt: skip
        assert line in lines
    assert CannotListen.exit_code != InvalidSettings.exit_code, "a network that comes up late is no reason to give up"
    (watchdog,) = (int(line.partition("=")[2]) for line in lines if line.startswith("WatchdogSec="))
    assert watchdog >= 10 * REPORT_SECONDS
    # TensorFlow writes machine code while it runs; mDNS asks the kernel for the interfaces.
    assert not any(line.startswith("MemoryDenyWriteExecute") for line in lines)
    assert "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK" in lines


def test_engines_of_a_service_can_confine_themselves() -> None:
    lines = (FOLDER / "potluck-node.service").read_text().splitlines()
    assert "RestrictNamespaces=user net" in lines
    calls = {call for line in lines if line.startswith("SystemCallFilter=") for call in line.partition("=")[2].split()}
    # @system-service of systemd 252 does not have them.
    assert calls >= {
        "landlock_create_ruleset",
        "landlock_add_rule",
        "landlock_restrict_self",
        "seccomp",
        "@system-service",
    }


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_units_are_exposed_little(tmp_path: Path, name: str) -> None:
    unit = copied(name, tmp_path)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(unit)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert said.returncode == 0, said.stdout[-400:]
