"""A closed cluster's broker that has turned bad, and a node that knows no other one.

It has the real broker's certificate, so the node believes that it is the broker. It passes on what node and coordinator say to each
other; and whoever holds `open_port` reads all of it, and says whatever he likes to the node. What he lacks is the key for commands.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec.structs import replace

from potluck.lifecycle import die_with_parent
from potluck.local_cluster import Daemon
from potluck.net.broker import find_mosquitto
from potluck.security import cluster_file
from potluck.wire import codec
from potluck.wire.births import NodeStatus
from potluck.wire.commands import Sealed
from potluck.wire.seals import Seal
from potluck.wire.values import Message
from support.attacked import Attacked
from support.eventually import eventually
from support.paho_peer import Peer

CAPTIVE = "captive"
START_SECONDS = 20.0


@dataclass
class BadBroker:
    home: Attacked
    port: int
    open_port: int
    captive: Daemon

    @asynccontextmanager
    async def held(self) -> AsyncIterator[Held]:
        peer = await Peer(None, "potluck-bad", self.open_port).connected()
        try:
            await peer.subscribe("#")
            held = Held(self, peer)
            await eventually(lambda: held.status is not None)
            yield held
        finally:
            peer.close()


class Held:
    """The hand of whoever is the broker."""

    def __init__(self, broker: BadBroker, peer: Peer) -> None:
        self.broker = broker
        self.topics = broker.home.topics
        self.peer = peer

    def topic(self, leaf: str) -> str:
        return self.topics.node(CAPTIVE, leaf)

    async def tell(self, message: Message | bytes, topic: str = "", *, retain: bool = False) -> None:
        """Send something to the node."""
        data = message if isinstance(message, bytes) else codec.encode(message)
        await self.peer.publish(topic or self.topic("inbox"), data, retain=retain)

    def heard(self, leaf: str) -> list[Message]:
        """What the node has said there."""
        return self.heard_on(self.topic(leaf))

    def heard_on(self, topic: str) -> list[Message]:
        return [codec.decode(payload)[0] for where, payload in self.peer.got if where == topic and payload]

    def commands(self) -> list[bytes]:
        """What was sent to the node, by anybody."""
        return [payload for topic, payload in self.peer.got if topic == self.topic("inbox")]

    @property
    def status(self) -> NodeStatus | None:
        found = [one for one in self.heard("status") if isinstance(one, NodeStatus) and one.state == "online"]
        return found[-1] if found else None

    @property
    def session(self) -> str:
        assert self.status is not None
        return self.status.session

    def refused(self) -> list[str]:
        """Why the node did not take what was sent to its inbox, in order, since its start."""
        lines = self.broker.captive.log_path.read_text().splitlines()
        return [line.partition(" reason=")[2] for line in lines if " refused_seals=" in line]

    async def provoked(self) -> bytes:
        """A command that the real coordinator has sent just now: the node seems to speak in a session that it does not know."""
        before = len(self.commands())
        stray = {
            "type": "NodeTelemetry",
            "node_id": CAPTIVE,
            "session": "stray",
            "cpu_percent": 1.0,
            "memory_used_bytes": 1,
        }
        said = msgspec.json.encode(stray | {"memory_available_bytes": 1})

        async def sent() -> bytes | None:
            await self.peer.publish(self.topic("telemetry"), said)
            return next(iter(self.commands()[before:]), None)

        found = await eventually(sent, 15, every=0.5)
        assert found is not None
        return found


def sealed(payload: bytes) -> Sealed:
    message, _ = codec.decode(payload)
    assert isinstance(message, Sealed)
    return message


def seal_of(message: Sealed) -> Seal:
    return msgspec.msgpack.decode(message.seal, type=Seal)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def bad_broker(home: Attacked, folder: Path) -> Iterator[BadBroker]:
    """The broker, and the node `captive`, which has joined the real cluster."""
    identity = folder / "state" / "identity"
    home.cluster.join(CAPTIVE, identity)
    port, open_port = free_port(), free_port()
    known = cluster_file.read(identity)
    cluster_file.write(identity, replace(known, brokers=(f"127.0.0.1:{port}",)))
    where = folder / "mosquitto"
    where.mkdir()
    for source in (
        home.cluster.folder / "coordinator" / "broker" / "broker.pem",
        identity / "node.pem",
        identity / "ca.crt",
    ):
        shutil.copy(source, where)
    (where / "mosquitto.conf").write_text(_configuration(home, port, open_port))
    mosquitto = find_mosquitto()
    assert mosquitto is not None
    with (where / "log").open("wb") as log:
        broker = subprocess.Popen(
            [mosquitto, "-c", "mosquitto.conf"], cwd=where, stdout=log, stderr=log, preexec_fn=die_with_parent()
        )
    captive = Daemon(
        CAPTIVE,
        [
            sys.executable,
            str(Path(__file__).with_name("telling_node.py")),
            "--state-dir",
            str(folder / "state"),
            "--no-discovery",
        ],
        folder / "captive.log",
        home.cluster.nodes[0].environment,
    )
    try:
        _wait(lambda: "running" in (where / "log").read_text(), where / "log")
        captive.start()
        _wait(lambda: "node joined" in captive.log_path.read_text(), captive.log_path)
        yield BadBroker(home, port, open_port, captive)
    finally:
        captive.terminate()
        captive.wait(10)
        broker.terminate()
        broker.wait(10)


def _configuration(home: Attacked, port: int, open_port: int) -> str:
    root = home.topics.root
    out = "".join(
        f"topic {root}/nodes/{CAPTIVE}/{leaf} out 1\n" for leaf in ("status", "capacity", "telemetry", "outbox")
    )
    return f"""\
per_listener_settings true
user root
listener {port} 127.0.0.1
allow_anonymous true
cafile ca.crt
certfile broker.pem
keyfile broker.pem
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
use_username_as_clientid true
listener {open_port} 127.0.0.1
allow_anonymous true
connection bridge
address 127.0.0.1:{home.cluster.broker_port}
bridge_cafile ca.crt
bridge_certfile node.pem
bridge_keyfile node.pem
bridge_insecure true
bridge_tls_version tlsv1.3
remote_clientid potluck-bridge
cleansession true
notifications false
restart_timeout 1
{out}topic {root}/nodes/{CAPTIVE}/inbox in 1
topic {root}/coordinator/# in 1
"""


def _wait(check: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not check():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
