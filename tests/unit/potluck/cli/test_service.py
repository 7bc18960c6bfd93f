"""`potluck service`: what it says to people, its JSON and its exit codes, without a systemd."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from potluck.cli.main import app
from potluck.errors import InvalidRequest, NotFound, Unavailable
from potluck.security.cluster_file import ClusterFile
from potluck.service import installing, joining, systemd
from potluck.settings import CoordinatorSettings, GatewayListen, NodeSettings
from potluck.wire.tokens import JoinToken


@pytest.fixture(autouse=True)
def root_with_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "needed", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["service", *arguments])


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_without_root_it_says_the_exact_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["potluck", "service", command, "--seed", "a b"])
    error = call(command).exception
    assert isinstance(error, InvalidRequest)
    potluck = Path(sys.executable).with_name("potluck")
    assert error.message == f"this needs root: sudo {potluck} service {command} --seed 'a b'"


def test_without_systemd_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(systemd, "BOOTED", tmp_path / "none")
    for command in ("install", "status", "logs", "uninstall"):
        error = call(command).exception
        assert isinstance(error, Unavailable)
        assert "potluck up" in error.message


def test_install_says_what_to_type_on_the_next_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def lead(changes: dict[str, object], *, node: bool) -> tuple[list[installing.Installed], str]:
        asked.append((node, changes))
        settings = CoordinatorSettings(cluster="attic", listen=GatewayListen(host="10.0.0.7", insecure=True))
        return [installing.Installed("coordinator", Path("/etc/potluck/coordinator.toml"), settings)], ""

    monkeypatch.setattr(joining, "lead", lead)
    monkeypatch.setattr(installing, "founds", lambda seeds: False)
    done = call("install", "--role", "coordinator", "--insecure", "--cluster", "attic")
    command = 'sudo "$(command -v potluck)" service install --seed 10.0.0.7 --insecure --cluster attic'
    assert f"On the next machine, after installing potluck there: {command}\n" in done.stdout
    changes = {"cluster": "attic", "listen.host": "0.0.0.0", "listen.insecure": True}
    assert asked.pop() == (True, changes)
    done = call("install", "--role", "coordinator", "--no-node", "--json")
    assert json.loads(done.stdout) == {
        "services": ["potluck-coordinator"], "settings": ["/etc/potluck/coordinator.toml"], "next": command,
    }  # fmt: skip
    assert asked.pop() == (False, {})
    assert isinstance(call("install", "--no-node").exception, InvalidRequest)


def test_a_coordinator_on_a_network_founds_and_its_token_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def lead(changes: dict[str, object], *, node: bool) -> tuple[list[installing.Installed], str]:
        asked.append(changes)
        settings = CoordinatorSettings(listen=GatewayListen(host="0.0.0.0"))
        return [installing.Installed("coordinator", Path("/etc/potluck/coordinator.toml"), settings)], "POTLUCK-1-X"

    monkeypatch.setattr(joining, "lead", lead)
    monkeypatch.setattr(installing, "founds", lambda seeds: not seeds)
    done = call("install", "--role", "coordinator")
    assert "service install --join POTLUCK-1-X\n" in done.stdout
    assert asked.pop() == {"listen.host": "0.0.0.0", "listen.insecure": False}
    call("install", "--role", "coordinator", "--seed", "h")
    assert asked.pop() == {"seeds": ["h"]}
    call("install", "--role", "coordinator", "--listen", "127.0.0.1")
    assert asked.pop() == {"listen.host": "127.0.0.1", "listen.insecure": False}


def test_a_node_joins_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    token = JoinToken(bytes(16), ("h:7814",), bytes(5), bytes(16))
    asked: list[object] = []

    def install(given: JoinToken, changes: dict[str, object]) -> tuple[list[installing.Installed], ClusterFile]:
        asked.append((given, changes))
        known = ClusterFile("attic", "1", ("h:8883",), ("h:7814",), "node:n1")
        return [installing.Installed("node", Path("/etc/potluck/node.toml"), NodeSettings())], known

    monkeypatch.setattr(joining, "install", install)
    done = call("install", "--join", token.text())
    assert "potluck-node is node:n1 of the closed cluster 'attic' now" in done.stdout
    assert asked.pop() == (token, {"listen.host": "0.0.0.0", "listen.insecure": False})
    for wrong in (["--insecure"], ["--role", "coordinator"]):
        assert isinstance(call("install", "--join", token.text(), *wrong).exception, InvalidRequest)
    assert isinstance(call("install", "--join", "POTLUCK-1-X").exception, InvalidRequest)
    assert not asked


def test_a_machine_that_serves_only_itself_names_no_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one = installing.Installed("node", Path("/etc/potluck/node.toml"), NodeSettings())
    monkeypatch.setattr(installing, "install", lambda daemons, changes: [one])
    done = call("install")
    assert done.exit_code == 0
    assert "next machine" not in done.stdout


SHOWN = """Id={name}.service
LoadState={load}
ActiveState={state}
SubState=x
Result=success
MainPID=7
NRestarts=2
StatusText=node a is in cluster default (since 2026-01-01 10:00:00)
UnitFileState=enabled
"""


@pytest.mark.parametrize(
    ("coordinator", "node", "code"),
    [("active", "active", 0), ("active", "activating", 4), ("failed", "activating", 1), ("", "active", 0)],
)
def test_the_exit_code_of_status_says_whether_all_run(
    coordinator: str, node: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def systemctl(*arguments: str) -> str:
        states = {"potluck-coordinator": coordinator, "potluck-node": node}
        return "\n".join(
            SHOWN.format(name=name, load="loaded" if state else "not-found", state=state or "inactive")
            for name, state in states.items()
        )

    monkeypatch.setattr(systemd, "systemctl", systemctl)
    done = call("status")
    assert done.exit_code == code, done.output
    assert "node a is in cluster default" in done.stdout
    assert ("potluck-coordinator" in done.stdout) == bool(coordinator)
    told = json.loads(call("status", "--json").stdout)
    assert told[-1]["state"] == node
    assert told[-1]["restarts"] == 2


def test_the_status_of_nothing_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(SHOWN.format(name=name, load="not-found", state="inactive") for name in ("a", "b"))
    monkeypatch.setattr(systemd, "systemctl", lambda *arguments: text)
    assert isinstance(call("status").exception, NotFound)


def test_logs_are_journalctls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "execv", lambda program, arguments: asked.append(arguments))
    call("logs", "-f", "-n", "5", "--json")
    units = ["--unit=potluck-coordinator.service", "--unit=potluck-node.service"]
    assert asked == [["/bin/journalctl", *units, "--lines=5", "--follow", "--output=json"]]


def test_uninstall_says_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    purged: list[bool] = []

    def uninstall(*, purge: bool) -> tuple[str, ...]:
        purged.append(purge)
        return ("node",)

    monkeypatch.setattr(installing, "uninstall", uninstall)
    done = call("uninstall")
    assert done.stdout == "potluck-node is removed\n"
    assert "--purge deletes them" in done.stderr
    assert json.loads(call("uninstall", "--purge", "--json").stdout) == {"services": ["potluck-node"], "purged": True}
    assert purged == [False, True]
