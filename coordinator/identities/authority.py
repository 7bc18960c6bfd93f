"""The cluster's CA: it signs a public key within a profile, and nothing else. Another keeper of the CA's key can stand in its place."""

from __future__ import annotations

import secrets
import time
from typing import Protocol

from potluck.errors import InvalidSettings, PotluckError
from potluck.security import certificates
from potluck.security.certificates import Profile


class Authority(Protocol):
    """Signs certificates for the members of one cluster."""

    @property
    def ca(self) -> bytes:
        """The CA's certificate, as PEM."""
        ...

    def sign(self, public_key: bytes, profile: Profile, seconds: float) -> bytes:
        """A certificate (PEM) for a public key (DER) that is valid from now on for so long. Raises InvalidRequest for a bad key."""
        ...


class KeyOnDisk:
    """An authority whose key (PEM) is in this process. Raises InvalidSettings for a key that is not that of the certificate."""

    def __init__(self, key: bytes, ca: bytes) -> None:
        try:
            fits = certificates.public_key_of(key) == certificates.read(ca).public_key
        except PotluckError as error:
            raise InvalidSettings(f"the CA cannot be read: {error.message}") from error
        if not fits:
            raise InvalidSettings("the CA's key is not that of its certificate")
        self._key = key
        self.ca = ca

    def sign(self, public_key: bytes, profile: Profile, seconds: float) -> bytes:
        return certificates.issue(
            self._key, self.ca, public_key, profile, time.time(), secrets.token_bytes(16), seconds
        )


def new_pair(authority: Authority, profile: Profile, seconds: float) -> tuple[bytes, bytes]:
    """A new P-256 key and its certificate, both as PEM."""
    key = certificates.new_key()
    return key, authority.sign(certificates.public_key_of(key), profile, seconds)
