"""GET over mTLS in threads with blocking sockets, for blobs. On the event loop, each record of 16 KiB is copied four times on its way
through asyncio and aiohttp; here OpenSSL decrypts it to where it is wanted, beside the loop.

Errors are those that aiohttp raises for the same trouble, so that whoever asks needs to know only one kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from potluck.credentials import Credentials

T = TypeVar("T")

AT_ONCE = 32
"""Most requests at a time: each takes a thread."""
KEPT_SECONDS = 15.0
"""How long a connection is kept for the next request, as aiohttp does."""


class BulkClient:
    """Made and used on one event loop; an idle one has no connections. Only for credentials of a closed cluster."""

    def __init__(self, credentials: Credentials, *, connect_seconds: float, idle_seconds: float) -> None:
        assert credentials.client_tls is not None, "plain connections are aiohttp's"
        self._tls = credentials.client_tls
        self._headers = credentials.headers
        self._connect_seconds = connect_seconds
        self._idle_seconds = idle_seconds
        self._threads = ThreadPoolExecutor(AT_ONCE, "bulk")
        self._places = asyncio.Semaphore(AT_ONCE)
        self._kept: dict[str, list[tuple[float, http.client.HTTPSConnection]]] = {}
        """Connections without a request, by address: until when each is kept. The last used comes last."""
        self._under_way: dict[_Exchange, asyncio.Future[Any]] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def get(
        self,
        base_url: str,
        path: str,
        headers: dict[str, str],
        read: Callable[[http.client.HTTPResponse], T],
        limit_seconds: float,
    ) -> T:
        """What `read` makes of the answer to a GET; it runs in a thread, which may outlast this call if it is cancelled.

        Raises aiohttp.ClientError, also for an address without TLS; TimeoutError; OSError; ValueError; and what `read` raises.
        """
        await self._places.acquire()
        exchange = _Exchange(
            base_url, path, self._headers | headers, self._tls, self._connect_seconds, self._idle_seconds
        )
        exchange.connection = self._take(base_url)
        work = asyncio.get_running_loop().run_in_executor(self._threads, exchange.run, read)
        self._under_way[exchange] = work
        work.add_done_callback(lambda work: self._done(exchange, work))
        try:
            async with asyncio.timeout(limit_seconds):
                return await asyncio.shield(work)
        finally:
            exchange.give_up()

    async def close(self) -> None:
        """Close all connections, and wait for their threads: about as long as a connection may take."""
        for exchange in self._under_way:
            exchange.give_up()
        if self._under_way:
            await asyncio.wait(self._under_way.values())
        if self._sweep is not None:
            self._sweep.cancel()
        self._forget(float("inf"))
        self._threads.shutdown(wait=False)

    def _done(self, exchange: _Exchange, work: asyncio.Future[Any]) -> None:
        self._places.release()
        del self._under_way[exchange]
        failed = work.cancelled() or work.exception() is not None
        connection = exchange.release()
        if connection is None:
            return
        if failed:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        self._kept.setdefault(exchange.base_url, []).append((loop.time() + KEPT_SECONDS, connection))
        if self._sweep is None:
            self._sweep = loop.call_later(KEPT_SECONDS, self._forget_old)

    def _take(self, base_url: str) -> http.client.HTTPSConnection | None:
        kept = self._kept.get(base_url)
        if not kept:
            return None
        _, connection = kept.pop()
        if not kept:
            del self._kept[base_url]
        return connection

    def _forget_old(self) -> None:
        loop = asyncio.get_running_loop()
        self._forget(loop.time())
        self._sweep = loop.call_later(KEPT_SECONDS, self._forget_old) if self._kept else None

    def _forget(self, now: float) -> None:
        for base_url, kept in list(self._kept.items()):
            for until, connection in kept:
                if until <= now:
                    connection.close()
            self._kept[base_url] = [one for one in kept if one[0] > now]
            if not self._kept[base_url]:
                del self._kept[base_url]


class _Exchange:
    """One request and its answer, in a thread. `give_up` may be called in any other."""

    def __init__(
        self,
        base_url: str,
        path: str,
        headers: dict[str, str],
        tls: ssl.SSLContext,
        connect_seconds: float,
        idle_seconds: float,
    ) -> None:
        self.base_url = base_url
        self.connection: http.client.HTTPSConnection | None = None
        self._path = path
        self._headers = headers
        self._tls = tls
        self._connect_seconds = connect_seconds
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._ended = False

    def run(self, read: Callable[[http.client.HTTPResponse], T]) -> T:
        response = self._asked()
        try:
            return read(response)
        except TimeoutError as error:
            raise self._silent() from error
        except http.client.HTTPException as error:
            raise aiohttp.ClientPayloadError(_words(error)) from error
        finally:
            # What is left of the answer would come before the next one.
            if (not response.isclosed() or response.will_close) and self.connection is not None:
                self.connection.close()
                self.connection = None

    def give_up(self) -> None:
        """End it if it is under way: the thread's next read fails."""
        with self._lock:
            if self._ended or self.connection is None or self.connection.sock is None:
                self._ended = True
                return
            self._ended = True
            with contextlib.suppress(OSError):  # it is not connected yet, or not any more
                # Not SSLSocket's own: that would let the thread read on, without TLS.
                socket.socket.shutdown(self.connection.sock, socket.SHUT_RDWR)

    def release(self) -> http.client.HTTPSConnection | None:
        """The connection, once `run` has ended."""
        with self._lock:
            ended, self._ended = self._ended, True
            connection, self.connection = self.connection, None
        if ended and connection is not None:
            connection.close()
            return None
        return connection

    def _asked(self) -> http.client.HTTPResponse:
        if self.connection is not None:
            try:
                return self._ask(self.connection)
            except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLError):
                self.connection.close()  # closed by the other side, as nobody asked
        return self._ask(self._connected())

    def _ask(self, connection: http.client.HTTPSConnection) -> http.client.HTTPResponse:
        try:
            connection.request("GET", self._path, headers=self._headers)
            return connection.getresponse()
        except TimeoutError as error:
            raise self._silent() from error
        except http.client.RemoteDisconnected:
            raise
        except http.client.HTTPException as error:
            raise aiohttp.ClientPayloadError(_words(error)) from error

    def _connected(self) -> http.client.HTTPSConnection:
        parts = urlsplit(self.base_url)
        if parts.scheme != "https" or parts.hostname is None:
            raise aiohttp.NonHttpUrlClientError(self.base_url)
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=self._connect_seconds, context=self._tls
        )
        try:
            connection.connect()
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError(f"no connection to {self.base_url}") from error
        with self._lock:
            if self._ended:
                connection.close()
                raise ConnectionAbortedError("given up")
            self.connection = connection
        connection.sock.settimeout(self._idle_seconds)
        return connection

    def _silent(self) -> aiohttp.SocketTimeoutError:
        return aiohttp.SocketTimeoutError(f"{self.base_url} is silent")


def _words(error: http.client.HTTPException) -> str:
    return str(error) or type(error).__name__
