"""A part of a blob from one holder: over aiohttp on plain connections, over mTLS in threads."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from functools import partial
from typing import Protocol

import aiohttp
from aiohttp import hdrs

from potluck.errors import Unavailable
from potluck.net.bulk_client import BulkClient
from potluck.wire.values import BlobRef


@dataclass(frozen=True)
class Timings:
    """How long to wait. A chunk may take `idle_seconds`, plus the time for its size at `slowest_bytes_per_second`."""

    connect_seconds: float = 3.0
    idle_seconds: float = 10.0
    slowest_bytes_per_second: float = 16 * 1024.0
    hedge_seconds: float = 2.0
    """A chunk under way for this long is asked of a second holder too, once no other chunks are left to ask for."""
    rest_seconds: float = 0.2
    """How long a holder rests after it failed. It doubles each time."""
    failures_limit: int = 3
    """After this many failures in a row, a holder is not asked any more."""
    distrust_seconds: float = 600.0
    """How long a holder that sent wrong bytes is asked only if no other is left."""

    def for_part(self, size: int) -> float:
        """How long a part of this size may take."""
        return self.connect_seconds + self.idle_seconds + size / self.slowest_bytes_per_second


TIMINGS = Timings()


Headers = Mapping[str, str] | Message


class HolderFailed(Unavailable):
    """Why a request to one holder failed; `final`: asking again cannot help. Never leaves this package."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class Parts(Protocol):
    """Where parts of blobs come from."""

    async def get(self, base_url: str, ref: BlobRef, start: int, stop: int) -> bytearray:
        """The bytes from `start` to `stop`, but never more, whatever is sent. Raises HolderFailed."""


class PlainParts:
    """With aiohttp: over plain connections, and to servers of the world outside."""

    def __init__(self, session: aiohttp.ClientSession, timings: Timings) -> None:
        self._session = session
        self._timings = timings

    async def get(self, base_url: str, ref: BlobRef, start: int, stop: int) -> bytearray:
        try:
            async with asyncio.timeout(self._timings.for_part(stop - start)):
                async with self._session.get(
                    base_url + _path(ref), headers=_headers(start, stop), allow_redirects=False
                ) as response:
                    return await self._read(response, ref, start, stop)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, AssertionError) as error:
            # The last two come from odd addresses or answers, which aiohttp and the resolver do not expect.
            raise HolderFailed(explained(error, self._timings)) from error

    async def _read(self, response: aiohttp.ClientResponse, ref: BlobRef, start: int, stop: int) -> bytearray:
        _check(response.status, response.reason or "", response.headers, ref)
        skip = start if response.status == 200 else 0  # a server without Range sends all
        found = bytearray()
        async for data in response.content.iter_any():
            if skip >= len(data):
                skip -= len(data)
                continue
            found += data[skip:]
            skip = 0
            if len(found) >= stop - start:
                break
        if len(found) < stop - start:
            raise HolderFailed(_TOO_FEW.format(len(found), stop - start))
        del found[stop - start :]
        return found


class TlsParts:
    """Over mTLS: decrypted in threads."""

    def __init__(self, client: BulkClient, timings: Timings) -> None:
        self._client = client
        self._timings = timings

    async def get(self, base_url: str, ref: BlobRef, start: int, stop: int) -> bytearray:
        read = partial(_read_in_thread, ref, start, stop)
        try:
            return await self._client.get(
                base_url, _path(ref), _headers(start, stop), read, self._timings.for_part(stop - start)
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise HolderFailed(explained(error, self._timings)) from error


_TOO_FEW = "sent {} bytes where {} were asked for"
_SKIP_BYTES = 1 << 16


def _read_in_thread(ref: BlobRef, start: int, stop: int, response: http.client.HTTPResponse) -> bytearray:
    _check(response.status, response.reason, response.headers, ref)
    if response.status == 200:  # a server without Range sends all
        skipped = memoryview(bytearray(min(start, _SKIP_BYTES)))
        for at in range(0, start, _SKIP_BYTES):
            _fill(response, skipped[: start - at])
    found = bytearray(stop - start)
    _fill(response, memoryview(found))
    return found


def _fill(response: http.client.HTTPResponse, into: memoryview) -> None:
    """Raises IncompleteRead if the connection ends before, and HolderFailed if the answer does."""
    came = 0
    while came < len(into):
        size = response.readinto(into[came:])
        if not size:
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            raise HolderFailed(_TOO_FEW.format(came, len(into)))
        came += size


def _path(ref: BlobRef) -> str:
    return f"/blobs/{ref.sha256}"


def _headers(start: int, stop: int) -> dict[str, str]:
    return {hdrs.RANGE: f"bytes={start}-{stop - 1}", hdrs.ACCEPT_ENCODING: "identity"}


def _check(status: int, reason: str, headers: Headers, ref: BlobRef) -> None:
    """Raises HolderFailed unless the answer is (a part of) a blob of this size."""
    if status not in (200, 206):
        busy = status >= 500 or status in (408, 425, 429)
        raise HolderFailed(f"answered {status} {reason}", final=not busy)
    total = _total_size(status, headers)
    if total is not None and total != ref.size:
        raise HolderFailed(f"has it with {total} bytes instead of {ref.size}", final=True)


def _total_size(status: int, headers: Headers) -> int | None:
    """Size of the whole blob, if the answer tells it (RFC 9110, 14.4)."""
    if status == 200:
        text = headers.get(hdrs.CONTENT_LENGTH, "")
    else:
        text = headers.get(hdrs.CONTENT_RANGE, "").rpartition("/")[2]
    return int(text) if text.isascii() and text.isdigit() else None


def explained(error: Exception, timings: Timings) -> str:
    """Why a connection failed, in words."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {timings.connect_seconds:g} s"
    if isinstance(error, aiohttp.ServerTimeoutError):
        return f"no byte came for {timings.idle_seconds:g} s"
    if isinstance(error, TimeoutError):
        return f"slower than {timings.slowest_bytes_per_second:g} bytes a second"
    if isinstance(error, aiohttp.ClientConnectorDNSError | socket.gaierror):
        return "its name is not known here"
    if isinstance(error, ConnectionRefusedError) or isinstance(
        getattr(error, "os_error", None), ConnectionRefusedError
    ):
        return "nothing listens there (connection refused)"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | ConnectionResetError):
        return "broke off the connection"
    return str(error) or type(error).__name__
