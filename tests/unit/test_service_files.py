"""The example settings load, name every setting, and are the defaults; the systemd units are valid."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from potluck.settings import CoordinatorSettings, NetworkSettings, NodeSettings, load

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "kind"), [("node", NodeSettings), ("coordinator", CoordinatorSettings)])
def test_the_examples_are_the_defaults_in_full(name: str, kind: type[NetworkSettings]) -> None:
    file = ROOT / "configs" / f"{name}.toml"
    assert load(kind, file) == kind()
    assert set(tomllib.loads(file.read_text())) == set(msgspec.to_builtins(kind()))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt: systemd)")
@pytest.mark.parametrize("name", ["potluck-node", "potluck-coordinator"])
def test_units_are_valid(tmp_path: Path, name: str) -> None:
    unit = (ROOT / "systemd" / f"{name}.service").read_text()
    # The daemon is installed in /opt/potluck on the machines that run it, and systemd-analyze wants to see a program.
    assert f"ExecStart=/opt/potluck/bin/{name} " in unit
    copy = tmp_path / f"{name}.service"
    copy.write_text(unit.replace(f"/opt/potluck/bin/{name}", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False, timeout=60
    )
    assert verified.returncode == 0, verified.stderr
    said = [line for line in verified.stderr.splitlines() if str(copy) in line or name in line]
    # The back-off is known from systemd 254 on; older ones ignore it, and say so.
    assert not [line for line in said if "RestartSteps" not in line and "RestartMaxDelaySec" not in line]


@pytest.mark.parametrize("name", ["potluck-node", "potluck-coordinator"])
def test_units_keep_what_the_daemons_need(name: str) -> None:
    unit = (ROOT / "systemd" / f"{name}.service").read_text()
    for line in ("Type=notify", "DynamicUser=yes", f"StateDirectory={name}", "Restart=on-failure", "ProcSubset=all"):
        assert line in unit.splitlines()
    assert "AF_NETLINK" in unit
    if name == "potluck-node":
        assert "MemoryDenyWriteExecute=yes" not in unit
