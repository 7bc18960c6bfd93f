"""Credentials from folders: bus and HTTP between a coordinator and a node of a closed cluster, and those who pose as one of them."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.sealing import ForwardClock, Sealing
from potluck.blobs import server
from potluck.blobs.download import Downloader
from potluck.blobs.parts import Timings
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.bus.connecting import refusal
from potluck.bus.mqtt import Envelope, MqttBus, in_turn
from potluck.credentials import Credentials
from potluck.errors import InvalidRequest, InvalidSettings, Unavailable
from potluck.net.addresses import base_urls
from potluck.net.broker import start_closed_broker
from potluck.net.broker_rules import Member
from potluck.net.http import serve_http
from potluck.net.http_client import is_there
from potluck.security import certificates
from potluck.security.signing import Signer, Verifier, new_key
from potluck.settings import BrokerSettings, BusTimings
from potluck.wire import seals
from potluck.wire.births import NodeStatus
from potluck.wire.commands import ForgetJob, Sealed
from potluck.wire.identities import Role
from potluck.wire.questions import ListNodes, NodesListed
from potluck.wire.seals import Opener, Sealer
from potluck.wire.topics import Topics
from support.brokers import mosquitto_or_skip
from support.closed import Authority
from support.eventually import eventually

TOPICS = Topics("test")
OURS, OTHERS = Authority(), Authority()
QUICK = Timings(connect_seconds=5.0, failures_limit=1, rest_seconds=0.01)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    return OURS.member(tmp_path / "node", "node", certificates.node_profile("n1"))


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    return OURS.member(tmp_path / "coordinator", "coordinator", certificates.coordinator_profile("attic"))


async def test_the_bus(tmp_path: Path, node: Path, coordinator: Path) -> None:
    mosquitto_or_skip()
    folder = OURS.member(tmp_path / "broker", "broker", certificates.broker_profile("attic"))
    members = [Member("coordinator:attic"), Member("node:n1")]
    broker = await start_closed_broker(BrokerSettings(), "127.0.0.1", (0, 0), folder, TOPICS, members)
    timings = BusTimings(connect_timeout_seconds=5.0)
    address = ("127.0.0.1", broker.port)
    try:
        buses = {
            role: MqttBus(in_turn([address]), TOPICS, Credentials.load(where, role), client_id=role, timings=timings)
            for role, where in (("node", node), ("coordinator", coordinator))
        }
        got: list[Envelope] = []
        buses["coordinator"].subscribe(TOPICS.node("+", "status"), got.append)
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(bus.run()) for bus in buses.values()]
            for bus in buses.values():
                await bus.connected(10)
            status = NodeStatus(node_id="n1", session="s", state="online")
            await buses["node"].publish(TOPICS.node("n1", "status"), status)
            await eventually(lambda: bool(got))
            assert got[0].message == status
            for task in running:
                task.cancel()
        assert await refusal(*address, Credentials.load(node, "node"), 5.0) == ""
        stranger = OTHERS.member(tmp_path / "stranger", "node", certificates.node_profile("n1"))
        assert "certificate verify failed" in await refusal(*address, Credentials.load(stranger, "node"), 5.0)
    finally:
        await broker.stop()


async def test_questions_and_commands(tmp_path: Path, node: Path, coordinator: Path) -> None:
    """On a real broker: the topic of a question names who asks, and a node takes only what the coordinator has sealed for it."""
    mosquitto_or_skip()
    folder = OURS.member(tmp_path / "broker", "broker", certificates.broker_profile("attic"))
    for name in ("ann", "bob"):
        OURS.member(tmp_path / name, "client", certificates.client_profile(name, "user"))
    members = [
        Member("coordinator:attic"),
        Member("node:n1"),
        Member("client:ann", "user"),
        Member("client:bob", "user"),
    ]
    broker = await start_closed_broker(BrokerSettings(), "127.0.0.1", (0, 0), folder, TOPICS, members)
    timings = BusTimings(connect_timeout_seconds=5.0)
    signer = Signer(new_key())
    opener = Opener("node:n1", "s1", "home-1", Verifier(signer.public_key).verify)

    def opens(topic: str, message: Sealed) -> bytes:
        return opener.open(seals.Sealed(message.seal, message.body, message.signature), topic, time.time(), 0.0)

    def bus_of(where: Path, role: Role, port: int, topics: Topics, **options: Any) -> MqttBus:
        addresses, credentials = in_turn([("127.0.0.1", port)]), Credentials.load(where, role)
        return MqttBus(addresses, topics, credentials, client_id=f"{where.name}-1", timings=timings, **options)

    try:
        daemon = bus_of(coordinator, "coordinator", broker.port, TOPICS)
        barn = bus_of(node, "node", broker.port, TOPICS)
        ann, bob = (
            bus_of(tmp_path / name, "client", broker.client_port, Topics(TOPICS.cluster, name), highest_version=version)
            for name, version in (("ann", 5), ("bob", 4))
        )
        asked: list[Envelope] = []
        told: list[Envelope] = []
        overheard: list[Envelope] = []

        def answer(envelope: Envelope) -> None:
            asked.append(envelope)
            daemon.reply_now(envelope, NodesListed(nodes=()))

        daemon.subscribe_asked({TOPICS.coordinator_inbox: answer})
        sealing = Sealing(Sealer("c1", 1, "home-1", signer.sign), TOPICS, {"n1": "s1"}.__getitem__, ForwardClock())
        daemon.seal_on(sealing.topic_filter, sealing.seal)
        barn.subscribe(TOPICS.node("n1", "inbox"), told.append)
        barn.open_on(TOPICS.node("n1", "inbox"), opens)
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(bus.run()) for bus in (daemon, barn, ann, bob)]
            for bus in (daemon, barn, ann, bob):
                await bus.connected(10)
            for bus in (ann, bob):
                found = await bus.request(bus.topics.coordinator_inbox, ListNodes(), timeout_seconds=10)
                assert isinstance(found, NodesListed)
            assert [one.caller for one in asked] == ["client:ann", "client:bob"]
            bob.subscribe(bob.topics.client_inbox("bob-1"), overheard.append)
            elsewhere = ListNodes(id="q", reply_to=bob.topics.client_inbox("bob-1"))  # also as the response topic
            await ann.publish(ann.topics.coordinator_inbox, elsewhere)
            await eventually(lambda: daemon.counters["refused_replies"] == 1)
            for number in range(3):
                assert daemon.publish_now(TOPICS.node("n1", "inbox"), ForgetJob(job_id=str(number)), qos=number % 2)
            await eventually(lambda: len(told) == 3)
            assert [one.message for one in told] == [ForgetJob(job_id=str(number)) for number in range(3)]
            await bob.request(bob.topics.coordinator_inbox, ListNodes(id="last"), timeout_seconds=10)
            assert [one.message.id for one in overheard] == ["last"]
            assert barn.counters["refused_seals"] == 0
            for task in running:
                task.cancel()
    finally:
        await broker.stop()


async def test_a_node_that_poses_as_the_broker(node: Path, tmp_path: Path) -> None:
    """It is a member, and its certificate is good: only the name that is asked for tells it apart."""
    other = OURS.member(tmp_path / "other", "node", certificates.node_profile("n2"))
    sock = socket.create_server(("127.0.0.1", 0))
    async with serve_http(sock, [], Credentials.load(other, "node")):
        port = sock.getsockname()[1]
        said = await refusal("127.0.0.1", port, Credentials.load(node, "node"), 5.0)
        assert "certificate is not valid for 'broker.potluck'" in said
        assert await is_there(base_urls("127.0.0.1", port, "https")[0], Credentials.load(node, "node"), 5.0)


async def test_bulk(node: Path, coordinator: Path, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "held", 1 << 30)
    serving, asking = Credentials.load(coordinator, "coordinator"), Credentials.load(node, "node")
    assert (serving.identity, asking.identity) == ("coordinator:attic", "node:n1")
    sock = socket.create_server(("127.0.0.1", 0))
    (url,) = base_urls("127.0.0.1", sock.getsockname()[1], serving.scheme)
    assert url.startswith("https://")
    async with serve_http(sock, server.routes(store, writable=True, max_bytes=2**20, rights=OPEN), serving):
        async with Downloader(BlobStore(tmp_path / "here", 1 << 30), asking, QUICK) as downloader:
            ref = await downloader.push(b"soup", (url,))
            assert (await downloader.fetch(ref)).read_bytes() == b"soup"
        stranger = OTHERS.member(tmp_path / "stranger", "node", certificates.node_profile("n1"))
        for other in (Credentials.load(stranger, "node"), Credentials()):
            async with Downloader(BlobStore(tmp_path / "there", 1 << 30), other, QUICK) as downloader:
                with pytest.raises(Unavailable):
                    await downloader.fetch(ref)


async def test_an_address_in_a_message_makes_no_member_speak_in_plain(node: Path, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "held", 1 << 30)
    ref = store.put_bytes(b"soup")
    sock = socket.create_server(("127.0.0.1", 0))
    (url,) = base_urls("127.0.0.1", sock.getsockname()[1], "http")
    async with serve_http(sock, server.routes(store, writable=True, max_bytes=2**20, rights=OPEN), Credentials()):
        for asking, gets in ((Credentials(), True), (Credentials.load(node, "node"), False)):
            async with Downloader(BlobStore(tmp_path / str(gets), 1 << 30), asking, QUICK) as downloader:
                found = downloader.fetch(replace(ref, holders=(url,)))
                if gets:
                    assert (await found).read_bytes() == b"soup"
                else:
                    with pytest.raises(Unavailable):
                        await found
                    with pytest.raises(Unavailable):
                        await downloader.send_inputs(b"bread", url, 1.0)
            assert await is_there(url, asking, 5.0) == gets


async def test_a_nodes_server_lets_in_only_members(node: Path, tmp_path: Path) -> None:
    served = Credentials.load(node, "node")
    client = OURS.member(tmp_path / "client", "client", certificates.client_profile("ann", "user"))
    asking = Credentials.load(client, "client")
    assert asking.server_tls is None
    sock = socket.create_server(("127.0.0.1", 0))
    (url,) = base_urls("127.0.0.1", sock.getsockname()[1], served.scheme)
    store = BlobStore(tmp_path / "held", 1 << 30)
    async with serve_http(sock, server.routes(store, writable=True, max_bytes=2**20, rights=OPEN), served):
        async with Downloader(BlobStore(tmp_path / "here", 1 << 30), asking, QUICK) as downloader:
            bread = replace(store.put_bytes(b"bread"), holders=(url,))
            assert (await downloader.fetch(bread)).read_bytes() == b"bread"
            with pytest.raises(Unavailable, match=r"coordinator\.potluck"):  # what is sent is for the coordinator alone
                await downloader.push(b"soup", (url,))
        # A client in whose place a stranger speaks: the same trust, and no certificate.
        plain = Credentials.load(client, "client")
        assert plain.client_tls is not None
        nobody = type(plain.client_tls)(plain.client_tls.protocol)
        nobody.server_name = certificates.PEER  # type: ignore[attr-defined]
        nobody.load_verify_locations(cadata=OURS.ca.decode())
        async with Downloader(
            BlobStore(tmp_path / "x", 1 << 30), Credentials("client:x", nobody, broker_tls=nobody), QUICK
        ) as downloader:
            with pytest.raises(Unavailable):
                await downloader.fetch(bread)


async def test_renewed_in_place(node: Path, coordinator: Path) -> None:
    serving, asking = Credentials.load(coordinator, "coordinator"), Credentials.load(node, "node")
    contexts = (asking.client_tls, asking.broker_tls, asking.server_tls)
    OURS.member(node, "node", certificates.node_profile("n1"))
    asking.renew(node, "node")
    assert (asking.client_tls, asking.broker_tls, asking.server_tls) == contexts
    sock = socket.create_server(("127.0.0.1", 0))
    async with serve_http(sock, [], serving):
        assert await is_there(base_urls("127.0.0.1", sock.getsockname()[1], "https")[0], asking, 5.0)


def test_folders_that_are_not_ours(node: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"client\.pem cannot be read"):
        Credentials.load(node, "client")
    (node / "coordinator.pem").write_bytes((node / "node.pem").read_bytes())
    (node / "coordinator.pem").chmod(0o600)
    with pytest.raises(InvalidSettings, match="that of node:n1, not of a coordinator"):
        Credentials.load(node, "coordinator")
    (node / "node.pem").chmod(0o640)
    with pytest.raises(InvalidSettings, match="chmod 600"):
        Credentials.load(node, "node")
    late = OURS.member(tmp_path / "late", "node", certificates.node_profile("n1"), days=7, ago_days=8)
    with pytest.raises(InvalidRequest, match="join the cluster again"):
        Credentials.load(late, "node")


@pytest.mark.parametrize("module", ["node.daemon", "coordinator.daemon", "potluck.client", "potluck.cli.start"])
def test_an_open_cluster_imports_no_cryptography(module: str) -> None:
    """It costs about 15 MB of memory."""
    code = (
        f"import sys, {module}; from potluck.credentials import Credentials; Credentials.of('node', 'n');"
        "print('cryptography' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "False"
