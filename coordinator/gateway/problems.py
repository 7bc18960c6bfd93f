"""Errors as all faces of the gateway answer them: `{"error": "..."}` with a status that says whose fault it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from potluck.errors import Conflict, InvalidSettings, NotFound, Overloaded, PotluckError, TimedOut, TooLarge

BODY_LIMIT_BYTES = 4 * 2**20
STATUS: dict[type[PotluckError], int] = {NotFound: 404, Conflict: 409, TooLarge: 413, Overloaded: 429, TimedOut: 504}
"""Of errors with a status of their own; see `status_of`."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guarded(handler: Handler) -> Handler:
    """`handler`, with what it raises as an answer."""

    async def answered(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return problem(413, f"the body is over {BODY_LIMIT_BYTES} bytes", None)
        except PotluckError as error:
            return problem(status_of(error), error.message, error.retry_after_seconds)

    return answered


def status_of(error: PotluckError) -> int:
    """503 for what may go better another time, 500 for our own fault (also codes that are not known here), else 400."""
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return status
    if error.retryable:
        return 503
    return 500 if type(error) is PotluckError or isinstance(error, InvalidSettings) else 400


def readiness(said: dict[str, Any], reason: str) -> web.Response:
    """`reason`: why it is not ready."""
    if reason:
        return web.json_response(said | {"ready": False, "error": reason}, status=503)
    return web.json_response(said | {"ready": True})


def problem(status: int, text: str, retry_after_seconds: float | None) -> web.Response:
    headers = {"Retry-After": str(max(1, round(retry_after_seconds)))} if retry_after_seconds else None
    return web.json_response({"error": text}, status=status, headers=headers)
