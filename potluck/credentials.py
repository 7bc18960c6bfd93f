"""Who this process is, and what it shows and checks when it connects. It is one value, and each plane takes its part of it.

Each composition root makes it once and passes it on. It holds only a name yet, and connections are plain.
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
    """Given to the modules that connect: `potluck/bus/connecting.py`, `potluck/net/http_client.py` and `potluck/net/http.py`."""

    identity: str = ""
    """An identity as in `potluck.wire.identities`; "": none."""
    client_tls: ssl.SSLContext | None = None
    """For connections that we make, to a broker or over HTTP; None: plain connections."""
    server_tls: ssl.SSLContext | None = None
    """For connections that others make to our HTTP server; None: plain connections."""

    @classmethod
    def of(cls, role: Role, name: str) -> Self:
        """The credentials of a daemon. Raises ValueError for a name that an identity cannot have."""
        return cls(identity(role, name))

    @classmethod
    def of_client(cls) -> Self:
        """The credentials of a client. It has no name, so one is made up."""
        return cls.of("client", uuid.uuid4().hex[:12])

    @property
    def scheme(self) -> Scheme:
        """The scheme of our HTTP server's addresses."""
        return "http" if self.server_tls is None else "https"

    @property
    def headers(self) -> dict[str, str]:
        """The headers that name us in each HTTP request. Any holder named in a message gets them: they must hold no secret."""
        return {CALLER_HEADER: self.identity} if self.identity else {}
