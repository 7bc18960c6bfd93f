"""The systemd units are valid, without a warning, and allow what the daemons need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from potluck.errors import CannotListen, GaveWay, InvalidSettings
from potluck.lifecycle import FILES, LATE_SECONDS, REPORT_SECONDS, SILENT_SECONDS, START_SECONDS

FOLDER = Path(__file__).parents[3] / "systemd"
NAMES = ("potluck-coordinator", "potluck-node")
EXPOSURE_LIMIT = 2.0
BACK_SECONDS = 10
"""A daemon that is stopped is back within this."""

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
def test_the_machines_start_waits_for_no_node_and_others_may(tmp_path: Path) -> None:
    wanted = tmp_path / "multi-user.target.wants"
    wanted.mkdir()
    user = tmp_path / "uses-the-cluster.service"
    user.write_text("[Unit]\nAfter=potluck-node.service\n[Service]\nExecStart=/bin/true\n")
    for unit in (*(copied(name, tmp_path) for name in NAMES), user):
        (wanted / unit.name).symlink_to(unit)
    # At this level, verify tells all that it knows of the unit.
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "multi-user.target"],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "SYSTEMD_LOG_LEVEL": "debug"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "cycle" in line and user.name in line]
    target = done.stdout[done.stdout.index("-> Unit multi-user.target:") :]
    waits = {line.split()[1] for line in target.splitlines() if line.split()[:1] == ["After:"]}
    assert "Wants: potluck-node.service" in target
    assert {"potluck-coordinator.service", user.name} <= waits
    assert "potluck-node.service" not in waits


def test_a_node_is_still_stopped_with_its_machine() -> None:
    """What systemd adds to other services (systemd.service(5), default dependencies)."""
    lines = (FOLDER / "potluck-node.service").read_text().splitlines()
    assert {"Requires=sysinit.target", "Conflicts=shutdown.target", "Before=shutdown.target"} <= set(lines)
    (after,) = (line for line in lines if line.startswith("After="))
    assert {"sysinit.target", "basic.target", "network-online.target"} <= set(after.removeprefix("After=").split())


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_in_a_unit_would_be_found(tmp_path: Path, name: str) -> None:
    copy = copied(name, tmp_path)
    copy.write_text(copy.read_text().replace("DynamicUser=yes", "DynamicUsers=yes"))
    assert "DynamicUsers" in verify(copy)


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_a_unit_may_do_little_else_on_its_machine(tmp_path: Path, name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(copied(name, tmp_path))]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert score is not None, told
    assert float(score[1]) <= EXPOSURE_LIMIT


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
    facts = dict(line.split("=", 1) for line in lines if re.match(r"[A-Za-z]+=", line))
    watchdog, pause = int(facts["WatchdogSec"]), int(facts["RestartSec"])
    assert watchdog + pause < BACK_SECONDS, "the process needs time to end and to start"
    assert watchdog >= 7 + REPORT_SECONDS, "a loop that hangs once for up to 7 s must not end a daemon"
    assert watchdog > LATE_SECONDS + 2 * REPORT_SECONDS, "nor one that was just not late, twice"
    assert watchdog == SILENT_SECONDS
    assert int(facts["TimeoutStartSec"]) == START_SECONDS
    if name == "potluck-node":
        assert int(facts["JobRunningTimeoutSec"]) >= int(facts["TimeoutStopSec"]) + 10, (
            "it also ends the job of stopping"
        )
    assert facts["RuntimeDirectory"] == name, "there, a daemon counts its crashes"
    assert facts["RuntimeDirectoryPreserve"] == "restart", "a stop ends the counting"
    assert int(facts["LimitNOFILE"]) == FILES
    # TensorFlow writes machine code while it runs; mDNS asks the kernel for the interfaces.
    assert not any(line.startswith("MemoryDenyWriteExecute") for line in lines)
    assert "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK" in lines


def test_a_token_to_join_with_need_not_be_there() -> None:
    lines = (FOLDER / "potluck-node.service").read_text().splitlines()
    assert {"LoadCredential=join-token:/etc/potluck/join-token", "SetCredential=join-token:none"} <= set(lines)


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
@pytest.mark.parametrize("maker", ["nvidia", "amd"])
def test_a_node_that_sees_gpus_sees_little_else(tmp_path: Path, maker: str) -> None:
    unit = copied("potluck-node", tmp_path)
    dropins = tmp_path / f"{unit.name}.d"
    dropins.mkdir()
    shutil.copy(FOLDER / f"{maker}.conf", dropins)
    assert verify(unit) == ""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(unit)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "DeviceAllow=" in said.stdout, "the drop-in counts"
    assert said.returncode == 0, said.stdout[-400:]


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_units_are_exposed_little(tmp_path: Path, name: str) -> None:
    unit = copied(name, tmp_path)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(unit)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert said.returncode == 0, said.stdout[-400:]
