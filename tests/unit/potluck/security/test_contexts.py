"""Handshakes in memory: who is let in, and whom we take for what."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path

import pytest

from potluck.errors import InvalidSettings
from potluck.security import contexts, folder
from potluck.security.certificates import (
    BROKER,
    COORDINATOR,
    PEER,
    broker_profile,
    client_profile,
    coordinator_profile,
    node_profile,
)
from support.closed import Authority

OURS, OTHERS = Authority(), Authority()


def shake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends after a handshake and one byte, without a network. Raises ssl.SSLError as the side that refuses."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(down, up, server_hostname="203.0.113.9")
    serving = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for end in (asking, serving):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    serving.write(b"x")
    assert asking.read(1) == b"x"
    return asking, serving


def subject(end: ssl.SSLObject) -> str:
    certificate = end.getpeercert()
    assert certificate
    return dict(pairs[0] for pairs in certificate["subject"])["commonName"]  # type: ignore[index]


@pytest.fixture
def node(tmp_path: Path) -> Path:
    return OURS.member(tmp_path / "node", "node", node_profile("n1"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return OURS.member(tmp_path / "other", "node", node_profile("n2"))


def test_both_sides_are_known_whatever_the_address_is(node: Path, other: Path) -> None:
    asking, serving = shake(contexts.client_context(node, "node", PEER), contexts.server_context(other, "node"))
    assert (subject(asking), subject(serving)) == ("node:n2", "node:n1")
    assert asking.version() == "TLSv1.3"


def test_a_node_is_neither_broker_nor_coordinator(node: Path, other: Path, tmp_path: Path) -> None:
    served = contexts.server_context(other, "node")
    for name in (BROKER, COORDINATOR):
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            shake(contexts.client_context(node, "node", name), served)
    broker = OURS.member(tmp_path / "broker", "broker", broker_profile("attic"))
    shake(contexts.client_context(node, "node", BROKER), contexts.server_context(broker, "broker"))
    attic = OURS.member(tmp_path / "attic", "coordinator", coordinator_profile("attic"))
    for name in (COORDINATOR, PEER):
        shake(contexts.client_context(node, "node", name), contexts.server_context(attic, "coordinator"))


def test_who_is_not_let_in(node: Path, tmp_path: Path) -> None:
    served = contexts.server_context(node, "node")
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="did not return a certificate"):
        shake(stranger, served)
    old = OURS.member(tmp_path / "old", "node", node_profile("n2"), days=7, ago_days=8)
    with pytest.raises(ssl.SSLError, match="certificate has expired"):
        shake(contexts.client_context(old, "node", PEER), served)
    foreign = OTHERS.member(tmp_path / "foreign", "node", node_profile("n1"))
    folder.write(foreign / "ca.crt", OURS.ca)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        shake(contexts.client_context(foreign, "node", PEER), served)
    early = contexts.client_context(node, "node", PEER)
    early.minimum_version = ssl.TLSVersion.TLSv1_2
    early.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        shake(early, served)


def test_a_client_is_no_server_and_a_broker_no_client(node: Path, tmp_path: Path) -> None:
    client = OURS.member(tmp_path / "client", "client", client_profile("ann", "user"))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(contexts.client_context(node, "node", PEER), contexts.server_context(client, "client"))
    shake(contexts.client_context(client, "client", PEER), contexts.server_context(node, "node"))
    broker = OURS.member(tmp_path / "broker", "broker", broker_profile("attic"))
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        shake(contexts.client_context(broker, "broker", PEER), contexts.server_context(node, "node"))


def test_a_server_where_a_certificate_is_not_needed_refuses_wrong_ones(node: Path, tmp_path: Path) -> None:
    served = contexts.server_context(node, "node", needs_certificate=False)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    _, serving = shake(stranger, served)
    assert serving.getpeercert() is None
    foreign = OTHERS.member(tmp_path / "foreign", "node", node_profile("n1"))
    folder.write(foreign / "ca.crt", OURS.ca)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        shake(contexts.client_context(foreign, "node", PEER), served)


def test_a_renewed_certificate_is_used_by_the_same_contexts(node: Path, other: Path) -> None:
    asks, serves = contexts.client_context(node, "node", PEER), contexts.server_context(other, "node")

    def serials() -> list[str]:
        return [str((end.getpeercert() or {})["serialNumber"]) for end in shake(asks, serves)]

    before = serials()
    for where, context, name in ((node, asks, "n1"), (other, serves, "n2")):
        OURS.member(where, "node", node_profile(name))
        contexts.renew(context, where, "node")
    assert not set(before) & set(serials())


def test_no_session_is_resumed(node: Path, other: Path) -> None:
    """Who was revoked could else come back without showing a certificate."""
    asking, _ = shake(contexts.client_context(node, "node", PEER), contexts.server_context(other, "node"))
    assert asking.session is None or not asking.session.has_ticket


def test_files_that_do_not_fit(node: Path, other: Path) -> None:
    context = contexts.client_context(node, "node", PEER)
    good = (node / "node.pem").read_bytes()
    key, mine = good[: good.find(b"-----BEGIN CERT")], folder.certificate_of(good)
    for wrong in (key, mine, key + folder.certificate_of((other / "node.pem").read_bytes()), b""):
        folder.write(node / "node.pem", wrong)
        with pytest.raises(InvalidSettings, match="join the cluster again"):
            contexts.renew(context, node, "node")
    shake(context, contexts.server_context(other, "node"))
    folder.write(node / "node.pem", good)
    (node / "node.pem").chmod(0o644)
    with pytest.raises(InvalidSettings, match="can be read by other users"):
        contexts.server_context(node, "node")
    (node / "node.pem").chmod(0o600)
    folder.write(node / "ca.crt", b"nonsense")
    with pytest.raises(InvalidSettings, match="is no certificate"):
        contexts.client_context(node, "node", PEER)
