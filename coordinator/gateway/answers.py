"""Answers of the gateway: JSON, compressed if the client asks for it, and errors with a status that shows whose fault it is."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import hdrs, web

from potluck.errors import (
    Conflict,
    InvalidSettings,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    Overloaded,
    PotluckError,
    TimedOut,
    TooLarge,
)

STATUS: dict[type[PotluckError], int] = {
    NotAuthenticated: 401,
    NotAllowed: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    Overloaded: 429,
    TimedOut: 504,
}
"""Statuses of errors that have their own; see `status_of`."""
COMPRESSED_BYTES = 1024
"""Smaller answers are sent as they are: compressing them takes longer than sending them."""
_IN_THREAD_BYTES = 256 * 1024
_LEVEL = 1

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Problem(msgspec.Struct):
    """The body of every error, in all protocols here."""

    error: str


def encoded(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`value` (structs and plain values) as JSON; numbers that are not finite are null, as JSON has none."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, headers=headers, content_type="application/json"
    )


async def compressed(request: web.Request, response: web.Response) -> web.Response:
    """`response`, its body compressed as the client accepts it: gzip or deflate (RFC 9110, 12.5.3)."""
    accepted = request.headers.get("Accept-Encoding")
    body = response.body
    if accepted is None or not isinstance(body, bytes) or len(body) < COMPRESSED_BYTES:
        return response
    coding = _coding(accepted)
    if coding:
        squeeze = _gzip if coding == "gzip" else _deflate
        response.body = await asyncio.to_thread(squeeze, body) if len(body) >= _IN_THREAD_BYTES else squeeze(body)
        response.headers["Content-Encoding"] = coding
        response.headers["Vary"] = "Accept-Encoding"
    return response


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, _LEVEL)


def _deflate(body: bytes) -> bytes:
    return zlib.compress(body, _LEVEL)


def _coding(accepted: str) -> str:
    """The first coding that we know and the client accepts; "": none."""
    for part in accepted.split(","):
        name, _, rest = part.strip().partition(";")
        refused = rest.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000")
        if name.strip().lower() in ("gzip", "deflate") and not refused:
            return name.strip().lower()
    return ""


def guarded(handler: Handler) -> Handler:
    """`handler`, with its errors turned into answers."""

    async def answered(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except PotluckError as error:
            return refused(error)

    return answered


def refused(error: PotluckError) -> web.Response:
    """The answer that an error is."""
    found = problem(status_of(error), error.message, error.retry_after_seconds)
    if isinstance(error, NotAuthenticated):
        found.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"  # RFC 6750, 3
    return found


@web.middleware
async def in_words(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: unknown paths, and methods that a path does not take, are answered like all errors."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        if request.path.startswith("/v1/"):  # as TensorFlow Serving has it
            return problem(400, f"Malformed request: {request.method} {request.path}")
        return problem(404, f"there is no {request.path[:200]} here: see /openapi.json for what there is")
    except web.HTTPMethodNotAllowed as error:
        found = problem(405, f"{request.path[:200]} takes {', '.join(sorted(error.allowed_methods))}")
        found.headers["Allow"] = error.headers["Allow"]
        return found


def status_of(error: PotluckError) -> int:
    """503 if a retry may help, 500 for our own fault (and for unknown codes), else 400."""
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return status
    if error.retryable:
        return 503
    return 500 if type(error) is PotluckError or isinstance(error, InvalidSettings) else 400


def problem(status: int, text: str, retry_after_seconds: float | None = None) -> web.Response:
    headers = {"Retry-After": str(max(1, round(retry_after_seconds)))} if retry_after_seconds else None
    return encoded(Problem(text), status, headers)
