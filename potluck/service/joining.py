"""Hands a join token to the node's service, which makes its own key and joins: root never has that key."""

from __future__ import annotations

import time
from pathlib import Path

from potluck.errors import InvalidRequest, PotluckError, Unavailable
from potluck.security import certificates, cluster_file, folder
from potluck.security.cluster_file import ClusterFile
from potluck.service import installing, systemd
from potluck.wire.tokens import JoinToken

TOKEN = "join-token"  # noqa: S105 - the name of a file
JOIN_SECONDS = 40.0
LOOK_SECONDS = 0.2
ADDRESS = "0.0.0.0"  # noqa: S104 - members only are let in


def join(token: JoinToken) -> ClusterFile:
    """Let the installed node join with this token, and return what it knows then of its cluster.

    A node that listened on this machine alone listens on the network from now on. Raises PotluckError when the node ends, Unavailable when
    it has not joined in time: it goes on trying.
    """
    settings = installing.present("node")
    changes: dict[str, str | bool] = {}
    if settings.listen.insecure or settings.listen.host in ("127.0.0.1", "localhost"):
        changes = {"listen.host": ADDRESS, "listen.insecure": False}
    hand_over(token)
    installing.install(("node",), changes, joins=True)
    return joined(token)


def hand_over(token: JoinToken) -> None:
    """Write the token where the unit's LoadCredential finds it at its next start. Raises InvalidSettings."""
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
        if (known := _member(token)) is not None:
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
    """What the service's node knows of the token's cluster; None: it is no member yet."""
    where = installing.credentials()
    if where is None:
        return None
    try:
        ca = (where / folder.CA_CERTIFICATE).read_bytes()
        certificates.check(folder.certificate_of(folder.pair(where, "node").read_bytes()), ca, time.time())
        return cluster_file.read(where) if certificates.read(ca).fingerprint.startswith(token.fingerprint) else None
    except (OSError, PotluckError):  # those of another cluster, which are being replaced
        return None
