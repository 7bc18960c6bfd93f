"""Ed25519 (RFC 8032): bytes in, bytes out."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from potluck.errors import InvalidRequest


def new_key() -> bytes:
    """A new private key, as PEM."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Signer:
    """Signs with a private key (PEM). Raises InvalidRequest when it is not an Ed25519 key."""

    def __init__(self, key: bytes) -> None:
        try:
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError) as error:
            raise InvalidRequest("this is no private key") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise InvalidRequest("this is no Ed25519 key")
        self._private = private
        self.public_key = private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        """The SubjectPublicKeyInfo, as DER."""

    def sign(self, data: bytes) -> bytes:
        """A signature of 64 bytes."""
        return self._private.sign(data)


class Verifier:
    """Checks signatures by one public key (DER). Raises InvalidRequest when it is not an Ed25519 key."""

    def __init__(self, public_key: bytes) -> None:
        try:
            public = serialization.load_der_public_key(public_key)
        except ValueError as error:
            raise InvalidRequest("this is no public key") from error
        if not isinstance(public, Ed25519PublicKey):
            raise InvalidRequest("this is no Ed25519 key")
        self._public = public

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Whether the signature is by this key and over exactly these bytes."""
        try:
            self._public.verify(signature, data)
        except InvalidSignature:
            return False
        return True
