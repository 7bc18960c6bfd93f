"""Hands a join token to the node's service, which makes its own key and joins: root never has that key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from potluck import enrolment
from potluck.client import operating
from potluck.client.membership import OPERATOR, SERVICE_STATES
from potluck.errors import InvalidRequest, PotluckError, Unavailable
from potluck.net.broker import find_mosquitto
from potluck.security import cluster_file, folder
from potluck.security.cluster_file import ClusterFile
from potluck.service import installing, systemd
from potluck.service.checking import Daemon
from potluck.service.installing import Installed
from potluck.service.settings_file import Value
from potluck.settings import CoordinatorSettings, is_closed, is_loopback
from potluck.wire import tokens
from potluck.wire.members import CreateToken
from potluck.wire.tokens import JoinToken

TOKEN = "join-token"  # noqa: S105 - the name of a file
JOIN_SECONDS = 40.0
LOOK_SECONDS = 0.2
ADDRESS = "0.0.0.0"  # noqa: S104 - members only are let in


def join(token: JoinToken) -> ClusterFile:
    """Let the installed node join with this token, and return what it knows then of its cluster.

    A node that listened on this machine alone listens on the network from now on. See `install`.
    """
    listen = installing.present("node").listen
    alone = listen.insecure or is_loopback(listen.host)
    return install(token, {"listen.host": ADDRESS, "listen.insecure": False} if alone else {})[1]


def install(token: JoinToken, changes: Mapping[str, Value]) -> tuple[list[Installed], ClusterFile]:
    """Install the node with these changed settings, and let it join with the token. Returns what it knows then of its cluster.

    Raises what `installing.install` does, InvalidRequest when the node cannot join, and Unavailable when it has not joined in time: it
    goes on trying.
    """
    hand_over(token)
    try:
        done = installing.install(("node",), changes, joins=True)
    except PotluckError:
        _file().unlink(missing_ok=True)
        raise
    return done, joined(token)


def lead(changes: Mapping[str, Value], *, node: bool) -> tuple[list[Installed], str]:
    """Install a coordinator and, if asked for, a node beside it. The second value is a join token for other machines, if it leads a closed
    cluster; its node is then a member. Raises what `install` does.
    """
    daemons: tuple[Daemon, ...] = ("coordinator", "node") if node else ("coordinator",)
    closed = is_closed_after(changes)
    if closed and find_mosquitto() is None:
        raise Unavailable(
            "a closed cluster needs mosquitto: apt install mosquitto (or your system's package), and type this again; or serve only this "
            "machine, with --listen 127.0.0.1"
        )
    member = installing.credentials() is not None
    began = time.time()
    done = installing.install(daemons, changes, joins=closed, waits=("node",) if closed and not member else ())
    if not closed:
        return done, ""
    cluster = done[0].settings.cluster
    if node and not member:
        token = tokens.parse(_asked(cluster, operating.own_node(), began))
        hand_over(token)
        installing.start("node")
        joined(token)
    return done, _asked(cluster, operating.shared(), began)


def is_closed_after(changes: Mapping[str, Value]) -> bool:
    """Whether the coordinator leads a closed cluster with these changed settings."""
    settings = installing.present("coordinator")
    assert isinstance(settings, CoordinatorSettings)
    host, insecure = changes.get("listen.host"), changes.get("listen.insecure")
    listen = replace(
        settings.listen,
        host=str(host) if host is not None else settings.listen.host,
        insecure=bool(insecure) if insecure is not None else settings.listen.insecure,
    )
    return is_closed(replace(settings, listen=listen))


def _asked(cluster: str, question: CreateToken, since: float) -> str:
    where = next(state for state in SERVICE_STATES if state.exists() or state == SERVICE_STATES[-1]) / OPERATOR
    return asyncio.run(operating.new_token(where, cluster, question, since))


def hand_over(token: JoinToken) -> None:
    """Write the token where the unit's LoadCredential finds it at its next start, and let it be tried again. Raises InvalidSettings."""
    if (where := installing.credentials()) is not None:
        (where / enrolment.TRIED).unlink(missing_ok=True)
    if not installing.SETTINGS.exists():
        installing.SETTINGS.mkdir()
        installing.SETTINGS.chmod(0o755)
    folder.write(_file(), f"{token.text()}\n".encode())


def _file() -> Path:
    return installing.SETTINGS / TOKEN


def joined(token: JoinToken) -> ClusterFile:
    """Wait until the service has joined with the token, and delete it. See `join`."""
    unit = installing.unit("node")
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        try:
            known = _member(token)
        except InvalidRequest:
            _file().unlink(missing_ok=True)
            raise
        if known is not None:
            _file().unlink(missing_ok=True)
            return known
        (state,) = systemd.states([unit])
        if state.state == "failed":
            _file().unlink(missing_ok=True)
            raise InvalidRequest(
                f"potluck-node could not join: {state.said or state.result}; `potluck service logs` says more"
            )
        time.sleep(LOOK_SECONDS)
    (state,) = systemd.states([unit])
    raise Unavailable(
        f"potluck-node has not joined within {JOIN_SECONDS:g} s ({state.said or state.state}): it goes on trying, also after a restart of "
        f"this machine, as long as {_file()} is there"
    )


def _member(token: JoinToken) -> ClusterFile | None:
    """What the service's node knows of its cluster once it has joined with the token; None: it has not yet. Raises InvalidRequest."""
    where = installing.credentials()
    answer = None if where is None else enrolment.tried(where, token)
    if answer:
        raise InvalidRequest(f"potluck-node could not join, and is a member as before: {answer}")
    return None if where is None or answer is None else cluster_file.read(where)
