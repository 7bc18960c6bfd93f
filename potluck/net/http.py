"""An aiohttp server on a socket that is bound already, as an async context manager; and how long bodies may take."""

from __future__ import annotations

import asyncio
import logging
import re
import resource
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger
from aiohttp.typedefs import Middleware

from potluck.credentials import Credentials
from potluck.errors import InvalidRequest
from potluck.logs import SeldomFilter, fields
from potluck.net.peers import asker, ends_at, is_secured, peer_identity
from potluck.settings import HttpSettings
from potluck.wire.identities import ANONYMOUS, CALLER_HEADER, is_identity

SHUTDOWN_SECONDS = 2.0
LEAST_RATE = 1024
"""The lowest rate of a body, in bytes a second, after the time that `Patience` grants."""
TOO_SLOW = f"the body comes too slowly: no byte for {{:g}} s, or less than {LEAST_RATE} bytes a second"
_MEDIA_TYPE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,127}/[!#$%&'*+.^_`|~0-9A-Za-z-]{1,127}")
"""RFC 9110, 8.3.1; the lengths are those of RFC 6838, 4.2."""
_READ_BYTES = 1 << 18
"""How much of a body is buffered before its sender has to wait."""
_RESERVED_FILES = 256
"""Open files for all but connections: journal, bus, engines, downloads."""
_FILES_EACH = 2
"""Open files of each connection: its socket, and the file that it sends or receives."""
_BACKLOG = 128
HANDSHAKE_SECONDS = 10.0
"""How long a TLS handshake may take, and the farewell of TLS at the end."""
HALF_OPEN_LIMIT = 128
"""Most connections whose TLS handshake is not done. Each takes a quarter of a megabyte."""
STRANGERS_LIMIT = 256
"""Most connections over TLS of those who have not shown who they are. Each takes a quarter of a megabyte, and costs them nothing."""
STRANGERS_SHARE = 4
"""And they have at most this part of all connections: a quarter."""
_LAST_SECONDS = 120.0
"""So long before the peer's certificate ends, a connection is closed after its answer. It is more than a connection may be idle."""
_ACCEPT_AGAIN_SECONDS = 1.0
_SWEEPS = 4
"""How many sweeps there are in the time that a head may take."""
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"

log = logging.getLogger(__name__)


class _Malformed(logging.Filter):
    """Makes one line in the log of a request that is not HTTP: it is answered with 400, and is not our fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError | web.RequestPayloadError):
            return True
        record.msg, record.args = "request is not HTTP %s", (fields(reason=words(error)),)
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        return server_logger.isEnabledFor(logging.INFO)


server_logger.addFilter(_Malformed())
for _logger in (server_logger, log):
    _logger.addFilter(SeldomFilter())


def words(error: Exception) -> str:
    """What aiohttp says of a request that cannot be read, in one line and without the status before it."""
    return " ".join(str(error).removeprefix("400, message:").split())[:200]


def caller_of(request: web.BaseRequest) -> str:
    """The identity that the sender proves over TLS, or only gives without; ANONYMOUS: none. Raises InvalidRequest for a malformed one."""
    if is_secured(request.transport):
        return asker(request) or ANONYMOUS
    said = request.headers.getall(CALLER_HEADER, ())
    if not said:
        return ANONYMOUS
    if len(said) > 1 or not is_identity(said[0]):
        raise InvalidRequest(
            f"{CALLER_HEADER} is {', '.join(said)[:80]!r}, which is no identity: write role:name, as in client:ann"
        )
    return said[0]


def media_type(request: web.BaseRequest) -> str:
    """The type of the body, without parameters: `application/octet-stream` where none is given, or none that can be.

    aiohttp's `content_type` takes half a second for a header that is made for it, and the loop waits.
    """
    found = _MEDIA_TYPE.fullmatch(request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip())
    return found[0].lower() if found else "application/octet-stream"


class Patience:
    """How long we wait for a body: `idle_seconds` in all. Each LEAST_RATE bytes that come give a second back, but never more than
    `idle_seconds` are left: a sender that sent much at once may not be slow for hours.

    Only the time in which we wait for the sender counts, not the time in which we write or hash what came.
    """

    def __init__(self, idle_seconds: float) -> None:
        self.idle_seconds = idle_seconds
        self._left = idle_seconds

    def left(self) -> float:
        """How many seconds the next piece may take."""
        return self._left

    def came(self, size: int, seconds: float) -> None:
        """Count a piece of `size` bytes that took `seconds` to come."""
        self._left = min(self.idle_seconds, self._left - seconds + size / LEAST_RATE)


class _Peer:
    """The connections from one address: how many, and those that wait for a request, the longest first."""

    def __init__(self) -> None:
        self.open = 0
        self.waiting: dict[_Connection, None] = {}
        self.strangers: dict[_Connection, None] = {}
        """Those that have not shown who they are, the oldest first."""


class _Door:
    """Limits connections. If it is full, a connection that waits for its next request is closed, or else the new one.

    In a closed cluster, strangers have few places and lose them first: whoever has shown who they are never makes room for one.
    """

    def __init__(self, limits: HttpSettings) -> None:
        self.limits = limits
        self.open = 0
        self.inside: set[_Connection] = set()
        self._peers: defaultdict[str, _Peer] = defaultdict(_Peer)
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        by_files = limits.connections if soft < 0 else max(2, (soft - _RESERVED_FILES) // _FILES_EACH)
        self._connections = min(limits.connections, by_files)
        self._strangers_limit = max(1, min(STRANGERS_LIMIT, self._connections // STRANGERS_SHARE))
        self.strangers = 0

    def enter(self, connection: _Connection) -> bool:
        """Whether there is room for it; if so, it is counted."""
        if connection.stranger and self.strangers >= self._strangers_limit and not self._free_stranger(connection.peer):
            self._left(connection.peer)
            return False
        peer = self._peers[connection.peer]
        if peer.open >= self.limits.connections_per_address and not self._free(peer, connection.peer):
            return False
        if self.open >= self._connections and not (self.strangers and self._free_stranger(connection.peer)):
            # One of the address that has most of them: a client must not lose connections because another holds many.
            host, most = max(self._peers.items(), key=lambda item: len(item[1].waiting))
            if connection.stranger or not self._free(most, host):
                self._left(connection.peer)
                return False
        peer = self._peers[connection.peer]
        peer.open += 1
        self.open += 1
        self.inside.add(connection)
        if connection.stranger:
            peer.strangers[connection] = None
            self.strangers += 1
        return True

    def leave(self, connection: _Connection) -> None:
        self.knows(connection)
        peer = self._peers[connection.peer]
        peer.waiting.pop(connection, None)
        self.inside.discard(connection)
        peer.open -= 1
        self.open -= 1
        self._left(connection.peer)

    def waits(self, connection: _Connection) -> None:
        waiting = self._peers[connection.peer].waiting
        waiting.pop(connection, None)
        waiting[connection] = None

    def works(self, connection: _Connection) -> None:
        self._peers[connection.peer].waiting.pop(connection, None)

    def knows(self, connection: _Connection) -> None:
        """It is no stranger's any more."""
        strangers = self._peers[connection.peer].strangers
        self.strangers -= connection in strangers
        strangers.pop(connection, None)

    async def sweep(self) -> NoReturn:
        """Close connections whose head takes too long, or that never sent a byte. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.limits.header_seconds / _SWEEPS)
            oldest, dumb = loop.time() - self.limits.header_seconds, loop.time() - self.limits.idle_seconds
            waiting = [one for peer in self._peers.values() for one in peer.waiting]
            for connection in waiting:
                if connection.began_at < oldest:
                    log.info("request is not whole in time %s", fields(peer=connection.peer))
                    connection.force_close()
                elif not connection.heard and connection.came_at < dumb:  # aiohttp before 3.14.4 waits for ever
                    connection.force_close()

    def _free(self, peer: _Peer, host: str) -> bool:
        """Close the connection that has waited longest, if one waits; returns whether one did."""
        connection = next((one for one in peer.waiting if one.quiet), None)
        if connection is None:
            log.warning("connection refused: all are at work %s", fields(peer=host, open=peer.open, all=self.open))
            return False
        log.warning("waiting connection closed for a new one %s", fields(peer=host, open=peer.open, all=self.open))
        connection.give_up()
        return True

    def _free_stranger(self, host: str) -> bool:
        """Close a connection of the address that has most strangers: one that waits, or one at work if the new one's address has fewer.

        Returns whether there was one. `host`: the address of the new one.
        """
        most = max(self._peers.values(), key=lambda peer: len(peer.strangers))
        victim = next((one for one in most.strangers if one in most.waiting and one.quiet), None)
        if victim is None and len(most.strangers) > len(self._peers[host].strangers) + 1:
            victim = next(iter(most.strangers))
        where = fields(peer=host, strangers=self.strangers, all=self.open)
        if victim is None:
            log.warning("stranger refused: there are many %s", where)
            return False
        log.warning("stranger closed for a new connection %s", where)
        victim.give_up()
        return True

    def _left(self, host: str) -> None:
        if not self._peers[host].open:
            del self._peers[host]


_NEVER = float("inf")


class _Connection(web.RequestHandler):
    """aiohttp's side of a connection, which tells the door when it waits and when it works."""

    def __init__(self, server: web.Server, door: _Door, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type] # as AppRunner takes it
            keepalive_timeout=door.limits.idle_seconds,
            read_bufsize=_READ_BYTES,
            auto_decompress=False,  # aiohttp would inflate without a limit: those who read bodies inflate them, within a limit
        )
        self._door = door
        self._inside = False
        self.peer = ""
        self.stranger = False
        """Whether it is over TLS, and whoever made it has shown no certificate and no bearer token."""
        self.came_at = _NEVER
        self.heard = False
        """Whether a byte ever came."""
        self.began_at = _NEVER
        """When the first byte of a request came whose head is not whole yet, by the loop's clock."""
        self._line: asyncio.Transport | None = None
        """As long as it stands; aiohttp's own `transport` is gone sooner."""
        self.raw: asyncio.Transport | None = None
        """What is below TLS; None: the connection is plain."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._line = transport
        self.peer = str((transport.get_extra_info("peername") or ("",))[0])
        self.stranger = self.raw is not None and not peer_identity(transport)
        if not self._door.enter(self):
            transport.write(_FULL)
            transport.close()
            return
        self._inside = True
        self.came_at = asyncio.get_running_loop().time()
        _bound_silence(transport, self._door.limits.idle_seconds)
        super().connection_made(transport)
        self._door.waits(self)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if self.began_at == _NEVER:
            self.began_at = asyncio.get_running_loop().time()
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._line = None
        self._out()
        super().connection_lost(exc)

    @property
    def quiet(self) -> bool:
        """Whether all answers are sent."""
        if self.raw is not None and self.raw.get_write_buffer_size():  # TLS does not count it
            return False
        return self.transport is None or self.transport.get_write_buffer_size() == 0

    def recognised(self) -> None:
        """Tell the door that this is no stranger's connection."""
        if self.stranger and self._inside:
            self._door.knows(self)
        self.stranger = False

    def works(self) -> None:
        """Tell the door that the head of a request is whole."""
        if self._inside:
            self._door.works(self)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Any:
        found = await super().finish_response(request, resp, start_time)
        self.began_at = _NEVER
        if self._inside:
            self._door.waits(self)
        return found

    def give_up(self) -> None:
        """Close it at once, and count it no longer."""
        self._out()
        self.force_close()
        if self.raw is not None:  # TLS would wait until its farewell is answered
            self.cut()

    def cut(self) -> None:
        """Let go of the connection, whatever is not sent yet."""
        if self._line is not None:
            self._line.abort()

    def _out(self) -> None:
        if self._inside:
            self._inside = False
            self._door.leave(self)


def _bound_silence(transport: asyncio.Transport, seconds: float) -> None:
    """Drop a client that takes nothing of what we send for this long (tcp(7), TCP_USER_TIMEOUT; RFC 5482)."""
    sock = transport.get_extra_info("socket")
    if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT") and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


class _Hall:
    """Where connections wait until their TLS handshake is done. If it is full, the address with most of them loses its oldest.

    asyncio's own server would count none of them.
    """

    def __init__(self, tls: ssl.SSLContext, make: Callable[[], _Connection]) -> None:
        self._tls = tls
        self._make = make
        self._waiting: defaultdict[str, dict[asyncio.Task[None], None]] = defaultdict(dict)
        """By address, the oldest first."""
        self.count = 0

    async def accept(self, sock: socket.socket) -> NoReturn:
        """Let connections in until cancelled; then those that wait are closed."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    accepted, address = await loop.sock_accept(sock)
                except OSError as error:  # as with too many open files; or the client has left
                    log.warning("connection not taken %s", fields(reason=error))
                    await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                    continue
                self._take(accepted, str(address[0]))
        finally:
            waiting = [task for tasks in self._waiting.values() for task in tasks]
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _take(self, sock: socket.socket, host: str) -> None:
        if self.count >= HALF_OPEN_LIMIT:
            most = max(self._waiting, key=lambda one: len(self._waiting[one]))
            log.warning("unfinished TLS connection closed for a new one %s", fields(peer=most, all=self.count))
            oldest = next(iter(self._waiting[most]))
            oldest.cancel()
            self._left(oldest, most)
        task = asyncio.create_task(self._shake_hands(sock, host), name=f"TLS with {host}")
        self._waiting[host][task] = None
        self.count += 1

        def done(task: asyncio.Task[None]) -> None:
            self._left(task, host)
            if task.cancelled():
                sock.close()

        task.add_done_callback(done)

    def _left(self, task: asyncio.Task[None], host: str) -> None:
        if self._waiting[host].pop(task, task) is None:
            self.count -= 1
        if not self._waiting[host]:
            del self._waiting[host]

    async def _shake_hands(self, sock: socket.socket, host: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            raw, porter = await loop.connect_accepted_socket(_Porter, sock)
            transport = await loop.start_tls(
                raw,
                porter,
                self._tls,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=HANDSHAKE_SECONDS,
            )
        except OSError as error:  # of TLS, too
            log.info("TLS connection not made %s", fields(peer=host, reason=error or type(error).__name__))
            sock.close()
            return
        assert transport is not None
        if not porter.lost:
            porter.hand_over(transport, self._make(), raw)


class _Porter(asyncio.Protocol):
    """Holds a connection during the handshake, and what the client sends right after it."""

    def __init__(self) -> None:
        self.lost = False
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()  # the handshake reads

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = True

    def hand_over(self, transport: asyncio.Transport, connection: _Connection, raw: asyncio.Transport) -> None:
        connection.raw = raw
        transport.set_protocol(connection)
        connection.connection_made(transport)
        for data in self._early:
            connection.data_received(data)


def recognised(request: web.BaseRequest) -> None:
    """Whoever sent this has shown who they are, also without a certificate: their connection is no stranger's."""
    if isinstance(request.protocol, _Connection):
        request.protocol.recognised()


@web.middleware
async def _at_work(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    if isinstance(request.protocol, _Connection):
        request.protocol.works()
    response = await handler(request)
    if ends_at(request.transport) - time.time() < _LAST_SECONDS:
        response.force_close()  # the peer has another certificate by now, and shows it on its next connection
    return response


@asynccontextmanager
async def serve_http(
    sock: socket.socket,
    routes: Sequence[web.RouteDef],
    credentials: Credentials,
    middlewares: Sequence[Middleware] = (),
    limits: HttpSettings = HttpSettings(),  # noqa: B008 - frozen
) -> AsyncIterator[None]:
    """Serve `routes` within the block. At its end, requests under way have SHUTDOWN_SECONDS to finish.

    A handler whose client has gone is cancelled.
    """
    app = web.Application(middlewares=(_at_work, *middlewares))
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, handler_cancellation=True)
    await runner.setup()
    inner = runner.server
    assert inner is not None
    door, loop = _Door(limits), asyncio.get_running_loop()
    sweeping = asyncio.create_task(door.sweep(), name="http connections")
    try:
        async with _listening(sock, lambda: _Connection(inner, door, loop), credentials.server_tls):
            yield
    finally:
        sweeping.cancel()
        await runner.cleanup()
        for connection in tuple(door.inside):
            connection.cut()


@asynccontextmanager
async def _listening(
    sock: socket.socket, make: Callable[[], _Connection], tls: ssl.SSLContext | None
) -> AsyncIterator[None]:
    """Take connections within the block."""
    if tls is None:
        server = await asyncio.get_running_loop().create_server(make, sock=sock, backlog=_BACKLOG)
        try:
            yield
        finally:
            server.close()
        return
    sock.setblocking(False)
    sock.listen(_BACKLOG)
    accepting = asyncio.create_task(_Hall(tls, make).accept(sock), name="https connections")
    try:
        yield
    finally:
        accepting.cancel()
        await asyncio.wait({accepting})
        sock.close()
