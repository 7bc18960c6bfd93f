"""An aiohttp server on a socket that is bound already, as an async context manager."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.typedefs import Middleware

SHUTDOWN_SECONDS = 2.0
_READ_BYTES = 1 << 18
"""How much of a body may wait to be read before its sender has to."""


@asynccontextmanager
async def serve_http(
    sock: socket.socket, routes: Sequence[web.RouteDef], middlewares: Sequence[Middleware] = ()
) -> AsyncIterator[None]:
    """Serve `routes` within the block; requests under way get SHUTDOWN_SECONDS at its end.

    A handler whose client has gone is cancelled.
    """
    app = web.Application(middlewares=middlewares)
    app.add_routes(routes)
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=SHUTDOWN_SECONDS,
        handler_cancellation=True,
        read_bufsize=_READ_BYTES,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()
