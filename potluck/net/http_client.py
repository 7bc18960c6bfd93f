"""Sends our HTTP requests: one way to make a session, and tests of whether a server is there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from aiohttp import hdrs

from potluck.credentials import Credentials
from potluck.errors import Unavailable

_READ_BYTES = 1 << 18
_AS_IT_IS = {hdrs.ACCEPT_ENCODING: "identity"}


class _OnlyTls(aiohttp.TCPConnector):
    """Addresses come in messages: none may talk a member of a closed cluster into plain connections."""

    allowed_protocol_schema_set = frozenset({"https"})


def session(credentials: Credentials, *, connect_seconds: float, idle_seconds: float) -> aiohttp.ClientSession:
    """A session, as an async context manager. Its requests say who we are, and may last as long as bytes come. It decompresses nothing.

    With credentials of a closed cluster, an `http://` address raises aiohttp.ClientError.
    """
    tls = credentials.client_tls
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector() if tls is None else _OnlyTls(ssl=tls),
        headers=credentials.headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=idle_seconds),
        auto_decompress=False,
        read_bufsize=_READ_BYTES,
    )


async def is_there(address: str, credentials: Credentials, limit_seconds: float) -> bool:
    """Whether a server at this address takes our connection in time, whatever it answers."""
    connecting = aiohttp.ClientTimeout(total=None, connect=limit_seconds)
    try:
        async with asyncio.timeout(2 * limit_seconds):
            async with _brief(credentials, limit_seconds) as http:
                async with http.head(address, timeout=connecting, allow_redirects=False):
                    return True
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.NonHttpUrlClientError, ValueError):
        # ValueError: not an address
        return False
    except (aiohttp.ClientError, TimeoutError):
        return True  # the server took the connection, but then broke it off or did not answer


async def answers(url: str, credentials: Credentials, limit_seconds: float) -> bool:
    """Whether a GET of `url` is answered with 200."""
    try:
        async with asyncio.timeout(limit_seconds), _brief(credentials, limit_seconds) as http:
            async with http.get(url, headers=_AS_IT_IS, allow_redirects=False) as response:
                return response.status == 200
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return False


async def post_json(url: str, value: Any, credentials: Credentials, limit_seconds: float) -> Any:
    """Post a value as JSON, and return the JSON of the answer. Raises Unavailable."""
    try:
        async with asyncio.timeout(limit_seconds), _brief(credentials, limit_seconds) as http:
            async with http.post(url, json=value, headers=_AS_IT_IS, allow_redirects=False) as response:
                said = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Unavailable(f"{url} does not answer: {error or type(error).__name__}") from error
    if response.status != 200:
        raise Unavailable(f"{url} answers {response.status}: {said[:300].decode(errors='replace')}")
    try:
        return json.loads(said)
    except ValueError as error:
        raise Unavailable(f"{url} answers with something else than JSON: {error}") from error


def _brief(credentials: Credentials, limit_seconds: float) -> aiohttp.ClientSession:
    return session(credentials, connect_seconds=limit_seconds, idle_seconds=limit_seconds)
