"""Who this process is, and what it shows and checks when it connects. It is one value, and each plane takes its part of it.

Each composition root makes it once and passes it on. In an open cluster it holds only a name, and connections are plain.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from potluck.errors import InvalidSettings
from potluck.wire.addresses import Scheme
from potluck.wire.identities import CALLER_HEADER, Role, identity

if TYPE_CHECKING:
    import ssl


FOLDER = "identity"
"""The folder with a daemon's credentials, in its state folder."""


@dataclass(frozen=True)
class Credentials:
    """Given to the modules that connect: `potluck/bus/connecting.py`, `potluck/net/http_client.py` and `potluck/net/http.py`."""

    identity: str = ""
    """An identity as in `potluck.wire.identities`; "": none."""
    client_tls: ssl.SSLContext | None = None
    """For connections that we make over HTTP; None: plain connections."""
    broker_tls: ssl.SSLContext | None = None
    """For connections that we make to a broker, if and only if `client_tls` is there."""
    server_tls: ssl.SSLContext | None = None
    """For connections that others make to our HTTP server; None: plain connections."""
    coordinator_tls: ssl.SSLContext | None = None
    """For what is for the coordinator alone, so that no node gets it; None: as `client_tls`."""
    where: Path | None = None
    """The folder that they are from; None: from none."""

    def __post_init__(self) -> None:
        if (self.client_tls is None) != (self.broker_tls is None):
            raise ValueError("one plane would connect with TLS and the other without")

    @classmethod
    def load(cls, where: Path, role: Role) -> Self:
        """The credentials in a folder (`potluck.security.folder`) of a member of a closed cluster: both planes use TLS.

        A node's server asks for certificates; a coordinator's also takes clients without one. Raises InvalidSettings for files that
        are missing, that others can read, or that do not fit, and InvalidRequest for a certificate that is not valid now.
        """
        # Imported only here: `cryptography` costs an open cluster nothing.
        from potluck.security import certificates, contexts, folder

        both = folder.secret(folder.pair(where, role))
        ca = folder.public(where / folder.CA_CERTIFICATE)
        found = certificates.check(folder.certificate_of(both), ca, time.time())
        if not found.identity.startswith(f"{role}:"):
            raise InvalidSettings(f"the certificate in {where} is that of {found.identity}, not of a {role}")
        serves = role != "client"
        return cls(
            found.identity,
            client_tls=contexts.client_context(where, role, certificates.PEER),
            broker_tls=contexts.client_context(where, role, certificates.BROKER),
            server_tls=contexts.server_context(where, role, needs_certificate=role == "node") if serves else None,
            # daemons fetch, and only clients send
            coordinator_tls=None if serves else contexts.client_context(where, role, certificates.COORDINATOR),
            where=where,
        )

    def renew(self, where: Path, role: Role) -> None:
        """Use the certificate that is in the folder now, for all connections from now on. Raises InvalidSettings."""
        from potluck.security import contexts

        for context in (self.client_tls, self.broker_tls, self.server_tls, self.coordinator_tls):
            if context is not None:
                contexts.renew(context, where, role)

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
