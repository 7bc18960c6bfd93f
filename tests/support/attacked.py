"""A closed cluster of real daemons that is attacked, and what its members have."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potluck.local_cluster import LocalCluster
from potluck.security import folder
from potluck.wire.members import ListMembers, MemberRole, MembersListed
from potluck.wire.questions import ListNodes, NodesListed
from potluck.wire.topics import Topics
from support import attackers
from support.closed import Authority
from support.paho_peer import Peer

QUOTA_BYTES = 4_000_000


class RealAuthority(Authority):
    """The cluster's own CA, whose key the test takes: for certificates that it would not give, or not give now."""

    def __init__(self, identity: Path) -> None:
        self.key = folder.secret(identity / folder.CA_KEY)
        self.ca = folder.public(identity / folder.CA_CERTIFICATE)


class Attacked:
    """`node-1` works. `ann`, `bob` and `carl` are users, `eve` is a viewer. `nora` is a node without a daemon, and so is
    `mallory`, whose owner does what he likes."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.topics = Topics(cluster.cluster)
        self.http_port = int(cluster.http_url.rpartition(":")[2])
        said = cluster.nodes[0].log_path.read_text()
        self.node_port = int(said.partition(" http=https://127.0.0.1:")[2].split()[0])
        roles: dict[str, MemberRole] = {
            "ann": "user",
            "bob": "user",
            "carl": "user",
            "eve": "viewer",
            "nora": "node",
            "mallory": "node",
        }
        for name, role in roles.items():
            cluster.join(name, cluster.folder / name, role)

    def pair(self, name: str) -> Path:
        """The file with the key and certificate of a member."""
        where = self.cluster.credentials if name == "operator" else self.cluster.folder / name
        (found,) = where.glob("*.pem")
        return found

    def tls(self, name: str) -> ssl.SSLContext:
        """As this member; "": as somebody without a certificate."""
        return attackers.tls(self.pair(name) if name else None)

    def ask(self, name: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """As `attackers.ask`, of the coordinator."""
        return attackers.ask(self.http_port, path, self.tls(name), body, **options)

    async def peer(self, name: str, client_id: str = "", **options: Any) -> Peer:
        """A connection of this member to the broker."""
        port = self.cluster.broker_port if name in ("nora", "mallory") else self.cluster.client_port
        return await Peer(self.tls(name), client_id or f"potluck-{name}", port, **options).connected()

    @property
    def authority(self) -> Authority:
        return RealAuthority(self.cluster.folder / "coordinator" / "identity")

    @property
    def states(self) -> dict[str, str]:
        """Of each node."""
        answer = self.cluster.ask(ListNodes())
        assert isinstance(answer, NodesListed)
        return {one.node_id: one.state for one in answer.nodes}

    @property
    def members(self) -> set[str]:
        answer = self.cluster.ask(ListMembers())
        assert isinstance(answer, MembersListed)
        return {one.identity for one in answer.members if not one.removed_at}

    def log(self, name: str = "coordinator") -> str:
        return (self.cluster.folder / f"{name}.log").read_text()


@contextmanager
def attacked(where: Path) -> Iterator[Attacked]:
    settings = {"POTLUCK_CLIENT_QUOTA_BYTES": str(QUOTA_BYTES)}
    name = f"attacked-{os.getpid()}"
    with LocalCluster(where, cluster=name, nodes=1, discovery=False, closed=True, environment=settings) as cluster:
        yield Attacked(cluster)
