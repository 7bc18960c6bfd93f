"""Who has a request under way at the coordinator's HTTP server, so that it ends when they are removed.

Each new request is judged by who asks. But an answer may last for hours (events that are followed), and so may an upload.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from potluck.net.peers import asker


class Visitors:
    """Its middleware stands behind the one that finds out who asks."""

    def __init__(self) -> None:
        self._here: defaultdict[str, set[asyncio.Transport]] = defaultdict(set)

    def middleware(self) -> Middleware:
        """Notes each request while it is answered."""

        @web.middleware
        async def noted(request: web.Request, handler: Handler) -> web.StreamResponse:
            identity, transport = asker(request), request.transport
            if not identity or transport is None:
                return await handler(request)
            self._here[identity].add(transport)
            try:
                return await handler(request)
            finally:
                self._here[identity].discard(transport)
                if not self._here[identity]:
                    del self._here[identity]

        return noted

    def here(self, identity: str) -> int:
        """How many connections on which it has a request under way."""
        return len(self._here.get(identity, ()))

    def end_others(self, stands: Callable[[str], bool]) -> int:
        """Break off the connections of those who stand no more: their certificate or bearer token ended meanwhile. Returns how many."""
        return sum(self.end(identity) for identity in list(self._here) if not stands(identity))

    def end(self, identity: str) -> int:
        """Break off the connections on which this identity has a request; returns how many."""
        ended = list(self._here.get(identity, ()))
        for transport in ended:
            transport.abort()
        return len(ended)
