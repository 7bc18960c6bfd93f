"""A closed cluster's broker: a real mosquitto with TLS and rules, and paho's clients, which know nothing of ours."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from potluck.bus.connecting import refusal, take_over
from potluck.credentials import Credentials
from potluck.errors import CannotListen, InvalidSettings, Unavailable
from potluck.net import broker as brokers
from potluck.net import broker_rules
from potluck.net.broker import ClosedBroker, start_closed_broker
from potluck.net.broker_rules import Member
from potluck.security import certificates, contexts
from potluck.security.certificates import BROKER
from potluck.settings import BrokerSettings
from potluck.wire.topics import Topics
from support.brokers import mosquitto_or_skip
from support.closed import Authority
from support.eventually import eventually
from support.paho_peer import DENIED, DONE, Peer

TOPICS = Topics("home")


def asked_by(name: str, topic: str) -> str:
    """Where the client of this name publishes what is meant for `topic`."""
    return f"{TOPICS.root}/clients/{name}/to/{topic.removeprefix(TOPICS.root + '/')}"


MEMBERS = (
    Member("coordinator:attic"),
    Member("node:n1"),
    Member("node:n2"),
    Member("client:ann", "user"),
    Member("client:eve", "viewer"),
)
OURS, OTHERS = Authority(), Authority()
pytestmark = pytest.mark.filterwarnings(
    # When a handshake fails, paho leaves its socket to the garbage collector.
    "ignore:unclosed <ssl.SSLSocket:ResourceWarning"
)


class Cluster:
    """A closed broker and its members."""

    def __init__(self, broker: ClosedBroker, folder: Path) -> None:
        self.broker = broker
        self.folder = folder
        self._peers: list[Peer] = []

    def context(self, identity: str, authority: Authority = OURS, **dates: float) -> ssl.SSLContext:
        role, _, name = identity.partition(":")
        profile = {
            "coordinator": certificates.coordinator_profile,
            "node": certificates.node_profile,
            "client": lambda name: certificates.client_profile(name, "user"),
        }[role](name)
        where = authority.member(self.folder / f"{len(list(self.folder.iterdir()))}", role, profile, **dates)
        # Who is not of this cluster takes any CA's broker for its own.
        (where / "ca.crt").write_bytes(OURS.ca)
        return contexts.client_context(where, role, BROKER)

    def peer(self, context: ssl.SSLContext | None, client_id: str, *, clients: bool = False, **options: Any) -> Peer:
        peer = Peer(context, client_id, self.broker.client_port if clients else self.broker.port, **options)
        self._peers.append(peer)
        return peer

    async def member(self, identity: str, client_id: str = "potluck-free", **options: Any) -> Peer:
        clients = identity.startswith("client:")
        return await self.peer(self.context(identity), client_id, clients=clients, **options).connected()

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    mosquitto_or_skip()
    folder = tmp_path / "broker"
    OURS.member(folder, "broker", certificates.broker_profile("attic"))
    broker = await start_closed_broker(BrokerSettings(), "127.0.0.1", (0, 0), folder, TOPICS, MEMBERS)
    members = tmp_path / "members"
    members.mkdir()
    found = Cluster(broker, members)
    try:
        yield found
    finally:
        found.close()
        await broker.stop()


async def test_who_is_not_let_in(cluster: Cluster) -> None:
    contexts_of = {
        "expired": cluster.context("node:n1", days=7, ago_days=8),
        "another CA": cluster.context("node:n1", OTHERS),
        "plain text": None,
    }
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    contexts_of["no certificate"] = nobody
    early = cluster.context("node:n1")
    early.minimum_version = early.maximum_version = ssl.TLSVersion.TLSv1_2
    contexts_of["TLS 1.2"] = early
    for why, context in contexts_of.items():
        for clients in (False, True):
            peer = cluster.peer(context, "potluck-x", clients=clients)
            await eventually(lambda peer=peer: peer.ended)  # type: ignore[misc]
            assert not peer.answer, why
    await cluster.member("node:n1")


async def test_a_node_writes_only_its_topics(cluster: Cluster) -> None:
    n1 = await cluster.member("node:n1")
    await n1.subscribe(TOPICS.node("n1", "status"))
    for leaf in ("status", "capacity", "telemetry", "outbox"):
        assert await n1.publish(TOPICS.node("n1", leaf)) == DONE
        assert await n1.publish(TOPICS.node("n2", leaf), retain=True) == DENIED
    await eventually(lambda: n1.got == [(TOPICS.node("n1", "status"), b"x")])
    for topic in (
        TOPICS.node("n1", "inbox"), TOPICS.node("n2", "inbox"), TOPICS.jobs_submit, TOPICS.coordinator_status, TOPICS.coordinator_inbox,
        TOPICS.client_inbox("ann"), "anything", "$SYS/broker/version",
    ):  # fmt: skip
        assert await n1.publish(topic) == DENIED


async def test_nobody_reads_anothers_inbox_by_a_wildcard(cluster: Cluster) -> None:
    coordinator = await cluster.member("coordinator:attic")
    n1, ann = await cluster.member("node:n1"), await cluster.member("client:ann")
    await n1.subscribe("#", TOPICS.node("+", "inbox"), TOPICS.node("n2", "inbox"), f"{TOPICS.root}/clients/#")
    await ann.subscribe("#", f"{TOPICS.root}/clients/+/+/inbox", f"{TOPICS.root}/nodes/#")
    for topic in (TOPICS.node("n2", "inbox"), f"{TOPICS.root}/clients/eve/s/inbox", TOPICS.node("n2", "outbox")):
        assert await coordinator.publish(topic, b"secret") == DONE
    for topic in (TOPICS.node("n1", "inbox"), f"{TOPICS.root}/clients/ann/s/inbox"):
        assert await coordinator.publish(topic, b"last") == DONE
    for peer, own in ((n1, TOPICS.node("n1", "inbox")), (ann, f"{TOPICS.root}/clients/ann/s/inbox")):
        await eventually(lambda peer=peer: bool(peer.got))  # type: ignore[misc]
        assert set(peer.got) == {(own, b"last")}


async def test_a_will_on_anothers_topic_is_not_sent(cluster: Cluster) -> None:
    coordinator = await cluster.member("coordinator:attic")
    await coordinator.subscribe(TOPICS.node("+", "status"))
    forger = await cluster.member("node:n2", will=TOPICS.node("n1", "status"))
    forger.drop()
    honest = await cluster.member("node:n1", will=TOPICS.node("n1", "status"))
    await eventually(lambda: forger.ended)
    honest.drop()
    await eventually(lambda: bool(coordinator.got))
    assert coordinator.got == [(TOPICS.node("n1", "status"), b"will")]


async def test_what_clients_may(cluster: Cluster) -> None:
    ann, eve = await cluster.member("client:ann"), await cluster.member("client:eve", "potluck-eve-1")
    for client, name in ((ann, "ann"), (eve, "eve")):  # a viewer too: the coordinator tells it what it may not
        for topic in (TOPICS.jobs_submit, TOPICS.infer("soup")):
            assert await client.publish(asked_by(name, topic)) == DONE
        assert await client.publish(asked_by(name, TOPICS.coordinator_inbox)) == DONE
    for topic in (
        TOPICS.jobs_submit,
        asked_by("eve", TOPICS.coordinator_inbox),
        TOPICS.node("n1", "inbox"),
    ):
        assert await ann.publish(topic) == DENIED


async def test_one_client_may_connect_twice_and_no_node(cluster: Cluster) -> None:
    one, two = await cluster.member("client:ann", "potluck-ann-1"), await cluster.member("client:ann", "potluck-ann-2")
    assert await one.publish(asked_by("ann", TOPICS.jobs_submit)) == DONE
    assert not two.ended
    await eventually(lambda: cluster.broker.client_ids.get("potluck-ann-2") == "client:ann")
    first = await cluster.member("node:n1", "potluck-one")
    await cluster.member("node:n1", "potluck-two")
    await eventually(lambda: first.ended)


@pytest.mark.parametrize("taken", ["node:n1", "coordinator:attic", ""])
async def test_no_client_takes_the_id_of_a_daemon(cluster: Cluster, taken: str) -> None:
    """Its connection would end, and its will be sent."""
    n1, coordinator = await cluster.member("node:n1"), await cluster.member("coordinator:attic")
    for identity in ("client:eve", "node:n2"):
        thief = cluster.peer(cluster.context(identity), taken, clients=True)
        await eventually(lambda thief=thief: thief.ended)
        assert thief.answer != DONE
    assert not n1.ended
    assert not coordinator.ended


async def test_on_the_others_port_nobody_has_rights(cluster: Cluster) -> None:
    node = await cluster.peer(cluster.context("node:n1"), "potluck-free", clients=True).connected()
    assert await node.publish(TOPICS.node("n1", "outbox")) == DENIED
    ann = await cluster.peer(cluster.context("client:ann"), "potluck-free").connected()
    assert await ann.publish(asked_by("ann", TOPICS.jobs_submit)) == DENIED


async def test_a_stranger_with_a_certificate_has_no_rights(cluster: Cluster) -> None:
    """As after a revocation: the certificate is still valid."""
    for identity in ("node:n3", "client:n1", "client:bob"):
        peer = await cluster.member(identity)
        for topic in (TOPICS.node("n3", "outbox"), TOPICS.node("n1", "outbox"), "anything"):
            assert await peer.publish(topic) == DENIED


async def test_no_rules_at_all_is_nothing_allowed(cluster: Cluster) -> None:
    """mosquitto allows everything where it knows no rule."""
    ann, n1 = await cluster.member("client:ann"), await cluster.member("node:n1")
    await cluster.broker.allow(())
    assert await ann.publish(asked_by("ann", TOPICS.jobs_submit)) == DENIED
    assert await n1.publish(TOPICS.node("n1", "outbox")) == DENIED


async def test_who_is_revoked_is_cut_off(cluster: Cluster) -> None:
    n1, n2 = await cluster.member("node:n1", will=TOPICS.node("n1", "status")), await cluster.member("node:n2")
    coordinator = await cluster.member("coordinator:attic")
    await coordinator.subscribe(TOPICS.node("+", "status"))
    await n1.subscribe(TOPICS.node("n1", "inbox"))
    async with asyncio.timeout(5):
        await cluster.broker.allow(member for member in MEMBERS if member.identity != "node:n1")
        assert await n1.publish(TOPICS.node("n1", "outbox")) == DENIED
        await coordinator.publish(TOPICS.node("n1", "inbox"), b"secret")
        ours = cluster.context("node:n1", days=60 / 86400)
        await take_over(("127.0.0.1", cluster.broker.port), Credentials("node:n1", ours, ours), "node:n1", 5)
        await eventually(lambda: n1.ended)
    assert not n1.got
    assert await n2.publish(TOPICS.node("n2", "status")) == DONE
    await eventually(lambda: bool(coordinator.got))
    assert coordinator.got == [(TOPICS.node("n2", "status"), b"x")], "no will came"


async def test_a_session_of_a_client_is_ended_by_its_id(cluster: Cluster, unused_tcp_port: int) -> None:
    one, two = await cluster.member("client:ann", "potluck-ann-1"), await cluster.member("client:ann", "potluck-ann-2")
    ours = cluster.context("client:ann")
    await take_over(
        ("127.0.0.1", cluster.broker.client_port), Credentials("client:ann", ours, ours), "potluck-ann-2", 5
    )
    await eventually(lambda: two.ended)
    assert not one.ended
    with pytest.raises(Unavailable, match="potluck-ann-2 could not be taken over"):
        await take_over(("127.0.0.1", unused_tcp_port), Credentials("client:ann", ours, ours), "potluck-ann-2", 5)


async def test_many_changes_are_few_reloads(cluster: Cluster) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.gather(*(cluster.broker.allow((*MEMBERS, Member(f"node:m{number}"))) for number in range(40)))
    assert loop.time() - began < 5, "forty reloads, one after the other, would take eight seconds"
    last = await cluster.member("node:m39")
    assert await last.publish(TOPICS.node("m39", "outbox")) == DONE


async def test_who_is_left_out_does_not_come_back_with_an_older_list(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first change is slow, and whoever asked for it gave up."""
    n1, write = await cluster.member("node:n1"), brokers._write_rules

    def slow(*arguments: Any) -> None:
        if len(arguments[-1]) == len(MEMBERS):
            time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(brokers, "_write_rules", slow)
    older = asyncio.create_task(cluster.broker.allow(MEMBERS))
    await asyncio.sleep(0)
    newer = asyncio.create_task(cluster.broker.allow(MEMBERS[:1]))
    older.cancel()
    await newer
    assert await n1.publish(TOPICS.node("n1", "outbox")) == DENIED
    assert older.cancelled()


async def test_a_certificate_that_the_broker_refuses_is_no_accepted_connection(cluster: Cluster) -> None:
    good, other = cluster.context("node:n1"), cluster.context("node:n1", OTHERS)
    for context, said in ((good, ""), (other, "alert unknown ca")):
        answer = await refusal("127.0.0.1", cluster.broker.port, Credentials("node:n1", context, context), 5)
        assert said in answer.lower().replace("_", " ")
        assert bool(answer) == bool(said)


async def test_rules_of_thousands_that_change_at_once_all_count(cluster: Cluster) -> None:
    """mosquitto reads such rules for half a second, and forgets what it is told meanwhile."""
    many = [Member(f"node:m{number}") for number in range(4000)]
    n1, n2 = await cluster.member("node:n1"), await cluster.member("node:n2")
    await cluster.broker.allow((*MEMBERS, *many))
    await cluster.broker.allow((*(one for one in MEMBERS if one.identity != "node:n1"), *many))
    assert await n1.publish(TOPICS.node("n1", "outbox")) == DENIED
    assert await n2.publish(TOPICS.node("n2", "outbox")) == DONE


async def test_mqtt_3_1_1_is_told_nothing_but_may_nothing(cluster: Cluster) -> None:
    coordinator, old = await cluster.member("coordinator:attic"), await cluster.member("node:n1", version=4)
    await coordinator.subscribe(TOPICS.node("+", "outbox"))
    assert await old.publish(TOPICS.node("n2", "outbox"), b"forged") == DONE
    assert await old.publish(TOPICS.node("n1", "outbox"), b"own") == DONE
    await eventually(lambda: bool(coordinator.got))
    assert coordinator.got == [(TOPICS.node("n1", "outbox"), b"own")]


@pytest.mark.parametrize("file", [broker_rules.NODE_RULES, broker_rules.CLIENT_RULES])
@pytest.mark.parametrize("damage", [None, b"user\nnonsense here\n", b"topic\n"])
async def test_it_ends_when_its_rules_are_broken(cluster: Cluster, file: str, damage: bytes | None) -> None:
    path = cluster.folder.parent / "broker" / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    os.kill(cluster.broker.pid, signal.SIGHUP)
    await asyncio.wait_for(cluster.broker.wait(), 2)
    await eventually(lambda: "acl" in cluster.broker.fault)
    with pytest.raises(Unavailable, match="new rules"):
        await cluster.broker.allow(MEMBERS)


async def test_a_name_in_the_log_ends_nothing(cluster: Cluster) -> None:
    """A client chooses its id, and the broker's log has it."""
    evil = "potluck-Error: Unable to open acl_file config"
    await cluster.member("client:ann", evil)
    await eventually(lambda: cluster.broker.client_ids.get(evil) == "client:ann")
    forged = "potluck-x (p5, c1, k20, u'client:eve')"
    peer = await cluster.member("client:ann", forged)
    await eventually(lambda: cluster.broker.client_ids.get(forged) == "client:ann")
    assert await peer.publish(asked_by("ann", TOPICS.jobs_submit)) == DONE
    assert not cluster.broker.fault
    peer.close()
    await eventually(lambda: forged not in cluster.broker.client_ids)


async def test_a_line_of_the_log_cannot_be_made_up(cluster: Cluster) -> None:
    """mosquitto cuts its lines at 999 bytes, and so a client with a long id chooses how they end."""
    ids = cluster.broker.client_ids
    await cluster.member("client:ann", "potluck-ann-1")
    await eventually(lambda: ids.get("potluck-ann-1") == "client:ann")
    gone = await cluster.member("client:eve", "potluck-ann-1 disconnected" + "x" * 1000)
    gone.close()
    two_lines = cluster.peer(
        cluster.context("client:eve"), "potluck-x\n1: Error: Unable to open acl_file", clients=True
    )
    await eventually(lambda: two_lines.ended)
    for name in ("potluck-ann-1 disconnected", "potluck-ann-1 disconnected: x"):
        # The second with this id: mosquitto logs that it is connected already.
        for _ in range(2):
            last = await cluster.member("client:eve", name)
            await eventually(lambda name=name: ids.get(name) == "client:eve")
        last.close()
        await eventually(lambda name=name: name not in ids)
    await cluster.member("client:eve", "potluck-eve-1")
    await eventually(lambda: ids.get("potluck-eve-1") == "client:eve")
    assert ids == {"potluck-ann-1": "client:ann", "potluck-eve-1": "client:eve"}
    assert not cluster.broker.fault


async def test_a_renewed_certificate_is_shown_and_connections_stay(cluster: Cluster) -> None:
    def shown() -> bytes:
        context = cluster.context("node:n2")
        with socket.create_connection(("127.0.0.1", cluster.broker.port)) as plain, context.wrap_socket(plain) as sock:
            return sock.getpeercert(binary_form=True) or b""

    n1, before = await cluster.member("node:n1"), await asyncio.to_thread(shown)
    OURS.member(cluster.folder.parent / "broker", "broker", certificates.broker_profile("attic"))
    await cluster.broker.reload()
    assert await asyncio.to_thread(shown) != before
    assert await n1.publish(TOPICS.node("n1", "outbox")) == DONE
    assert not n1.ended


@pytest.mark.parametrize("damage", [None, b"no certificate"])
async def test_a_broken_certificate_ends_nothing(cluster: Cluster, damage: bytes | None) -> None:
    path = cluster.folder.parent / "broker" / broker_rules.CERTIFICATE
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    await cluster.broker.reload()
    n1 = await cluster.member("node:n1")
    assert await n1.publish(TOPICS.node("n1", "outbox")) == DONE
    assert not cluster.broker.fault


async def test_a_node_that_poses_as_the_broker_is_refused(tmp_path: Path) -> None:
    mosquitto_or_skip()
    for number, (authority, profile) in enumerate(
        ((OURS, certificates.node_profile("n2")), (OTHERS, certificates.broker_profile("attic")))
    ):
        folder = authority.member(tmp_path / f"false-{number}", "broker", profile)
        false = await start_closed_broker(BrokerSettings(), "127.0.0.1", (0, 0), folder, TOPICS, MEMBERS)
        members = tmp_path / f"members-{number}"
        members.mkdir()
        cluster = Cluster(false, members)
        peer = cluster.peer(cluster.context("node:n1"), "potluck-x")
        assert "CERTIFICATE_VERIFY_FAILED" in peer.error
        await false.stop()


async def test_what_cannot_be_a_closed_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(mode: Any) -> ClosedBroker:
        return await start_closed_broker(BrokerSettings(mode=mode), "127.0.0.1", (0, 0), tmp_path, TOPICS, MEMBERS)

    for mode in ("external", "embedded"):
        with pytest.raises(InvalidSettings, match="closed cluster needs a mosquitto of its own"):
            await start(mode)
    monkeypatch.setattr(brokers, "find_mosquitto", lambda: None)
    with pytest.raises(Unavailable, match="apt install mosquitto"):
        await start("auto")


@pytest.mark.parametrize(("which", "option"), [(0, "`potluck up --broker-port`"), (1, "broker.client_port")])
async def test_a_taken_port_names_the_option_for_it(which: int, option: str, tmp_path: Path) -> None:
    mosquitto_or_skip()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = [0, 0]
        ports[which] = server.getsockname()[1]
        with pytest.raises(CannotListen, match=f"is taken .*: choose another one with {option}"):
            await start_closed_broker(BrokerSettings(), "127.0.0.1", (ports[0], ports[1]), tmp_path, TOPICS, MEMBERS)
