"""A CA and members of a closed cluster, for tests. The time is real, because TLS looks at the clock."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from potluck.security import certificates, folder
from potluck.security.certificates import Profile

DAY = 86400.0


class Authority:
    """The CA of one cluster: `member` writes a folder of credentials."""

    def __init__(self, cluster: str = "test") -> None:
        self.key = certificates.new_key()
        self.ca = certificates.make_ca(self.key, cluster, "cluster-id", time.time(), secrets.token_bytes(16))

    def issue(self, public_key: bytes, profile: Profile, *, days: float = 7.0, ago_days: float = 0.0) -> bytes:
        began = time.time() - ago_days * DAY
        serial = secrets.token_bytes(16)
        return certificates.issue(self.key, self.ca, public_key, profile, began, serial, days * DAY)

    def member(self, where: Path, name: str, profile: Profile, *, days: float = 7.0, ago_days: float = 0.0) -> Path:
        """`where`, with a new key and certificate as `<name>.pem`, and with the CA's certificate."""
        request = certificates.signing_request(key := certificates.new_key())
        certificate = self.issue(certificates.requested_key(request), profile, days=days, ago_days=ago_days)
        folder.write_pair(where, name, key, certificate)
        folder.write(where / folder.CA_CERTIFICATE, self.ca, folder.PUBLIC)
        return where
