"""A closed cluster is founded, machines join it over HTTPS, renew, and are removed: with a real mosquitto and real TLS."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from msgspec.structs import replace

from coordinator.identities import founding
from coordinator.identities.joining import RENEWALS
from coordinator.identities.tries import EACH
from potluck.bus.mqtt import Envelope, MqttBus, in_turn
from potluck.credentials import Credentials
from potluck.errors import NotAuthenticated, NotFound, Unavailable
from potluck.security import certificates, contexts
from potluck.security.certificates import COORDINATOR
from potluck.settings import BusTimings
from potluck.wire import joining, tokens
from potluck.wire.births import NodeTelemetry
from potluck.wire.joining import BODY_LIMIT_BYTES, CA_PATH, JOIN_PATH, RENEW_PATH, Joined
from potluck.wire.members import (
    BearerCreated,
    CreateBearer,
    CreateToken,
    ListMembers,
    MembersListed,
    RemoveMember,
    RemoveToken,
)
from potluck.wire.roles import Caller
from potluck.wire.topics import Topics
from support.brokers import mosquitto_or_skip
from support.eventually import eventually
from support.joined import ADMIN, Cluster, cluster

TOPICS = Topics("test")
KEY = certificates.new_key()


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Cluster]:
    mosquitto_or_skip()
    async with cluster(tmp_path) as found:
        yield found


async def test_a_machine_joins_with_a_token(home: Cluster) -> None:
    token = await home.token()
    found = tokens.parse(token)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=contexts.blind(COORDINATOR))) as session:
        async with session.get(home.url + CA_PATH) as answer:
            ca = await answer.read()
    assert certificates.read(ca).fingerprint[:16] == found.fingerprint
    assert f"https://{found.endpoints[0]}" == home.url

    joined, where = await home.join(token, "kitchen")
    assert joined.identity == "node:kitchen"
    assert joined.brokers == (f"127.0.0.1:{home.closed.broker.port}",)
    shown = certificates.check(joined.certificate.encode(), ca, time.time())
    assert (shown.identity, shown.organization) == ("node:kitchen", joined.cluster_id)

    # the answer came when the broker had its rules already
    async with on_the_bus(home, where, "node") as bus:
        got: list[Envelope] = []
        bus.subscribe(TOPICS.node("kitchen", "telemetry"), got.append)
        await bus.connected(5)
        await bus.publish(TOPICS.node("kitchen", "telemetry"), telemetry())
        await eventually(lambda: bool(got))


async def test_a_client_has_the_role_of_its_token(home: Cluster) -> None:
    joined, where = await home.join(await home.token(role="viewer"), "eve")
    assert joined.brokers == (f"127.0.0.1:{home.closed.broker.client_port}",)
    assert certificates.read(joined.certificate.encode()).unit == "viewer"
    assert home.closed.role_of("client:eve") == "viewer"
    assert Credentials.load(where, "client").identity == "client:eve"


async def test_the_operator_of_the_machine_may_command(home: Cluster) -> None:
    operator = Credentials.load(home.folder / founding.OPERATOR, "client")
    assert home.closed.role_of(operator.identity) == "operator"
    where = home.folder / founding.OPERATOR
    async with on_the_bus(home, where, "client") as bus:
        await bus.connected(5)


async def test_what_lets_nobody_in(home: Cluster) -> None:
    once, named = await home.token(), await home.token(name="cellar")
    short, gone = await home.token(ttl_seconds=0.01), await home.token()
    await home.join(once, "kitchen")
    await home.closed.questions.answer(RemoveToken(token_id=tokens.parse(gone).token_id.hex()), ADMIN)
    await eventually(lambda: len(home.closed.known.members.token_infos(time.time())) == 1)  # only `named`
    for token, name, status, why in (
        (once, "attic", 403, "used up"),
        (named, "attic", 403, "for 'cellar' only"),
        (await home.token(), "kitchen", 409, "a member already"),
        (short, "attic", 403, "expired"),
        (gone, "attic", 401, "does not let anybody in"),
    ):
        assert (await home.ask_to_join(token, name, KEY))[0] == status, why
        assert why in home.said[-1]["error"]
    for change in ({"secret": "0" * 32}, {"token_id": "0" * 10}):
        assert (await home.ask_to_join(named, "cellar", KEY, **change))[0] == 401
    for body in (b"", b"[]", b'{"secret":1}', b"\xff" * 100):
        assert (await home.post(JOIN_PATH, body, home.trusting()))[0] == 400
    assert (await home.ask_to_join(named, "cellar", KEY, request="-----BEGIN NONSENSE-----"))[0] == 400
    assert (await home.post(JOIN_PATH, b" " * (BODY_LIMIT_BYTES + 1), home.trusting()))[0] == 413
    # and none of this used the token
    await home.join(named, "cellar")


async def test_bodies_have_limits(home: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, port = home.url.removeprefix("https://").partition(":")

    async def answered(head: str, body: bytes = b"") -> str:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=home.trusting())
        writer.write(f"POST {JOIN_PATH} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
        async with asyncio.timeout(3):
            line = await reader.readline()
        writer.close()
        return line.decode().split()[1]

    large = BODY_LIMIT_BYTES + 1
    assert await answered(f"Content-Length: {large}") == "413", "before any of it came"
    assert await answered("Transfer-Encoding: chunked", f"{large:x}\r\n".encode() + b" " * large + b"\r\n") == "413"
    monkeypatch.setattr("coordinator.identities.joining.BODY_SECONDS", 0.2)
    assert await answered("Content-Length: 100", b"{") == "408"


async def test_strangers_who_send_slowly_keep_nobody_out(home: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.identities.joining.AT_ONCE", 2)
    monkeypatch.setattr("coordinator.identities.joining.BODIES_EACH", 3)
    token = await home.token(uses=2)
    _, where = await home.join(token, "kitchen")
    host, _, port = home.url.removeprefix("https://").partition(":")
    slow = []
    for number in range(1, 4):
        _, writer = await asyncio.open_connection(
            host, int(port), ssl=home.trusting(), local_addr=("127.0.0.2", 0), server_hostname="x"
        )
        slow.append(writer)
        writer.write(f"POST {JOIN_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        await eventually(lambda number=number: home.closed.joining.coming == number)  # type: ignore[misc]
    assert (await home.renew(where, "node", KEY))[0] == 200
    await home.join(token, "attic")
    connector = aiohttp.TCPConnector(ssl=home.trusting(), local_addr=("127.0.0.2", 0))
    async with aiohttp.ClientSession(connector=connector) as session:
        async with session.post(home.url + JOIN_PATH, data=b"{") as answer:
            assert answer.status == 429, "they may only have so many"
    for writer in slow:
        writer.transport.abort()
    await eventually(lambda: home.closed.joining.coming == 0)


async def test_an_answer_comes_when_it_is_on_the_disk_and_in_the_rules(
    home: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noting(name: str, inner: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def noted(*given: Any) -> None:
            await inner(*given)
            done.append(name)

        return noted

    token = await home.token()
    monkeypatch.setattr(home.journal, "sync", noting("disk", home.journal.sync))
    monkeypatch.setattr(home.closed.broker, "allow", noting("rules", home.closed.broker.allow))
    _, where = await home.join(token, "kitchen")
    assert done == ["disk", "rules"]
    assert (await home.renew(where, "node", KEY))[0] == 200
    assert done == ["disk", "rules", "disk"], "it has its rights already"
    await home.closed.questions.answer(RemoveMember(identity="node:kitchen"), ADMIN)
    assert done == ["disk", "rules", "disk", "disk", "rules"]


async def test_a_lost_answer_is_given_again_and_counts_once(home: Cluster) -> None:
    token = await home.token(uses=2)
    first, again = [await home.ask_to_join(token, "kitchen", KEY) for _ in range(2)]
    assert (first[0], again[0]) == (200, 200)
    one, two = (joining.decode(answer[1], Joined) for answer in (first, again))
    assert one.identity == two.identity == "node:kitchen"
    assert (
        certificates.read(one.certificate.encode()).public_key == certificates.read(two.certificate.encode()).public_key
    )
    assert [one.uses_left for one in home.closed.known.members.token_infos(time.time())] == [1]
    assert (await home.ask_to_join(token, "attic", KEY))[0] == 403
    assert "has joined as node:kitchen" in home.said[-1]["error"]


async def test_a_guess_is_slowed_down_and_a_right_token_of_another_address_is_not(home: Cluster) -> None:
    token = await home.token()
    for _ in range(EACH):
        assert (await home.ask_to_join(token, "kitchen", KEY, secret="0" * 32))[0] == 401
    status, _, headers = await home.ask_to_join(token, "kitchen", KEY, secret="0" * 32)
    assert status == 429
    assert 0 < int(headers["Retry-After"]) <= 60
    # from now on, it is not even looked at
    assert (await home.ask_to_join(token, "kitchen", KEY))[0] == 429
    for number in range(60):
        home.closed.joining.tries.wrong(f"10.0.0.{number}", time.monotonic())
    connector = aiohttp.TCPConnector(ssl=home.trusting(), local_addr=("127.0.0.2", 0))
    found = tokens.parse(token)
    right = joining.JoinRequest(
        found.token_id.hex(), found.secret.hex(), certificates.signing_request(KEY).decode(), "kitchen"
    )
    async with aiohttp.ClientSession(connector=connector) as session:
        for secret, expected in (("1" * 32, 429), (found.secret.hex(), 200)):
            body = joining.encode(joining.JoinRequest(right.token_id, secret, right.request, right.name))
            async with session.post(home.url + JOIN_PATH, data=body) as answer:
                assert answer.status == expected


async def test_a_certificate_is_renewed_by_the_one_before(home: Cluster) -> None:
    _, where = await home.join(await home.token(), "kitchen")
    members = home.closed.known.members.known
    members["node:kitchen"] = replace(members["node:kitchen"], certificate_until=time.time() + 60)
    key = certificates.new_key()
    status, data = await home.renew(where, "node", key)
    assert status == 200
    renewed = joining.decode(data, Joined)
    shown = certificates.check(renewed.certificate.encode(), home.closed.authority.ca, time.time())
    assert shown.identity == "node:kitchen"
    assert shown.public_key == certificates.public_key_of(key)
    assert members["node:kitchen"].certificate_until == shown.not_after

    body = joining.encode(joining.RenewRequest(certificates.signing_request(key).decode()))
    assert (await home.post(RENEW_PATH, body, home.trusting()))[0] == 401
    made = await home.closed.questions.answer(CreateBearer(name="bot", role="operator"), ADMIN)
    assert isinstance(made, BearerCreated)
    headers = {"Authorization": f"Bearer {made.bearer}"}
    assert (await home.post(RENEW_PATH, body, home.trusting(), headers))[0] == 401, "it has no certificate to renew"
    # the coordinator's own certificate is nobody's
    assert (await home.renew(home.folder / founding.IDENTITY, "coordinator", key))[0] == 403
    statuses = [(await home.renew(where, "node", key))[0] for _ in range(RENEWALS)]
    assert statuses == [200] * (RENEWALS - 1) + [429]


async def test_a_removed_node_is_cut_off_within_seconds(home: Cluster) -> None:
    _, where = await home.join(await home.token(), "kitchen")
    revoked: list[str] = []
    home.closed.publish_proof = lambda: revoked.extend(
        one.identity for one in home.closed.known.members.revoked(time.time())
    )
    running = asyncio.create_task(home.closed.rules.run())
    async with on_the_bus(home, where, "node") as bus, on_the_bus(home, coordinator(home), "coordinator") as ours:
        got: list[Envelope] = []
        ours.subscribe(TOPICS.node("+", "telemetry"), got.append)
        await bus.connected(5)
        await ours.connected(5)
        await bus.publish(TOPICS.node("kitchen", "telemetry"), telemetry())
        await eventually(lambda: bool(got))
        connects = bus.counters["connects"]

        began = time.monotonic()
        await home.closed.questions.answer(RemoveMember(identity="node:kitchen"), ADMIN)
        assert revoked == ["node:kitchen"]
        # it comes back, because its certificate is valid still: without any right
        await eventually(lambda: bus.counters["connects"] > connects)
        assert time.monotonic() - began < 10
        with pytest.raises(Unavailable, match="refused the message"):
            await bus.publish(TOPICS.node("kitchen", "telemetry"), telemetry())
        assert len(got) == 1
        await eventually(lambda: home.closed.rules.lingering == 1)
        assert "potluck_removed_connections 1" in home.closed.metrics()

    status, _ = await home.renew(where, "node", certificates.new_key())
    assert status == 401
    assert (await home.ask_to_join(await home.token(), "kitchen", KEY))[0] == 403
    assert "was removed" in home.said[-1]["error"]
    assert home.closed.role_of("node:kitchen") is None
    listed = await home.closed.questions.answer(ListMembers(), ADMIN)
    assert isinstance(listed, MembersListed)
    assert [one.identity for one in listed.members if one.removed_at] == ["node:kitchen"]
    running.cancel()
    await asyncio.wait([running])


async def test_every_connection_of_a_removed_client_ends(home: Cluster) -> None:
    _, where = await home.join(await home.token(role="user"), "ann")
    first, second = on_the_bus(home, where, "client", "one"), on_the_bus(home, where, "client", "two")
    async with first as one, second as two:
        await one.connected(5)
        await two.connected(5)
        await eventually(lambda: list(home.closed.broker.client_ids.values()).count("client:ann") == 2)
        counted = [bus.counters["connects"] for bus in (one, two)]
        await home.closed.questions.answer(RemoveMember(identity="client:ann"), ADMIN)
        await eventually(lambda: [bus.counters["connects"] for bus in (one, two)] > counted)
    with pytest.raises(NotFound):
        await home.closed.questions.answer(RemoveMember(identity="client:bob"), ADMIN)


async def test_whoever_had_a_name_before_does_not_get_its_rights_again(home: Cluster) -> None:
    """mosquitto keeps connections for longer than their certificates last, and judges by names: those of two machines are the same."""
    _, where = await home.join(await home.token(role="user"), "ann")
    async with on_the_bus(home, where, "client") as former:
        await former.connected(5)
        await home.closed.questions.answer(RemoveMember(identity="client:ann"), ADMIN)
        await eventually(lambda: former.counters["connects"] == 2)  # it came back, without rights
        await eventually(lambda: "client:ann" in home.closed.broker.client_ids.values())
        table = home.closed.known.members
        table.known["client:ann"] = replace(table.known["client:ann"], certificate_until=1.0)  # a week later
        await home.join(await home.token(role="operator"), "ann")
        await eventually(lambda: former.counters["connects"] == 3)


async def test_a_removal_is_told_also_while_the_broker_takes_no_rules(
    home: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ann", "bob"):
        await home.join(await home.token(role="operator"), name)
    made = await home.closed.questions.answer(CreateBearer(name="bot"), Caller("client:ann", "operator"))
    assert isinstance(made, BearerCreated)
    told: list[str] = []

    async def removed(identity: str) -> None:
        told.append(identity)

    async def busy(members: object) -> None:
        raise Unavailable("the broker is busy")

    home.closed.on_removed = removed
    monkeypatch.setattr(home.closed.broker, "allow", busy)
    with pytest.raises(Unavailable, match="busy"):
        await home.closed.questions.answer(RemoveMember(identity="client:ann"), ADMIN)
    assert told == ["client:ann", "client:bot"]


async def test_what_a_removed_operator_asked_for_just_before_is_not_made(home: Cluster) -> None:
    """Its question was let in, and then the one that removes it was carried out first."""
    await home.join(await home.token(role="operator"), "ann")
    await home.closed.questions.answer(RemoveMember(identity="client:ann"), ADMIN)
    for question in (CreateToken(role="operator"), CreateBearer(name="bot", role="operator")):
        with pytest.raises(NotAuthenticated, match="any more"):
            await home.closed.questions.answer(question, Caller("client:ann", "operator"))
    assert "client:bot" not in home.closed.known.members.known


async def test_a_request_of_a_removed_member_is_broken_off(home: Cluster) -> None:
    """A slow upload, or an answer that goes on for hours."""
    _, where = await home.join(await home.token(), "kitchen")
    context = contexts.client_context(where, "node", COORDINATOR)
    host, _, port = home.url.removeprefix("https://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    writer.write(b"POST /v1/renew HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await eventually(lambda: home.closed.visitors.here("node:kitchen"))
    await home.closed.questions.answer(RemoveMember(identity="node:kitchen"), ADMIN)
    async with asyncio.timeout(2):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    writer.close()


async def test_an_answer_ends_with_what_let_its_reader_in(home: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events may be followed for months, and a token is good for an hour."""
    monkeypatch.setattr("coordinator.identities.closed.CHECK_SECONDS", 0.05)
    _, where = await home.join(await home.token(), "kitchen")
    host, _, port = home.url.removeprefix("https://").partition(":")
    context = contexts.client_context(where, "node", COORDINATOR)
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    writer.write(b"POST /v1/renew HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await eventually(lambda: home.closed.visitors.here("node:kitchen"))
    keeping = asyncio.create_task(home.closed.keep_certificates())
    table = home.closed.known.members
    table.known["node:kitchen"] = replace(table.known["node:kitchen"], certificate_until=1.0)
    async with asyncio.timeout(3):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    writer.close()
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_members_stay_over_a_restart_and_removed_ones_stay_away(tmp_path: Path) -> None:
    mosquitto_or_skip()
    async with cluster(tmp_path) as home:
        token = await home.token(uses=3)
        _, where = await home.join(token, "kitchen")
        await home.join(token, "attic")
        await home.closed.questions.answer(RemoveMember(identity="node:attic"), ADMIN)
    async with cluster(tmp_path) as home:
        assert home.closed.role_of("node:kitchen") == "node"
        assert home.closed.role_of("node:attic") is None
        assert [one.identity for one in home.closed.known.members.revoked(time.time())] == ["node:attic"]
        assert [one.uses_left for one in home.closed.known.members.token_infos(time.time())] == [1]
        async with on_the_bus(home, where, "node") as bus:
            await bus.connected(5)
        assert (await home.renew(where, "node", KEY))[0] == 200


async def test_a_member_whose_certificate_ended_has_no_rights(home: Cluster) -> None:
    await home.join(await home.token(), "kitchen")
    rules = home.folder / founding.BROKER / "acl.nodes"
    assert "user node:kitchen" in rules.read_text()
    running = asyncio.create_task(home.closed.rules.run())
    home.closed.known.clock = lambda: time.time() + 8 * 86400
    await eventually(lambda: "user node:kitchen" not in rules.read_text())
    running.cancel()
    await asyncio.wait([running])


async def test_our_own_certificates_are_renewed_in_use(home: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(port: int) -> bytes:
        pem = ssl.get_server_certificate(("127.0.0.1", port))
        return certificates.read(pem.encode()).public_key

    ports = home.closed.broker.port, int(home.url.rpartition(":")[2])
    # both say who they are to whoever asks, before they want a certificate
    before = [await asyncio.to_thread(shown, port) for port in ports]
    proofs: list[None] = []
    home.closed.publish_proof = lambda: proofs.append(None)
    signed = home.closed.proof().certificate
    await home.closed.renew_own()
    assert not proofs, "none is due"
    later = time.time() + 5 * 86400
    monkeypatch.setattr("coordinator.identities.founding.time.time", lambda: later)
    monkeypatch.setattr("coordinator.identities.closed.time.time", lambda: later)
    await home.closed.renew_own()
    assert len(proofs) == 1
    after = [await asyncio.to_thread(shown, port) for port in ports]
    assert all(one != other for one, other in zip(before, after, strict=True))
    renewed = home.closed.proof().certificate
    assert renewed != signed
    assert certificates.read(renewed).public_key == certificates.read(signed).public_key


def coordinator(home: Cluster) -> Path:
    return home.folder / founding.IDENTITY


def telemetry() -> NodeTelemetry:
    return NodeTelemetry(node_id="kitchen", session="s", cpu_percent=1.0, memory_used_bytes=1, memory_available_bytes=1)


class on_the_bus:
    """A member's connection to the broker."""

    def __init__(self, home: Cluster, where: Path, role: str, client_id: str = "one") -> None:
        credentials = Credentials.load(where, role)  # type: ignore[arg-type]
        broker = home.closed.broker
        port = broker.client_port if role == "client" else broker.port
        timings = BusTimings(connect_timeout_seconds=5.0, reconnect_min_seconds=0.05)
        self._bus = MqttBus(in_turn([("127.0.0.1", port)]), TOPICS, credentials, client_id=client_id, timings=timings)

    async def __aenter__(self) -> MqttBus:
        self._running = asyncio.create_task(self._bus.run())
        return self._bus

    async def __aexit__(self, *_: object) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])
