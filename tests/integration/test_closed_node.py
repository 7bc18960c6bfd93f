"""A node of a closed cluster, as a process: TLS on both planes, and only what its coordinator has sealed is carried out.

The test has the CA, and plays the coordinator at a real broker with rules.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import aiohttp
import pytest
from msgspec.structs import replace

from potluck import enrolment
from potluck.blobs.store import BlobStore
from potluck.bus.mqtt import Envelope, MqttBus, in_turn
from potluck.credentials import FOLDER, Credentials
from potluck.net.broker import start_closed_broker
from potluck.net.broker_rules import Member
from potluck.net.http_client import session
from potluck.security import certificates, cluster_file, contexts
from potluck.security.cluster_file import ClusterFile
from potluck.settings import BrokerSettings
from potluck.wire import codec
from potluck.wire.births import CoordinatorStatus, NodeStatus, Revoked
from potluck.wire.commands import LeaseShard
from potluck.wire.reports import LeaseTaken
from potluck.wire.tasks import ExportTask
from potluck.wire.tokens import JoinToken
from potluck.wire.values import BlobRef, Message
from support.brokers import mosquitto_or_skip
from support.closed import Authority
from support.eventually import eventually
from support.false_coordinator import admits_with, false_coordinator, refuses
from support.leader import INBOX, TOPICS, Leader
from support.node_lab import FAKE, NodeProcess


class ClosedLab:
    """A closed broker, a coordinator's connection to it, and the node n1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority()
        self.said: list[Message] = []
        self.leader = Leader(self.authority, time.time(), epoch=3)

    async def open(self, stack: AsyncExitStack) -> None:
        mosquitto_or_skip()
        where = self.authority.member(self.folder / "broker", "broker", certificates.broker_profile("attic"))
        members = [Member(name) for name in ("coordinator:attic", "node:n1", "node:n2")]
        self.broker = await start_closed_broker(
            BrokerSettings(), "127.0.0.1", (0, 0), where, TOPICS, [*members, Member("client:ann", "user")]
        )
        stack.push_async_callback(self.broker.stop)
        self.known = ClusterFile(
            cluster="test", cluster_id="cluster-id", brokers=(f"127.0.0.1:{self.broker.port}",), http=("127.0.0.1:1",),
            identity="node:n1",
        )  # fmt: skip
        own = self.authority.member(self.folder / "c", "coordinator", certificates.coordinator_profile("attic"))
        address = ("127.0.0.1", self.broker.port)
        self.bus = MqttBus(
            in_turn([address]), TOPICS, Credentials.load(own, "coordinator"), client_id="coordinator:attic"
        )
        for leaf in ("status", "outbox"):
            self.bus.subscribe(TOPICS.node("n1", leaf), self._on_message)
        running = asyncio.create_task(self.bus.run(), name="lab bus")
        stack.callback(running.cancel)
        await self.bus.connected(10)
        state = self.folder / "state" / FOLDER
        self.authority.member(state, "node", certificates.node_profile("n1"))
        cluster_file.write(state, self.known)

    def _on_message(self, envelope: Envelope) -> None:
        self.said.append(envelope.message)

    async def node(self, stack: AsyncExitStack, *arguments: str, **environment: str) -> NodeProcess:
        node = NodeProcess(
            self.folder,
            [sys.executable, *FAKE, "--state-dir", str(self.folder / "state"), "--no-discovery", *arguments],
        )
        await node.start(POTLUCK_RENEW_SECONDS="0.2", **environment)
        stack.push_async_callback(node.stop)
        return node

    async def born(self, node: NodeProcess, after: int = 0) -> NodeStatus:
        def look() -> NodeStatus | None:
            found = [one for one in self.said[after:] if isinstance(one, NodeStatus) and one.state == "online"]
            return found[-1] if found else None

        try:
            found = await eventually(look, 15)
        except AssertionError:
            raise AssertionError(node.log()) from None
        assert found is not None
        return found

    async def prove(self, *revoked: Revoked) -> None:
        self.leader.now = time.time()
        await self.bus.publish(TOPICS.coordinator_proof, self.leader.proof(*revoked), retain=True)

    async def online(self, epoch: int = 3) -> None:
        status = CoordinatorStatus(
            session=self.leader.session,
            epoch=epoch,
            state="online",
            cluster_id="cluster-id",
            http=("https://127.0.0.1:1",),
        )
        await self.bus.publish(TOPICS.coordinator_status, status, retain=True)

    def lease(self, attempt_id: str) -> LeaseShard:
        nothing = BlobRef(sha256="0" * 64, size=1, holders=("http://127.0.0.1:1",))
        task = ExportTask(model=nothing, weights=nothing)
        return LeaseShard(epoch=3, job_id="done", shard_id="shard", attempt_id=attempt_id, lease_seconds=10, task=task)

    def taken(self) -> set[str]:
        return {one.attempt_id for one in self.said if isinstance(one, LeaseTaken)}


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def test_a_node_of_a_closed_cluster(tmp_path: Path, stack: AsyncExitStack) -> None:
    lab = ClosedLab(tmp_path)
    await lab.open(stack)
    held = BlobStore(tmp_path / "state" / "blobs", 1 << 20).put_bytes(b"weights")
    node = await lab.node(stack)
    born = await lab.born(node)
    assert born.collective == ""
    assert all(one.startswith("https://") for one in born.http)

    # commands: plain, before the coordinator has proved itself, and sealed for another session, do nothing
    seal = {"session": born.session}
    await lab.bus.publish(INBOX, lab.lease("plain"))
    await lab.bus.publish(INBOX, lab.leader.command(codec.encode(lab.lease("unproved")), **seal))
    await lab.online()
    await lab.prove()
    await lab.bus.publish(INBOX, lab.lease("plain again"))
    lab.leader.now = time.time()
    await lab.bus.publish(INBOX, lab.leader.command(codec.encode(lab.lease("other session")), session="s0"))
    await lab.bus.publish(INBOX, lab.leader.command(codec.encode(lab.lease("sealed")), **seal))
    await eventually(lambda: "sealed" in lab.taken(), 10)
    assert lab.taken() == {"sealed"}

    # a forged status of a higher epoch, which nobody has proved, keeps the coordinator out no longer than it is there
    await lab.online(epoch=999)
    await lab.bus.publish(INBOX, lab.leader.command(codec.encode(lab.lease("after a forged status")), **seal))
    await eventually(lambda: "after a forged status" in lab.taken(), 10)

    # bulk: nobody without a certificate, clients no weights, members what they need
    url = f"{born.http[0]}/blobs/{held.sha256}"
    people = {}
    for name, profile in (
        ("n2", certificates.node_profile("n2")),
        ("ann", certificates.client_profile("ann", "user")),
        ("eve", certificates.client_profile("eve", "viewer")),
    ):
        role = "node" if name == "n2" else "client"
        where = lab.authority.member(tmp_path / name, role, profile)
        people[name] = Credentials.load(where, role)  # type: ignore[arg-type]
    context = contexts.trusting(lab.authority.ca, certificates.PEER)
    people["nobody"] = Credentials(client_tls=context, broker_tls=context)
    for name, status in (("n2", 200), ("ann", 404), ("eve", 403)):
        async with session(people[name], connect_seconds=5, idle_seconds=5) as http, http.get(url) as answer:
            assert answer.status == status, await answer.text()
    with pytest.raises(aiohttp.ClientError):
        async with session(people["nobody"], connect_seconds=5, idle_seconds=5) as http, http.get(url):
            pass
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            await http.get(url.replace("https", "http"))

    # a member that was removed: its connections end, also one that only waits, and new ones get nothing
    async with session(people["n2"], connect_seconds=5, idle_seconds=5) as http:
        async with http.get(url) as answer:
            await answer.read()  # the connection stays, and waits
        began = time.monotonic()
        await lab.prove(Revoked("node:n2", time.time() + 3600))

        async def refused() -> bool:
            with suppress(aiohttp.ClientError):
                async with http.get(url) as answer:
                    return answer.status == 403
            return False

        while not await refused():
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.05)
    assert "connection ended: its member was removed" in node.log()

    # after a restart, the epoch is remembered: a coordinator of an older one does not command again
    await node.stop()
    before = len(lab.said)
    old = Leader(lab.authority, time.time(), session="c0", epoch=2)
    await lab.bus.publish(TOPICS.coordinator_proof, old.proof(), retain=True)
    again = await lab.node(stack)
    born = await lab.born(again, before)
    await lab.bus.publish(INBOX, old.command(codec.encode(replace(lab.lease("old"), epoch=2)), session=born.session))
    await eventually(lambda: "proof of a coordinator refused" in again.log(), 10)
    await lab.prove()
    await lab.bus.publish(INBOX, lab.leader.command(codec.encode(lab.lease("new")), session=born.session))
    await eventually(lambda: "new" in lab.taken(), 10)
    assert "old" not in lab.taken()


async def test_a_service_joins_with_the_token_that_systemd_gives_it(tmp_path: Path, stack: AsyncExitStack) -> None:
    lab = ClosedLab(tmp_path)
    await lab.open(stack)
    shutil.rmtree(tmp_path / "state")
    given = tmp_path / "credentials"
    given.mkdir()
    admits = admits_with(brokers=lab.known.brokers)
    coordinator = await stack.enter_async_context(false_coordinator(tmp_path / "false", lab.authority, join=admits))
    fingerprint = certificates.read(lab.authority.ca).fingerprint[:16]
    (given / "join-token").write_text(JoinToken(fingerprint, (coordinator.place,), bytes(5), bytes(16)).text() + "\n")
    began = time.monotonic()
    node = await lab.node(stack, "--node-id", "n1", CREDENTIALS_DIRECTORY=str(given))
    await lab.born(node)
    assert time.monotonic() - began < 15
    where = tmp_path / "state" / FOLDER
    assert {path.name for path in where.iterdir()} == {"node.pem", "ca.crt", cluster_file.NAME, enrolment.TRIED}
    await node.stop()
    before = len(lab.said)
    # the token is used up, and nobody is asked: it was tried
    await lab.born(await lab.node(stack, "--node-id", "n1", CREDENTIALS_DIRECTORY=str(given)), before)
    assert coordinator.paths.count("/v1/join") == 1


async def test_a_member_stays_one_when_another_token_lets_it_in_no_more(tmp_path: Path, stack: AsyncExitStack) -> None:
    lab = ClosedLab(tmp_path)
    await lab.open(stack)
    coordinator = await stack.enter_async_context(
        false_coordinator(tmp_path / "false", lab.authority, join=refuses(403, "the token was used already"))
    )
    fingerprint = certificates.read(lab.authority.ca).fingerprint[:16]
    (tmp_path / "join-token").write_text(JoinToken(fingerprint, (coordinator.place,), bytes(5), bytes(16)).text())
    node = await lab.node(stack, CREDENTIALS_DIRECTORY=str(tmp_path))
    await lab.born(node)
    assert "the token was used already" in node.log()


async def test_a_service_with_a_token_that_lets_nobody_in_says_so_and_ends(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    authority = Authority()
    coordinator = await stack.enter_async_context(
        false_coordinator(tmp_path, authority, join=refuses(403, "the token was used already"))
    )
    fingerprint = certificates.read(authority.ca).fingerprint[:16]
    (tmp_path / "join-token").write_text(JoinToken(fingerprint, (coordinator.place,), bytes(5), bytes(16)).text())
    node = await ClosedLab(tmp_path).node(stack, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert await node.ended() == 2
    assert "the token was used already" in node.log()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--insecure"], "is a member of a closed cluster"),
        (["--node-id", "other"], "node_id is 'other'"),
        (["--cluster", "other"], "cluster is 'other'"),
    ],
)
async def test_a_member_never_becomes_part_of_an_open_cluster(
    tmp_path: Path, stack: AsyncExitStack, arguments: list[str], words: str
) -> None:
    authority = Authority()
    where = authority.member(tmp_path / "state" / FOLDER, "node", certificates.node_profile("n1"))
    known = ClusterFile(
        cluster="test", cluster_id="cluster-id", brokers=("127.0.0.1:1",), http=("127.0.0.1:1",), identity="node:n1"
    )
    cluster_file.write(where, known)
    node = await ClosedLab(tmp_path).node(stack, *arguments)
    assert await node.ended() == 2
    assert words in node.log()


async def test_credentials_that_have_ended_do_not_open_a_node(tmp_path: Path, stack: AsyncExitStack) -> None:
    where = tmp_path / "state" / FOLDER
    Authority().member(where, "node", certificates.node_profile("n1"), days=1, ago_days=2)
    known = ClusterFile(
        cluster="test", cluster_id="cluster-id", brokers=("127.0.0.1:1",), http=("127.0.0.1:1",), identity="node:n1"
    )
    cluster_file.write(where, known)
    node = await ClosedLab(tmp_path).node(stack)
    assert await node.ended() == 2
    assert "join the cluster again" in node.log()
