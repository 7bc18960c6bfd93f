"""Join tokens in wrong hands: used twice at the same moment, guessed, with the names of others, and with requests that ask for more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from potluck.wire import tokens
from potluck.wire.joining import JOIN_PATH, RENEW_PATH
from support import attackers
from support.attacked import Attacked
from support.paho_peer import DENIED, Peer

MACHINES = 12


def request(common: str = "anything") -> str:
    """A signing request of a new key, which asks for this name, and for all that a certificate can give."""
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.CODE_SIGNING]
    hosts = [x509.DNSName(one) for one in ("broker.potluck", "coordinator.potluck", "peer.potluck")]
    subject = [
        x509.NameAttribute(NameOID.COMMON_NAME, common),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "operator"),
    ]
    made = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name(subject))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


def join(
    home: Attacked, token: str, name: Any, asked: str, at: str = attackers.HERE, **changes: Any
) -> tuple[int, Any]:
    found = tokens.parse(token)
    body = {"token_id": found.token_id.hex(), "secret": found.secret.hex(), "request": asked, "name": name}
    return home.ask("", JOIN_PATH, body | changes, at=at)


@pytest.mark.parametrize("uses", [1, 3])
def test_a_token_used_at_the_same_moment_lets_in_no_more_than_it_may(home: Attacked, uses: int) -> None:
    token, before = home.cluster.token(uses=uses), home.members
    start = Barrier(MACHINES)

    def machine(number: int) -> tuple[int, Any]:
        asked = request()
        start.wait(30)
        return join(home, token, f"twin-{uses}-{number}", asked, at=f"127.0.1.{number + 1}")

    with ThreadPoolExecutor(MACHINES) as machines:
        answers = list(machines.map(machine, range(MACHINES)))
    let_in = [answer["identity"] for status, answer in answers if status == 200]
    assert len(let_in) == uses
    assert [answer["code"] for status, answer in answers if status != 200] == ["not_allowed"] * (MACHINES - uses)
    assert home.members - before == set(let_in)


def test_one_name_for_two_machines_at_the_same_moment(home: Attacked) -> None:
    token = home.cluster.token(uses=MACHINES)
    start = Barrier(MACHINES)

    def machine(number: int) -> tuple[int, Any]:
        asked = request()
        start.wait(30)
        return join(home, token, "contested", asked, at=f"127.0.2.{number + 1}")

    with ThreadPoolExecutor(MACHINES) as machines:
        answers = list(machines.map(machine, range(MACHINES)))
    assert sorted(status for status, _ in answers) == [200] + [409] * (MACHINES - 1)


def test_guesses_are_slowed_down_where_they_come_from(home: Attacked) -> None:
    """Whoever knows a token's id guesses its secret; and those who have it join meanwhile."""
    token = home.cluster.token()
    asked, statuses = request(), []
    for number in range(12):
        statuses.append(join(home, token, "guesser", asked, at="127.0.3.1", secret=f"{number:032x}")[0])
    assert statuses == [401] * 10 + [429] * 2
    # there even the right one is not looked at, so nobody learns by guessing on that it was right
    assert join(home, token, "guesser", asked, at="127.0.3.1")[0] == 429
    assert join(home, token, "knower", asked, at="127.0.3.2")[0] == 200


@pytest.mark.parametrize(
    "asks_for", ["node:node-1", "coordinator:vm", "broker:vm", "client:operator", "node:x\ntopic readwrite #"]
)
def test_a_request_gets_only_what_the_token_says(home: Attacked, asks_for: str) -> None:
    name = f"asks-{asks_for.encode().hex()[:40]}"
    for role, unit in (("node", []), ("viewer", ["viewer"])):
        status, answer = join(home, home.cluster.token(role), name, request(asks_for))  # type: ignore[arg-type]
        assert status == 200
        found = x509.load_pem_x509_certificate(answer["certificate"].encode())
        kind = "node" if role == "node" else "client"
        assert [one.value for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [f"{kind}:{name}"]
        units = found.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        assert [one.value for one in units] == unit
        assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        purposes = set(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        assert ExtendedKeyUsageOID.CODE_SIGNING not in purposes
        assert (ExtendedKeyUsageOID.SERVER_AUTH in purposes) == (role == "node")
        try:
            hosts = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            servers: list[str] = []
        else:
            servers = hosts.get_values_for_type(x509.DNSName)
        assert servers == (["peer.potluck"] if role == "node" else [])


@pytest.mark.parametrize(
    "key",
    [
        ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ],
    ids=["Ed25519", "P-384", "RSA"],
)  # fmt: skip
def test_no_other_kind_of_key_gets_a_certificate(home: Attacked, key: Any) -> None:
    """Commands are signed with Ed25519: nobody else gets a certificate for such a key."""
    asked = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    signed = asked.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    text = signed.public_bytes(serialization.Encoding.PEM).decode()
    assert join(home, home.cluster.token(), "other-key", text)[0] == 400
    assert home.ask("mallory", RENEW_PATH, {"request": text})[0] == 400


def test_nobody_gets_a_certificate_for_the_key_of_another(home: Attacked) -> None:
    """The key in the request is another member's, and so it cannot be signed with it."""
    theirs = x509.load_pem_x509_certificate(home.pair("nora").read_bytes()).public_key()
    der_of_theirs = theirs.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    mine = ec.generate_private_key(ec.SECP256R1())
    der_of_mine = mine.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    asked = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(mine, hashes.SHA256())
    forged = asked.public_bytes(serialization.Encoding.DER).replace(der_of_mine, der_of_theirs)
    text = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM).decode()
    status, answer = join(home, home.cluster.token(), "thief", text)
    assert (status, "not signed by its own key" in answer["error"]) == (400, True)


def test_a_renewal_gets_no_other_name_either(home: Attacked) -> None:
    status, answer = home.ask("mallory", RENEW_PATH, {"request": request("coordinator:vm")})
    assert status == 200
    found = x509.load_pem_x509_certificate(answer["certificate"].encode())
    assert [one.value for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["node:mallory"]
    for who in ("", "operator"):  # nobody, and somebody who is let in by a bearer token only
        named = {} if who else {"Authorization": "Bearer nonsense"}
        status, answer = home.ask(who, RENEW_PATH, {"request": request("node:mallory")}, **named)
        assert status == (200 if who else 401)
        if who:
            found = x509.load_pem_x509_certificate(answer["certificate"].encode())
            (name,) = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            assert str(name.value).startswith("client:operator")


@pytest.mark.parametrize(
    "name",
    [
        "", "a b", "a\ntopic readwrite #", "a\r\nuser x", "+", "#", "a/b", "..", "../../x", "-x", ".x", "node:x", "coordinator:vm", "x" * 51,
        "\u0430dmin", "a\0b", "a\u2028b", "%u", "%c", "$SYS", "a\n", " a", ["a"], {"a": 1}, 7, None, True,
    ],
)  # fmt: skip
def test_odd_names_get_in_nowhere(home: Attacked, name: Any) -> None:
    token, before = ODD.setdefault(id(home), home.cluster.token(uses=100)), home.members
    rules = [home.cluster.folder / "coordinator" / "broker" / f"acl.{kind}" for kind in ("nodes", "clients")]
    there = [path.read_bytes() for path in rules]
    status, answer = join(home, token, name, request())
    assert status == 400, answer
    assert [path.read_bytes() for path in rules] == there
    assert home.members == before


ODD: dict[int, str] = {}
"""The token for odd names, by cluster."""


async def test_a_client_that_is_called_like_a_node_has_nothing_of_it(home: Attacked) -> None:
    where = home.cluster.folder / "client-node-1"
    home.cluster.join("node-1", where, "viewer")
    before = home.states["node-1"]
    context = attackers.tls(where / "client.pem")
    assert attackers.ask(home.node_port, f"/blobs/{'0' * 64}", context)[0] == 403  # a viewer gets nothing there
    for port in (home.cluster.client_port, home.cluster.broker_port):
        peer = await Peer(context, "potluck-thief", port).connected()
        try:
            for leaf in ("status", "outbox", "telemetry", "capacity", "inbox"):
                assert await peer.publish(home.topics.node("node-1", leaf), b"{}", retain=True) == DENIED
        finally:
            peer.close()
    assert home.states["node-1"] == before
