"""TLS contexts of a closed cluster: TLS 1.3, certificates of its own CA on both sides, and a pinned name of the server.

A context lives as long as its process. `renew` changes the certificate of its later handshakes; connections that stand stay.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from potluck.errors import InvalidSettings
from potluck.security import folder
from potluck.security.certificates import ServerName


class Pinned(ssl.SSLContext):
    """Asks every server for one name, whatever its address is: a node that poses as the broker is refused in the handshake."""

    server_name: str

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*args, **{**options, "server_hostname": self.server_name})

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return super().wrap_bio(incoming, outgoing, server_side, self.server_name, session)


def client_context(where: Path, name: str, server: ServerName) -> ssl.SSLContext:
    """For connections to servers of this kind. Raises InvalidSettings."""
    context = Pinned(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = server
    _prepare(context, where, name)
    return context


def trusting(ca: bytes, server: ServerName) -> ssl.SSLContext:
    """For connections to servers of this kind by somebody who has no certificate yet. `ca`: the CA's certificate (PEM).

    Raises InvalidSettings.
    """
    context = Pinned(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = server
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise InvalidSettings("this is no certificate of a CA") from error
    return context


def blind(server: ServerName) -> ssl.SSLContext:
    """For the one question that may be asked of anybody: the CA's certificate, which is then compared with a join token."""
    context = Pinned(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = server
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_context(where: Path, name: str, *, needs_certificate: bool = True) -> ssl.SSLContext:
    """For connections that others make. Unless `needs_certificate`, one may come without a certificate, but not with a wrong one.

    Raises InvalidSettings.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _prepare(context, where, name)
    context.verify_mode = ssl.CERT_REQUIRED if needs_certificate else ssl.CERT_OPTIONAL
    # A session that is resumed would prove who somebody was, not who they are.
    context.num_tickets = 0
    return context


def renew(context: ssl.SSLContext, where: Path, name: str) -> None:
    """Use the key and the certificate that are in the folder now. Raises InvalidSettings; then the old ones stay."""
    path = folder.pair(where, name)
    folder.secret(path)
    try:
        # Tried first on another context: a certificate without its key would leave this one without both.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(path)
        context.load_cert_chain(path)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise InvalidSettings(f"{path} holds no key with its certificate: join the cluster again") from error


def _prepare(context: ssl.SSLContext, where: Path, name: str) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    ca = folder.public(where / folder.CA_CERTIFICATE)
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise InvalidSettings(f"{where / folder.CA_CERTIFICATE} is no certificate: join the cluster again") from error
    renew(context, where, name)
