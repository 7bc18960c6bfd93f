"""Certificates: making and reading them. Pure but for new keys: the time and serial numbers are arguments.

ECDSA P-256 with SHA-256 for TLS, Ed25519 for the key that signs commands. Profiles follow RFC 5280.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from potluck.errors import InvalidRequest
from potluck.wire.identities import is_identity

ServerName = Literal["broker.potluck", "coordinator.potluck", "peer.potluck"]
"""What a server is. It stands in its certificate, and whoever connects asks for it instead of the host's name."""

BROKER: ServerName = "broker.potluck"
COORDINATOR: ServerName = "coordinator.potluck"
PEER: ServerName = "peer.potluck"

CLIENT_ROLES = ("viewer", "user", "operator")
COMMANDS = "commands"
"""The unit in the certificate of the key that signs commands."""

CA_SECONDS = 3650 * 86400.0
LEAF_SECONDS = 7 * 86400.0
EARLY_SECONDS = 3600.0
"""How much earlier than now a certificate begins: clocks differ."""
REQUEST_LIMIT_BYTES = 8192
_NAME_LIMIT = 64  # RFC 5280, ub-common-name


@dataclass(frozen=True)
class Profile:
    """What a certificate says of its holder. It is made of what the cluster knows, never of what a signing request says."""

    identity: str
    unit: str = ""
    """The role of a client, or COMMANDS."""
    servers: tuple[ServerName, ...] = ()
    hosts: tuple[str, ...] = ()
    """Further names and IP addresses, for programs that are not ours."""
    client: bool = True
    """Whether the holder may open connections."""

    def __post_init__(self) -> None:
        if not is_identity(self.identity) or len(self.identity) > _NAME_LIMIT:
            raise InvalidRequest(
                f"{self.identity[:80]!r} cannot stand in a certificate: role and name may have {_NAME_LIMIT} letters, digits, '.', '_' and '-'"
            )


def broker_profile(coordinator: str) -> Profile:
    return Profile(f"broker:{coordinator}", servers=(BROKER,), client=False)


def coordinator_profile(name: str, hosts: tuple[str, ...] = ()) -> Profile:
    return Profile(f"coordinator:{name}", servers=(COORDINATOR, PEER), hosts=hosts)


def commands_profile(coordinator: str) -> Profile:
    """For the Ed25519 key of a coordinator: neither a server nor a client may use it."""
    return Profile(f"coordinator:{coordinator}", unit=COMMANDS, client=False)


def node_profile(node_id: str) -> Profile:
    return Profile(f"node:{node_id}", servers=(PEER,))


def client_profile(name: str, role: str) -> Profile:
    """Raises InvalidRequest for a role that there is not."""
    if role not in CLIENT_ROLES:
        raise InvalidRequest(f"there is no role {role[:40]!r}: a client is a {', '.join(CLIENT_ROLES)}")
    return Profile(f"client:{name}", unit=role)


@dataclass(frozen=True)
class Certificate:
    """What we read of a certificate."""

    identity: str
    unit: str
    organization: str
    not_before: float
    not_after: float
    """Seconds since the epoch."""
    fingerprint: bytes
    """SHA-256 of its public key (SubjectPublicKeyInfo): 32 bytes."""
    public_key: bytes
    """The SubjectPublicKeyInfo, as DER."""


def new_key() -> bytes:
    """A new private key, P-256, as PEM."""
    return _private_pem(ec.generate_private_key(ec.SECP256R1()))


def ca_name(cluster: str) -> str:
    """What the certificate of a cluster's CA is called."""
    return f"potluck {cluster}"[:_NAME_LIMIT]


def make_ca(key: bytes, cluster: str, cluster_id: str, now: float, serial: bytes) -> bytes:
    """The certificate of a new cluster's CA, as PEM. `serial`: 16 random bytes."""
    private = _private(key)
    name = _name(ca_name(cluster), cluster_id, "")
    builder = (
        _builder(name, name, private.public_key(), now, CA_SECONDS, serial)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
    )
    return _pem(builder.sign(private, hashes.SHA256()))


def signing_request(key: bytes) -> bytes:
    """A request that proves to have `key` (PEM). It asks for nothing: what a certificate says is not the holder's choice."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(_private(key), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def requested_key(request: bytes) -> bytes:
    """The public key in a signing request (PEM), as DER. Everything else in it is ignored.

    Raises InvalidRequest when it is none, when its signature is not by that key, or for another kind of key than P-256.
    """
    if len(request) > REQUEST_LIMIT_BYTES:
        raise InvalidRequest(f"the signing request has {len(request)} bytes, more than {REQUEST_LIMIT_BYTES}")
    with _as_refusal("this is no signing request"):
        found = x509.load_pem_x509_csr(request)
        signed, public = found.is_signature_valid, found.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise InvalidRequest("the signing request has another kind of key than P-256")
    if not signed:
        raise InvalidRequest("the signing request is not signed by its own key")
    return _public_der(public)


def public_key_of(key: bytes) -> bytes:
    """The public key of a private one (PEM), as DER."""
    return _public_der(_private(key).public_key())


def issue(
    ca_key: bytes,
    ca: bytes,
    public_key: bytes,
    profile: Profile,
    now: float,
    serial: bytes,
    seconds: float = LEAF_SECONDS,
) -> bytes:
    """A certificate for `public_key` (DER; P-256 or Ed25519), signed by the CA, as PEM. `serial`: 16 random bytes."""
    issuer, private = x509.load_pem_x509_certificate(ca), _private(ca_key)
    public = serialization.load_der_public_key(public_key)
    if not isinstance(public, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise InvalidRequest("certificates are only for P-256 and Ed25519 keys")
    organization = _attribute(issuer.subject, NameOID.ORGANIZATION_NAME)
    subject = _name(profile.identity, organization, profile.unit)
    builder = (
        _builder(subject, issuer.subject, public, now, seconds, serial)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH] * bool(profile.servers) + [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ] * profile.client
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    names: list[x509.GeneralName] = [
        *(x509.DNSName(server) for server in profile.servers),
        *(_host(host) for host in profile.hosts),
    ]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _pem(builder.sign(private, hashes.SHA256()))


def read(certificate: bytes) -> Certificate:
    """What a certificate (PEM, or DER) says. It is not checked: see `check`. Raises InvalidRequest when it is none."""
    with _as_refusal("this is no certificate"):
        return _described(_loaded(certificate))


def alone(certificate: bytes) -> bytes:
    """The first certificate in what somebody sent (PEM, or DER), and nothing else of it, as PEM. Raises InvalidRequest when there is none.

    TLS contexts trust all that is in a text: whoever was to show one CA could add another.
    """
    with _as_refusal("this is no certificate"):
        return _pem(_loaded(certificate))


def check(certificate: bytes, ca: bytes, now: float) -> Certificate:
    """What a certificate says, if this CA signed it and it is valid now. Raises InvalidRequest."""
    with _as_refusal("this is no certificate"):
        found, issuer = _loaded(certificate), _loaded(ca)
        described = _described(found)
        try:
            found.verify_directly_issued_by(issuer)
        except InvalidSignature as error:
            raise InvalidRequest(f"the certificate of {described.identity} is not by this cluster's CA") from error
    if not described.not_before <= now <= described.not_after:
        early = now < described.not_before
        edge, here = (
            datetime.fromtimestamp(at, UTC) for at in (described.not_before if early else described.not_after, now)
        )
        advice = "set this machine's clock" if early else "check this machine's clock, or join the cluster again"
        raise InvalidRequest(
            f"the certificate of {described.identity} is not valid now: it {'begins' if early else 'ended'} {edge:%Y-%m-%d %H:%M} UTC, and "
            f"by the clock here it is {here:%Y-%m-%d %H:%M}: {advice}"
        )
    return described


def _loaded(certificate: bytes) -> x509.Certificate:
    if certificate.lstrip().startswith(b"-----"):
        return x509.load_pem_x509_certificate(certificate)
    return x509.load_der_x509_certificate(certificate)


def _described(certificate: x509.Certificate) -> Certificate:
    public = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    subject = certificate.subject
    return Certificate(
        identity=_attribute(subject, NameOID.COMMON_NAME),
        unit=_attribute(subject, NameOID.ORGANIZATIONAL_UNIT_NAME),
        organization=_attribute(subject, NameOID.ORGANIZATION_NAME),
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
        fingerprint=hashlib.sha256(public).digest(),
        public_key=public,
    )


_ODD = (x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
"""Errors of the library that are no ValueError."""


@contextmanager
def _as_refusal(text: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, UnsupportedAlgorithm, *_ODD) as error:
        raise InvalidRequest(
            f"{text}: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}"
        ) from error


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
    now: float,
    seconds: float,
    serial: bytes,
) -> x509.CertificateBuilder:
    began = datetime.fromtimestamp(now, UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        # RFC 5280, 4.1.2.2: positive, at most 20 bytes
        .serial_number(int.from_bytes(b"\x01" + serial))
        .not_valid_before(began - timedelta(seconds=EARLY_SECONDS))
        .not_valid_after(began + timedelta(seconds=seconds))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str, organization: str, unit: str) -> x509.Name:
    parts = (
        (NameOID.COMMON_NAME, common),
        (NameOID.ORGANIZATION_NAME, organization),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
    )
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts if value])


def _attribute(name: x509.Name, kind: x509.ObjectIdentifier) -> str:
    found = name.get_attributes_for_oid(kind)
    return str(found[0].value) if len(found) == 1 else ""


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    with _as_refusal("this is no private key"):
        private = serialization.load_pem_private_key(key, None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise InvalidRequest("this is no P-256 key")
    return private


def _private_pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_der(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
