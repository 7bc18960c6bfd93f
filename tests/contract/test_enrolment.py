"""Joining with a token and renewing, over real TLS, against coordinators that are false, cut off, endless or simply wrong."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import stat
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from potluck import enrolment
from potluck.credentials import Credentials
from potluck.enrolment import WrongCluster, enrol
from potluck.errors import Conflict, InvalidRequest, NotAllowed, Overloaded, PotluckError, Unavailable
from potluck.net.discovery import Discovery, Service
from potluck.net.side import ca_hint
from potluck.security import certificates, cluster_file, folder
from potluck.wire.tokens import FINGERPRINT_BYTES, JoinToken, parse
from support.closed import Authority
from support.eventually import eventually
from support.false_coordinator import (
    ENDLESS,
    Answer,
    FalseCoordinator,
    admits,
    admits_with,
    false_coordinator,
    http,
    refuses,
    says,
)

SECRET = secrets.token_bytes(16)


def token_of(authority: Authority, *places: str) -> JoinToken:
    fingerprint = certificates.read(authority.ca).fingerprint[:FINGERPRINT_BYTES]
    return parse(JoinToken(fingerprint, places, secrets.token_bytes(5), SECRET).text())


async def nowhere(token: JoinToken) -> Sequence[str]:
    """No mDNS: other clusters may be on this machine."""
    return ()


def dead() -> str:
    """A place where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "AGAIN_SECONDS", 0.05)


async def test_a_token_makes_a_member(tmp_path: Path) -> None:
    authority = Authority()
    async with false_coordinator(tmp_path, authority) as coordinator:
        enrolled = await enrol(token_of(authority, dead(), coordinator.place), "kitchen", hints=nowhere)
        where = tmp_path / "identity"
        enrolled.save(where)
        assert SECRET.hex().encode() in coordinator.heard
        assert b"PRIVATE KEY" not in coordinator.heard
    assert (enrolled.role, enrolled.known.identity, enrolled.known.cluster) == ("node", "node:kitchen", "test")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in where.iterdir()}
    assert modes == {"node.pem": 0o600, "ca.crt": 0o644, cluster_file.NAME: 0o644}
    assert Credentials.load(where, "node").identity == "node:kitchen"
    assert cluster_file.read(where) == enrolled.known


async def test_a_false_coordinator_gets_no_secret(tmp_path: Path) -> None:
    """Whoever answers at the token's address with another CA learns nothing, and the person learns both fingerprints."""
    ours, theirs = Authority(), Authority()
    async with false_coordinator(tmp_path, theirs) as coordinator:
        token = token_of(ours, coordinator.place)
        with pytest.raises(WrongCluster) as caught:
            await enrol(token, "kitchen", hints=nowhere)
        assert coordinator.paths == ["/v1/ca"]
        for secret in (
            SECRET,
            SECRET.hex().encode(),
            SECRET.hex().upper().encode(),
            token.token_id.hex().encode(),
            b"kitchen",
        ):
            assert secret not in coordinator.heard
    text = caught.value.message
    shown = certificates.read(theirs.ca).fingerprint[:FINGERPRINT_BYTES].hex()
    assert shown in text
    assert token.fingerprint.hex() in text
    assert coordinator.place in text


async def test_a_false_coordinator_that_shows_the_real_ca_gets_no_secret(tmp_path: Path) -> None:
    """The CA is no secret. But only the real coordinator has a certificate by it; adding its own CA to the real one does not help."""
    ours, theirs = Authority(), Authority()
    for shown in (ours.ca, ours.ca + theirs.ca, theirs.ca.replace(b"CERTIFICATE", b"X509 CRL") + ours.ca + theirs.ca):
        async with false_coordinator(tmp_path, theirs, ca=says(http(200, shown))) as coordinator:
            with pytest.raises(Unavailable):
                await enrol(token_of(ours, coordinator.place), "kitchen", hints=nowhere, limit_seconds=0.5)
            assert set(coordinator.paths) == {"/v1/ca"}
            assert SECRET.hex().encode() not in coordinator.heard


async def test_a_member_that_poses_as_the_coordinator_gets_no_secret(tmp_path: Path) -> None:
    """A node has a certificate by the right CA, but not for `coordinator.potluck`."""
    authority = Authority()
    where = authority.member(tmp_path / "n", "coordinator", certificates.node_profile("mallory"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(where / "coordinator.pem")
    false = FalseCoordinator(authority, context, {})
    async with await asyncio.start_server(false.serve, "127.0.0.1", 0, ssl=context) as server:
        false.port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable):
            await enrol(token_of(authority, false.place), "kitchen", hints=nowhere, limit_seconds=0.5)
    assert set(false.paths) == {"/v1/ca"}
    assert SECRET.hex().encode() not in false.heard


async def test_plain_text_gets_no_secret(tmp_path: Path) -> None:
    heard = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += await reader.read(65536)
        writer.write(http(200, Authority().ca))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Unavailable, match="could not join"):
            await enrol(token_of(Authority(), place), "kitchen", hints=nowhere, limit_seconds=0.3)
    assert heard.startswith(b"\x16\x03")  # a TLS handshake
    assert SECRET.hex().encode() not in heard


async def test_an_answer_that_is_cut_off_is_asked_for_again_with_the_same_key(tmp_path: Path) -> None:
    authority = Authority()
    keys: list[bytes] = []

    def cut_twice(coordinator: FalseCoordinator, body: bytes) -> bytes:
        keys.append(body)
        whole = admits(coordinator, body)
        return whole if len(keys) == 3 else whole[:-100]

    async with false_coordinator(tmp_path, authority, join=cut_twice) as coordinator:
        enrolled = await enrol(token_of(authority, coordinator.place), "kitchen", hints=nowhere)
    requested = {certificates.requested_key(parse_request(body)) for body in keys}
    assert requested == {certificates.public_key_of(enrolled.key)}
    assert len(keys) == 3


def parse_request(body: bytes) -> bytes:
    from potluck.wire import joining

    return joining.decode(body, joining.JoinRequest).request.encode()


@pytest.mark.parametrize(
    "answer",
    [
        says(b""),
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + ENDLESS),
        says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\n" + ENDLESS),
        says(b"HTTP/1.1 200 OK\r\nX: " + ENDLESS),
        says(b"\x00\xff" * 100),
        says(http(302, b"", Location="http://127.0.0.1:1/v1/join")),
        refuses(503, "not now"),
    ],
)
@pytest.mark.parametrize("path", ["ca", "join"])
async def test_what_is_no_answer_ends_in_time(tmp_path: Path, path: str, answer: Answer) -> None:
    authority = Authority()
    async with false_coordinator(tmp_path, authority, **{path: answer}) as coordinator:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=f"could not join: .*{coordinator.place}"):
            await enrol(token_of(authority, coordinator.place), "kitchen", hints=nowhere, limit_seconds=0.3)
        assert time.monotonic() - began < enrolment.ANSWER_SECONDS


async def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        place = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(Unavailable, match="no whole answer"):
            await enrol(token_of(Authority(), place), "kitchen", hints=nowhere, limit_seconds=0.3)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (says(http(200, b"{}")), InvalidRequest),
        (says(http(200, b"[" * 60000)), InvalidRequest),
        (refuses(403, "the token was used up"), NotAllowed),
        (refuses(401, "the token was used up"), NotAllowed),
        (refuses(409, "kitchen is a member already: the token was used up"), Conflict),
        (refuses(400, "the token was used up"), InvalidRequest),
        (refuses(429, "the token was used up", **{"Retry-After": "60"}), Overloaded),
        (admits_with(identity="node:attic"), Conflict),
        (admits_with(identity="client:kitchen"), Conflict),
        (admits_with(cluster="other"), InvalidRequest),
        (admits_with(cluster_id="other"), InvalidRequest),
        (admits_with(brokers=("evil/../x",)), InvalidRequest),
        (admits_with(http=()), InvalidRequest),
        (admits_with(certificate="-----BEGIN"), InvalidRequest),
    ],
)
async def test_a_refusal_or_a_wrong_answer_is_final(tmp_path: Path, answer: Answer, kind: type[PotluckError]) -> None:
    authority = Authority()
    async with false_coordinator(tmp_path, authority, join=answer) as coordinator:
        with pytest.raises(kind) as caught:
            await enrol(token_of(authority, coordinator.place), "kitchen", hints=nowhere, limit_seconds=2)
        assert coordinator.paths.count("/v1/join") == 1
    if caught.value.message.endswith("used up"):
        assert "the token was used up" in caught.value.message


async def test_a_certificate_for_another_key_or_by_another_ca_is_refused(tmp_path: Path) -> None:
    authority, other = Authority(), Authority()
    profile = certificates.node_profile("kitchen")
    stolen = certificates.public_key_of(certificates.new_key())
    for certificate in (authority.issue(stolen, profile), other.issue(stolen, profile)):
        answer = admits_with(certificate=certificate.decode())
        async with false_coordinator(tmp_path, authority, join=answer) as coordinator:
            with pytest.raises(InvalidRequest):
                await enrol(token_of(authority, coordinator.place), "kitchen", hints=nowhere)


async def test_a_text_of_others_cannot_write_into_the_terminal(tmp_path: Path) -> None:
    authority = Authority()
    async with false_coordinator(tmp_path, authority, join=refuses(403, "no\x1b[2J\n" * 999)) as coordinator:
        with pytest.raises(NotAllowed) as caught:
            await enrol(token_of(authority, coordinator.place), "kitchen", hints=nowhere)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


async def test_who_must_wait_waits(tmp_path: Path) -> None:
    authority = Authority()
    tries: list[bytes] = []

    def busy(coordinator: FalseCoordinator, body: bytes) -> bytes:
        tries.append(body)
        return (
            admits(coordinator, body)
            if len(tries) == 2
            else refuses(429, "later", **{"Retry-After": "1"})(coordinator, body)
        )

    async with false_coordinator(tmp_path, authority, join=busy) as coordinator:
        began = time.monotonic()
        await enrol(token_of(authority, coordinator.place), "kitchen", hints=nowhere)
        assert time.monotonic() - began >= 1


async def test_a_coordinator_that_moved_is_found_by_mdns(tmp_path: Path) -> None:
    """The token's address does not answer any more. A forged hint is skipped, and gets no secret."""
    authority = Authority()
    token = token_of(authority, dead())
    (tmp_path / "f").mkdir()
    async with (
        false_coordinator(tmp_path, authority) as coordinator,
        false_coordinator(tmp_path / "f", Authority()) as forged,
        Discovery("test") as first,
        Discovery("test") as second,
    ):
        for discovery, one in ((first, forged), (second, coordinator)):
            await discovery.advertise(
                Service(
                    id=f"c-{secrets.token_hex(4)}", cluster="test", role="coordinator", host="127.0.0.1", port=one.port,
                    broker_port=1, client_port=2, ca=ca_hint(token.fingerprint),
                )
            )  # fmt: skip
        enrolled = await enrol(token, "kitchen")
        assert enrolled.known.http == (coordinator.place,)
        assert SECRET.hex().encode() not in forged.heard


async def test_a_name_that_no_member_can_have_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    authority = Authority()
    async with false_coordinator(tmp_path, authority) as coordinator:
        with pytest.raises(InvalidRequest, match="name of a member"):
            await enrol(token_of(authority, coordinator.place), "a/b", hints=nowhere)
        assert not coordinator.paths


# --- renewing ---------------------------------------------------------------------------------------------------------------------------


async def member(tmp_path: Path, coordinator: FalseCoordinator) -> tuple[Path, Credentials]:
    enrolled = await enrol(token_of(coordinator.authority, coordinator.place), "kitchen", hints=nowhere)
    where = tmp_path / "identity"
    enrolled.save(where)
    return where, Credentials.load(where, "node")


def serving(credentials: Credentials, authority: Authority) -> bytes:
    """The public key that a server with these credentials shows in a handshake."""
    assert credentials.server_tls is not None
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.load_verify_locations(cadata=authority.ca.decode())
    client = asking.wrap_bio(there, here, server_hostname="peer.potluck")
    server = credentials.server_tls.wrap_bio(here, there, server_side=True)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLError:
                continue
    shown = client.getpeercert(binary_form=True)
    assert shown is not None
    return certificates.read(shown).public_key


async def test_a_renewal_brings_a_new_key_into_use(tmp_path: Path) -> None:
    authority = Authority()
    async with false_coordinator(tmp_path, authority) as coordinator:
        where, credentials = await member(tmp_path, coordinator)
        before = enrolment.own_certificate(where, "node")
        assert serving(credentials, authority) == before.public_key
        known = cluster_file.read(where)
        cluster_file.write(where, replace(known, http=(dead(),)))  # the coordinator moved, and mDNS or its status tells
        await enrolment.renew(where, "node", credentials, ("no place", coordinator.place))
        assert coordinator.peer == "node:kitchen"
    after = enrolment.own_certificate(where, "node")
    assert after.public_key != before.public_key
    assert serving(credentials, authority) == after.public_key
    assert cluster_file.read(where) == known


async def test_a_node_that_poses_as_the_coordinator_renews_nothing(tmp_path: Path) -> None:
    authority = Authority()
    async with false_coordinator(tmp_path, authority) as coordinator:
        where, credentials = await member(tmp_path, coordinator)
    before = folder.secret(where / "node.pem")
    mallory = authority.member(tmp_path / "m", "node", certificates.node_profile("mallory"))
    context = Credentials.load(mallory, "node").server_tls
    assert context is not None
    false = FalseCoordinator(authority, context, {})
    async with await asyncio.start_server(false.serve, "127.0.0.1", 0, ssl=context) as server:
        false.port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable):
            await enrolment.renew(where, "node", credentials, (false.place,))
    assert not false.paths
    assert folder.secret(where / "node.pem") == before


async def test_a_certificate_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    authority = Authority()

    def another(coordinator: FalseCoordinator, body: bytes) -> bytes:
        from potluck.wire import joining

        request = joining.decode(body, joining.RenewRequest).request
        return http(200, joining.encode(coordinator.joined("node:attic", request)))

    async with false_coordinator(tmp_path, authority, renew=another) as coordinator:
        where, credentials = await member(tmp_path, coordinator)
        before = folder.secret(where / "node.pem")
        with pytest.raises(Conflict):
            await enrolment.renew(where, "node", credentials)
    assert folder.secret(where / "node.pem") == before


async def test_certificates_are_renewed_at_two_thirds_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "RETRY_SECONDS", (0.05, 0.05))
    authority = Authority()
    tries: list[float] = []

    def sometimes(coordinator: FalseCoordinator, body: bytes) -> bytes:
        from support.false_coordinator import renews

        tries.append(time.time())
        return renews(coordinator, body) if len(tries) > 2 else refuses(503, "not now")(coordinator, body)

    async with false_coordinator(tmp_path, authority, renew=sometimes) as coordinator:
        coordinator.days = 4 / 86400
        where, credentials = await member(tmp_path, coordinator)
        first = enrolment.own_certificate(where, "node")
        coordinator.days = 7
        running = asyncio.create_task(enrolment.keep_renewed(where, "node", credentials))
        try:
            await eventually(lambda: enrolment.own_certificate(where, "node").not_after > first.not_after, 10)
        finally:
            running.cancel()
    assert len(tries) == 3
    began = first.not_before + certificates.EARLY_SECONDS
    assert began + 4 * 2 / 3 * 0.9 <= tries[0] < first.not_after


def test_when_to_renew() -> None:
    authority = Authority()
    profile = certificates.node_profile("kitchen")
    found = certificates.read(authority.issue(certificates.public_key_of(certificates.new_key()), profile))
    now, day = time.time(), 86400.0
    assert enrolment.renewal_at(found) == pytest.approx(now + 7 * day * 2 / 3, abs=5)
    assert enrolment.renewal_at(found, 1.0) == pytest.approx(now + 7 * day * 0.6, abs=5)
