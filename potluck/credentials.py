"""Who this process is, and what it shows and checks when it connects: one value, from which each plane takes what it needs.

Each composition root makes it once and hands it on. It holds nothing but a name yet, and connections are plain.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from potluck.wire.addresses import Scheme
from potluck.wire.identities import CALLER_HEADER, Role, identity

if TYPE_CHECKING:
    import ssl


@dataclass(frozen=True)
class Credentials:
    """What the places that connect are given: `potluck/bus/connecting.py`, `potluck/net/http_client.py` and `potluck/net/http.py`."""

    identity: str = ""
    """As `potluck.wire.identities` has it; "": of nobody in particular."""
    client_tls: ssl.SSLContext | None = None
    """For the connections that we make, to a broker or over HTTP; None: they are plain."""
    server_tls: ssl.SSLContext | None = None
    """For those that others make to our HTTP server; None: they are plain."""

    @classmethod
    def of(cls, role: Role, name: str) -> Self:
        """Raises ValueError for a name that an identity cannot have."""
        return cls(identity(role, name))

    @classmethod
    def of_client(cls) -> Self:
        """Of a client, which has no name of its own: one is made up."""
        return cls.of("client", uuid.uuid4().hex[:12])

    @property
    def scheme(self) -> Scheme:
        """Of the addresses of our HTTP server."""
        return "http" if self.server_tls is None else "https"

    @property
    def headers(self) -> dict[str, str]:
        """They say who we are in each HTTP request. They go to whomever a message names as a holder: nothing secret may be in them."""
        return {CALLER_HEADER: self.identity} if self.identity else {}
