"""What certificates say, and what a signing request cannot bring into one."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from potluck.errors import InvalidRequest
from potluck.security import certificates, signing
from potluck.security.certificates import Profile

NOW = 1_800_000_000.0
SERIAL = bytes(range(16))
CA_KEY = certificates.new_key()
CA = certificates.make_ca(CA_KEY, "home", "c-1", NOW, SERIAL)
KEY = certificates.new_key()
PUBLIC = certificates.public_key_of(KEY)


def issued(profile: Profile, now: float = NOW) -> bytes:
    return certificates.issue(CA_KEY, CA, PUBLIC, profile, now, SERIAL)


def names(certificate: bytes) -> list[str]:
    found = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in found.value]


def purposes(certificate: bytes) -> set[x509.ObjectIdentifier]:
    found = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    return set(found.value)


SERVES, ASKS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def test_what_each_profile_may() -> None:
    node = issued(certificates.node_profile("kitchen"))
    assert (names(node), purposes(node)) == (["peer.potluck"], {SERVES, ASKS})
    coordinator = issued(certificates.coordinator_profile("attic", ("attic.lan", "192.0.2.7")))
    assert names(coordinator) == ["coordinator.potluck", "peer.potluck", "attic.lan", "192.0.2.7"]
    assert purposes(coordinator) == {SERVES, ASKS}
    broker = issued(certificates.broker_profile("attic"))
    assert (names(broker), purposes(broker)) == (["broker.potluck"], {SERVES})
    client = issued(certificates.client_profile("ann", "viewer"))
    assert purposes(client) == {ASKS}
    with pytest.raises(x509.ExtensionNotFound):
        names(client)
    with pytest.raises(x509.ExtensionNotFound):
        purposes(issued(certificates.commands_profile("attic")))


def test_what_is_read_of_one() -> None:
    found = certificates.read(issued(certificates.client_profile("ann", "operator")))
    assert (found.identity, found.unit, found.organization) == ("client:ann", "operator", "c-1")
    assert (found.not_before, found.not_after) == (NOW - 3600, NOW + 7 * 86400)
    assert found.public_key == PUBLIC
    assert certificates.read(CA).identity == "potluck home"


def test_the_same_inputs_say_the_same() -> None:
    one, two = (certificates.read(issued(certificates.node_profile("a"))) for _ in range(2))
    assert one == two
    other = certificates.issue(
        CA_KEY, CA, certificates.public_key_of(certificates.new_key()), certificates.node_profile("a"), NOW, SERIAL
    )
    assert certificates.read(other).fingerprint != one.fingerprint


def test_a_request_brings_in_nothing_but_its_key() -> None:
    private = serialization.load_pem_private_key(KEY, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator:attic")]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("broker.potluck")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    certificate = certificates.issue(
        CA_KEY, CA, certificates.requested_key(greedy), certificates.node_profile("n1"), NOW, SERIAL
    )
    assert certificates.read(certificate).identity == "node:n1"
    assert names(certificate) == ["peer.potluck"]
    basic = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.BasicConstraints)
    assert not basic.value.ca
    assert certificates.requested_key(certificates.signing_request(KEY)) == PUBLIC


def test_requests_that_are_refused() -> None:
    request = certificates.signing_request(KEY)
    der = x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER)
    forged = x509.load_der_x509_csr(der[:-1] + bytes([der[-1] ^ 1])).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(InvalidRequest, match="not signed by its own key"):
        certificates.requested_key(forged)
    for private in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        other = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(private, hashes.SHA256())
        with pytest.raises(InvalidRequest, match="another kind of key"):
            certificates.requested_key(other.public_bytes(serialization.Encoding.PEM))
    for wrong in (b"", b"nonsense", request[:100], CA):
        with pytest.raises(InvalidRequest, match="no signing request"):
            certificates.requested_key(wrong)
    with pytest.raises(InvalidRequest, match="more than 8192"):
        certificates.requested_key(bytes(8193))


@pytest.mark.parametrize(
    "identity", ["node:a b", "node:", "node:a\nuser coordinator:x", "node:+", "node:" + "a" * 60, ""]
)
def test_names_that_cannot_stand_in_one(identity: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot stand in a certificate"):
        Profile(identity)


def test_there_is_no_other_role_of_clients() -> None:
    with pytest.raises(InvalidRequest, match="viewer, user, operator"):
        certificates.client_profile("ann", "commands")


def test_who_signed_it_and_when() -> None:
    certificate = issued(certificates.node_profile("n1"))
    assert certificates.check(certificate, CA, NOW).identity == "node:n1"
    for at, said in (
        (NOW - 3601, "not valid now: it begins .* by the clock here it is .*: set this machine's clock$"),
        (NOW + 7 * 86400 + 1, "not valid now: it ended .* or join the cluster again$"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            certificates.check(certificate, CA, at)
    # The same name and another key: only the signature tells them apart.
    other = certificates.make_ca(certificates.new_key(), "home", "c-1", NOW, SERIAL)
    with pytest.raises(InvalidRequest, match="not by this cluster's CA"):
        certificates.check(certificate, other, NOW)
    with pytest.raises(InvalidRequest, match="no certificate"):
        certificates.check(b"nonsense", CA, NOW)


def test_the_key_of_commands() -> None:
    signer = signing.Signer(signing.new_key())
    certificate = certificates.issue(CA_KEY, CA, signer.public_key, certificates.commands_profile("attic"), NOW, SERIAL)
    found = certificates.check(certificate, CA, NOW)
    assert (found.identity, found.unit) == ("coordinator:attic", certificates.COMMANDS)
    assert signing.Verifier(found.public_key).verify(signer.sign(b"do it"), b"do it")
    assert not signing.Verifier(found.public_key).verify(signer.sign(b"do it"), b"do it not")
    assert not signing.Verifier(found.public_key).verify(b"", b"do it")


def test_keys_of_the_wrong_kind() -> None:
    with pytest.raises(InvalidRequest, match="no Ed25519 key"):
        signing.Signer(KEY)
    with pytest.raises(InvalidRequest, match="no Ed25519 key"):
        signing.Verifier(PUBLIC)
    with pytest.raises(InvalidRequest, match="no P-256 key"):
        certificates.signing_request(signing.new_key())
    for wrong in (b"", b"nonsense"):
        with pytest.raises(InvalidRequest):
            signing.Signer(wrong)
        with pytest.raises(InvalidRequest):
            signing.Verifier(wrong)
        with pytest.raises(InvalidRequest):
            certificates.public_key_of(wrong)


def test_of_several_certificates_only_the_first_is_taken() -> None:
    other_key = certificates.new_key()
    other = certificates.make_ca(other_key, "home", "c-1", NOW, SERIAL)
    assert certificates.alone(CA + b"\n" + other) == CA
    assert certificates.alone(CA.replace(b"\n", b"\r\n") + b"-----BEGIN TRUSTED CERTIFICATE-----") == CA
    with pytest.raises(InvalidRequest, match="no certificate"):
        certificates.alone(CA_KEY)
