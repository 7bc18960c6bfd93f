"""Who may ask this node's HTTP server in a closed cluster: members only, each only for what its kind needs.

OpenSSL has checked the certificate in the handshake. Here it is looked at whose it is, at each request, and whether its owner was removed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from potluck.logs import Seldom, fields
from potluck.net.peers import identity_of

log = logging.getLogger(__name__)

COMPUTING_ROLES = ("user", "operator")
LOG_SECONDS = 60.0


def refusal(certificate: dict[str, Any], method: str, path: str, is_revoked: Callable[[str], bool]) -> str:
    """Why whoever has this certificate (as `ssl.SSLSocket.getpeercert` gives it) may not ask this; "": it may."""
    identity = identity_of(certificate)
    if not identity:
        return "your certificate names no member, or has ended since this connection was made"
    if is_revoked(identity):
        return f"{identity} was removed from the cluster"
    kind = identity.partition(":")[0]
    if method == "POST" and path == "/inputs":
        return "" if _computes(certificate, kind) else f"{identity} may send no inputs: that needs the role 'user'"
    if kind in ("node", "coordinator"):
        return ""
    # which blobs: `potluck.blobs.rights`
    if method in ("GET", "HEAD") and path.startswith("/blobs/") and _computes(certificate, kind):
        return ""
    return f"{identity} gets nothing from a node: ask the coordinator, which has the results"


def _computes(certificate: dict[str, Any], kind: str) -> bool:
    """Whether this is a client that may ask models."""
    roles = [
        value for parts in certificate.get("subject", ()) for key, value in parts if key == "organizationalUnitName"
    ]
    return kind == "client" and len(roles) == 1 and roles[0] in COMPUTING_ROLES


class Guests:
    """The door of a node's HTTP server: `middleware` lets requests in, and `end` ends the connections of who was removed."""

    def __init__(self, is_revoked: Callable[[str], bool], knows: Callable[[], bool]) -> None:
        """`knows`: whether the list of removed members has come. Until then nobody is let in: it could be one of them."""
        self._is_revoked = is_revoked
        self._knows = knows
        self._inside: WeakKeyDictionary[asyncio.Transport, str] = WeakKeyDictionary()
        """Who is at the other end of each connection that asked something."""
        self._seldom = Seldom(LOG_SECONDS)

    @property
    def middleware(self) -> Callable[..., Awaitable[web.StreamResponse]]:
        @web.middleware
        async def let_in(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            transport = request.transport
            if transport is None:
                raise ConnectionResetError("the client has left")
            if not self._knows():
                waiting = web.json_response(
                    {"error": "this node has not heard yet who was removed from the cluster"}, status=503
                )
                waiting.force_close()
                return waiting
            certificate = transport.get_extra_info("peercert") or {}
            if reason := refusal(certificate, request.method, request.path, self._is_revoked):
                if (more := self._seldom.due(reason)) is not None:
                    log.warning("request refused %s", fields(peer=request.remote, reason=reason, more=more or None))
                answer = web.json_response({"error": reason}, status=403)
                answer.force_close()
                return answer
            self._inside[transport] = identity_of(certificate)
            return await handler(request)

        return let_in

    def end(self) -> None:
        """End every connection of members that were removed, also in the middle of an answer."""
        for transport, identity in list(self._inside.items()):
            if self._is_revoked(identity):
                log.warning("connection ended: its member was removed %s", fields(peer=identity))
                transport.abort()
