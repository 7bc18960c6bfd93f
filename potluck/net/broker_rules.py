"""What mosquitto is told in a closed cluster: its configuration, and who may write and read which topics. Pure.

The rules are a list of what is allowed, a block for each member. Who has no block has no rights, so that removing a block revokes.
There are no `pattern` lines: a client called `kitchen` would get the rights of the node `kitchen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from potluck.errors import InvalidSettings
from potluck.wire.identities import CLIENT_ID_PREFIX, is_identity
from potluck.wire.topics import Topics

CONFIGURATION = "mosquitto.conf"
NODE_RULES = "acl.nodes"
CLIENT_RULES = "acl.clients"
CERTIFICATE = "broker.pem"
CA = "ca.crt"
CLIENT_CONNECTIONS = 2000
"""How many connections clients may have; nodes may have any number."""

_NOBODY = "user nobody\ntopic read nothing\n"
"""mosquitto lets everybody do everything when it reads no rule. No certificate has this name."""
_LEAVES_WRITTEN = ("status", "capacity", "telemetry", "outbox")
_LEAVES_READ = ("inbox", "status", "capacity", "telemetry")

_LISTENER = f"""\
listener {{port}} {{host}}
allow_anonymous false
cafile {CA}
certfile {CERTIFICATE}
keyfile {CERTIFICATE}
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
"""


@dataclass(frozen=True)
class Member:
    """Somebody who has rights. `role` is that of a client: `viewer`, `user` or `operator`. Raises InvalidSettings for a bad identity."""

    identity: str
    role: str = ""

    def __post_init__(self) -> None:
        if not is_identity(self.identity):
            raise InvalidSettings(f"{self.identity[:80]!r} is no identity: nobody of that name can have rights")

    @property
    def kind(self) -> str:
        return self.identity.partition(":")[0]

    @property
    def name(self) -> str:
        return self.identity.partition(":")[2]


def configuration(host: str, port: int, client_port: int, common: str) -> str:
    """mosquitto.conf: a listener for nodes and coordinators, one for clients, and then `common`. Files are named without a folder.

    On the first, a client id is the name in the certificate: whoever has it ends the connection of who had it before. On the second
    it is free but for its beginning, because one identity may run several commands at once. What begins so is never an identity: there
    is one table of ids for both, and no client may end the connection of a daemon by taking its id.
    """
    return (
        f"per_listener_settings true\nclientid_prefixes {CLIENT_ID_PREFIX}\n"
        + _LISTENER.format(port=port, host=host)
        + f"use_username_as_clientid true\nacl_file {NODE_RULES}\nmax_connections -1\n"
        + _LISTENER.format(port=client_port, host=host)
        + f"acl_file {CLIENT_RULES}\nmax_connections {CLIENT_CONNECTIONS}\n"
        + common
    )


def node_rules(topics: Topics, members: Iterable[Member]) -> str:
    """What nodes and coordinators may do."""
    return _NOBODY + "".join(
        _block(member, _of_daemon(topics, member)) for member in members if member.kind != "client"
    )


def client_rules(topics: Topics, members: Iterable[Member]) -> str:
    """What clients may do: ask. The coordinator looks at the role, and answers each question that it does not allow: the broker would drop it
    without a word, and whoever asked would wait.
    """
    return _NOBODY + "".join(
        _block(member, _of_client(topics, member)) for member in members if member.kind == "client"
    )


def _of_daemon(topics: Topics, member: Member) -> Iterator[tuple[str, str]]:
    if member.kind == "coordinator":
        yield "readwrite", f"{topics.root}/#"
    elif member.kind == "node":
        yield from (("write", topics.node(member.name, leaf)) for leaf in _LEAVES_WRITTEN)
        yield from (("read", topics.node(member.name, leaf)) for leaf in _LEAVES_READ)
        yield "read", topics.coordinator_status
        yield "read", topics.coordinator_proof


def _of_client(topics: Topics, member: Member) -> Iterator[tuple[str, str]]:
    own = Topics(topics.cluster, member.name)
    yield "read", own.client_inbox("+")
    yield "write", own.coordinator_inbox
    yield "read", topics.coordinator_status
    yield from (("read", topics.node("+", leaf)) for leaf in ("status", "capacity", "telemetry"))
    yield from (("read", topics.job("+", leaf)) for leaf in ("status", "events", "result"))
    yield "write", own.jobs_submit
    yield "write", own.infer("+")


def _block(member: Member, rights: Iterable[tuple[str, str]]) -> str:
    return f"user {member.identity}\n" + "".join(f"topic {right} {topic}\n" for right, topic in rights)
