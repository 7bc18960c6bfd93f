"""Who the other end of a connection is, by the certificate that it showed in the handshake."""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from functools import lru_cache
from typing import Any

from aiohttp import web

from potluck.wire.identities import is_identity


def kept(name: str) -> Any:
    """The key of something that is kept with a request: a text, for which aiohttp warns since it has keys of its own (3.14)."""
    kind = getattr(web, "RequestKey", None)
    return name if kind is None else kind(name, object)


ASKER = kept("potluck asker")
"""Where a request keeps the identity of its sender, if that was found in another way than by a certificate."""
_NAME = "commonName"


def is_secured(transport: asyncio.BaseTransport | None) -> bool:
    """Whether the connection has TLS."""
    return transport is not None and transport.get_extra_info("ssl_object") is not None


def peer_identity(transport: asyncio.BaseTransport | None) -> str:
    """The identity in the peer's certificate; "": it showed none, or one that has ended since, its name is no identity, there is no TLS,
    or it has left.

    OpenSSL has checked the certificate against the cluster's CA. Whether its owner is a member still is for others to say.
    """
    shown: dict[str, Any] | None = None if transport is None else transport.get_extra_info("peercert")
    return identity_of(shown) if shown else ""


def ends_at(transport: asyncio.BaseTransport | None) -> float:
    """When the peer's certificate ends (Unix time), and with it what this connection proves; infinite: it showed none."""
    return _end((None if transport is None else transport.get_extra_info("peercert")) or {})


def asker(request: web.BaseRequest) -> str:
    """The identity of the sender of an HTTP request, by its bearer token if it has one, else as `peer_identity`; "": not known."""
    known: str = request.get(ASKER, "")
    return known or peer_identity(request.transport)


def identity_of(certificate: dict[str, Any], now: float | None = None) -> str:
    """The identity in a certificate, which is as `ssl.SSLSocket.getpeercert` gives it; "": it has ended, or there is not exactly one name
    in it. `now`: Unix time; None: by our clock.

    OpenSSL looks at the time in the handshake only, and a connection may last longer than its certificate. Who was removed is remembered
    until then, and the name may be given to somebody else after it.
    """
    if _end(certificate) < (time.time() if now is None else now):
        return ""
    names = [value for parts in certificate.get("subject", ()) for key, value in parts if key == _NAME]
    return names[0] if len(names) == 1 and is_identity(names[0]) else ""


def _end(certificate: dict[str, Any]) -> float:
    end = certificate.get("notAfter")
    return math.inf if end is None else _seconds(end)


@lru_cache(4096)  # to read one takes 7 us, and each request looks several times
def _seconds(text: str) -> float:
    return float(ssl.cert_time_to_seconds(text))
