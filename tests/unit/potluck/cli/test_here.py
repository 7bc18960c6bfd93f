"""What runs on this machine: system services by systemctl, and nodes that mDNS shows and that answer."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from potluck.cli import here
from potluck.cli.plan import Plan
from potluck.credentials import Credentials
from potluck.errors import Conflict, InvalidSettings
from potluck.net.discovery import Service
from potluck.settings import Listen, NetworkSettings
from potluck.sole_use import User

SHOWN = """MainPID=77
StatusText=node attic-1: in cluster default
Id=potluck-node.service
ActiveState=active
ActiveEnterTimestamp=@1795894119

MainPID=0
StatusText=
Id=potluck-coordinator.service
ActiveState=inactive
ActiveEnterTimestamp=
"""


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'E'\n{SHOWN}E\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(here, "SYSTEMD", tmp_path)


def plan(state_dir: Path | None = None, **given: int) -> Plan:
    return Plan(
        NetworkSettings(), Listen(), state_dir, given.get("broker_port"), "WARNING", (), given.get("gateway_port")
    )


@pytest.mark.usefixtures("systemd")
def test_beside_the_system_service_nothing_is_started(tmp_path: Path) -> None:
    (unit,) = here.units()
    assert (unit.name, unit.pid, unit.since) == ("potluck-node.service", 77, 1795894119.0)
    with pytest.raises(Conflict, match=r"service potluck-node \(pid 77, since .*: node attic-1: in cluster default\)"):
        plan().check_free()
    plan(tmp_path / "another").check_free()  # a user who names a folder wants a second one


def test_where_there_is_no_systemd_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "SYSTEMD", tmp_path / "none")
    monkeypatch.setenv("PATH", "/nowhere")
    assert here.units() == []


async def test_a_node_is_here_when_it_answers_at_an_address_of_ours() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    live = Service("n1", "lab", "node", "127.0.0.1", port)
    others = [Service("n2", "lab", "node", "198.51.100.7", port), Service("c", "lab", "coordinator", "127.0.0.1", port)]
    async with server:
        assert await here.node_here([*others, live], Credentials()) == live
    assert await here.node_here([*others, live], Credentials()) is None


def test_a_port_that_is_taken_names_the_option_of_up(unused_tcp_port: int) -> None:
    import socket

    with socket.create_server(("127.0.0.1", unused_tcp_port)):
        for option in ("broker_port", "gateway_port"):
            with pytest.raises(InvalidSettings, match=f"choose another one with --{option.replace('_', '-')}"):
                plan(**{option: unused_tcp_port}).check_ports()
    plan(broker_port=unused_tcp_port, gateway_port=0).check_ports()


def test_the_command_that_shares_is_what_was_typed_and_insecure() -> None:
    assert plan().shared() == "potluck up --insecure"
    typed = Plan(NetworkSettings(cluster="lab"), Listen(), Path("/srv/a b"), None, "WARNING", ("p=/srv/p",), 8000)
    assert (
        typed.shared()
        == "potluck up --insecure --cluster lab --state-dir '/srv/a b' --gateway-port 8000 --data p=/srv/p"
    )
    assert typed.shared(elsewhere=True) == "potluck up --insecure --cluster lab"


@pytest.mark.usefixtures("systemd")
def test_of_what_runs_here_nothing_is_said_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def user(what: str, pid: int, *folder: str) -> User:
        return User(what, "lab", pid, folder=str(tmp_path.joinpath(*folder)))

    up, by_hand, another = user("up", 1, "a", "up"), user("node", 4, "b"), user("coordinator", 5, "c", "coordinator")
    tended = [user("node", 2, "a", "node"), user("coordinator", 3, "a", "coordinator")]
    service = user("node", 77, "var")
    monkeypatch.setattr(here, "users_here", lambda: [*tended, by_hand, another, service, up])
    assert here.running() == [by_hand, another, up, *here.units()]
    # The second is systemd's StateDirectory of a unit that runs `potluck up`.
    shared = [user("node", 9, "state"), user("up", 8, "state")]
    monkeypatch.setattr(here, "users_here", lambda: shared)
    assert here.running() == [shared[1], *here.units()]
