"""What a machine and the coordinator say over HTTPS when the machine joins a closed cluster or renews its certificate. Bodies are JSON.

GET  /v1/ca                    the CA's certificate (PEM); whoever asks compares it with the join token
POST /v1/join   JoinRequest    Joined; by the token's secret, so without a certificate
POST /v1/renew  RenewRequest   Joined; by the certificate of the connection
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from potluck.errors import InvalidRequest
from potluck.wire.members import MemberName, TokenId

CA_PATH = "/v1/ca"
JOIN_PATH = "/v1/join"
RENEW_PATH = "/v1/renew"
BODY_LIMIT_BYTES = 64 * 1024
_T = TypeVar("_T", bound=Struct)
_Request = Annotated[str, Meta(max_length=8192)]


class JoinRequest(Struct, frozen=True):
    """`secret`: the join token's, 32 hexadecimal digits. `request`: a signing request (PEM, PKCS #10); of it, only the key is used."""

    token_id: TokenId
    secret: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    request: _Request
    name: MemberName


class RenewRequest(Struct, frozen=True):
    request: _Request


class Joined(Struct, frozen=True):
    """`certificate` and `ca` are PEM. `brokers` and `http` are `host:port`: the listener of the member's kind, and the coordinator's server."""

    identity: str
    certificate: str
    ca: str
    cluster: str
    cluster_id: str
    brokers: tuple[str, ...]
    http: tuple[str, ...]


def encode(value: JoinRequest | RenewRequest | Joined) -> bytes:
    return msgspec.json.encode(value)


def decode(data: bytes, kind: type[_T]) -> _T:
    """Raises InvalidRequest."""
    if len(data) > BODY_LIMIT_BYTES:
        raise InvalidRequest(f"a {kind.__name__} has at most {BODY_LIMIT_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"this is no {kind.__name__}: {str(error)[:200]}") from error
