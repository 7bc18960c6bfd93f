"""An aiohttp server on a socket that is bound already, as an async context manager."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger
from aiohttp.typedefs import Middleware

from potluck.logs import fields

SHUTDOWN_SECONDS = 2.0
_READ_BYTES = 1 << 18
"""How much of a body may wait to be read before its sender has to."""


class _Malformed(logging.Filter):
    """What a client sends that is no HTTP is answered with 400, and is one line in the log: it is no fault of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError | web.RequestPayloadError):
            return True
        record.msg, record.args = "request is not HTTP %s", (fields(reason=words(error)),)
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        return server_logger.isEnabledFor(logging.INFO)


server_logger.addFilter(_Malformed())


def words(error: Exception) -> str:
    """What aiohttp says of a request that cannot be read, in one line and without the status before it."""
    return " ".join(str(error).removeprefix("400, message:").split())[:200]


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
