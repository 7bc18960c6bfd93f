"""The HTTP server of daemons against guests that hold connections: idle, half asked, half sent, or that take no answer."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from potluck.blobs import server
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.credentials import Credentials
from potluck.net import http
from potluck.net.http import LEAST_RATE, Patience, serve_http
from potluck.security import certificates, contexts
from potluck.settings import HttpSettings
from potluck.wire.addresses import address
from support.closed import Authority
from support.eventually import eventually

LONG = HttpSettings(connections=8, connections_per_address=8, idle_seconds=60.0, header_seconds=60.0)
HOST = "127.0.0.1"


class Guests:
    """A server and its clients. `let` releases its slow answers."""

    def __init__(self, port: int, tls: ssl.SSLContext | None) -> None:
        self.port = port
        self.tls = tls
        self.let = asyncio.Event()
        self.at_work = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def come(self, sent: bytes = b"", host: str = HOST) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(HOST, self.port, local_addr=(host, 0), ssl=self.tls)
        self._writers.append(writer)
        writer.write(sent)
        return reader, writer

    async def go(self) -> None:
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)


Serve = Callable[[HttpSettings], Awaitable[Guests]]

BOTH = pytest.mark.parametrize("credentials", ["plain", "mTLS"], indirect=True)


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The credentials of a node, used for both sides here."""
    return Authority().member(tmp_path_factory.mktemp("member"), "node", certificates.node_profile("n1"))


@pytest.fixture
def credentials(request: pytest.FixtureRequest, member: Path) -> Credentials:
    return Credentials() if getattr(request, "param", "plain") == "plain" else Credentials.load(member, "node")


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
def serve(stack: AsyncExitStack, tmp_path: Path, credentials: Credentials) -> Serve:
    async def started(limits: HttpSettings) -> Guests:
        sock = socket.create_server((HOST, 0))
        guests = Guests(sock.getsockname()[1], credentials.client_tls)

        async def quick(request: web.Request) -> web.Response:
            return web.Response(text="here")

        async def slow(request: web.Request) -> web.Response:
            guests.at_work += 1
            await guests.let.wait()
            return web.Response(text="at last")

        async def much(request: web.Request) -> web.Response:
            guests.at_work += 1
            return web.Response(body=bytes(64 * 2**20))

        blobs = server.routes(
            BlobStore(tmp_path / "blobs", 2**30), writable=True, max_bytes=2**20, rights=OPEN, idle_seconds=0.3
        )
        routes = [web.get("/quick", quick), web.get("/slow", slow), web.get("/much", much), *blobs]
        await stack.enter_async_context(serve_http(sock, routes, credentials, limits=limits))
        stack.push_async_callback(guests.go)
        return guests

    return started


async def asked(guests: Guests, host: str = HOST) -> str:
    connector = aiohttp.TCPConnector(local_addr=(host, 0), ssl=guests.tls or True)
    url = address(HOST, guests.port, "http" if guests.tls is None else "https")
    async with aiohttp.ClientSession(connector=connector) as session, session.get(f"{url}/quick") as response:
        return f"{response.status} {await response.text()}"


@BOTH
async def test_idle_connections_make_room(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    guests = await serve(LONG)
    crowd = [await guests.come() for _ in range(50)]
    caplog.set_level(logging.INFO)
    for _ in range(20):
        assert await asked(guests) == "200 here"
    assert await asyncio.wait_for(crowd[0][0].read(), 5) == b""
    assert len([line for line in caplog.messages if "connection" in line]) <= 12


@BOTH
async def test_requests_under_way_stay_and_new_connections_get_503(serve: Serve) -> None:
    guests = await serve(LONG)
    busy = [await guests.come(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(8)]
    await eventually(lambda: guests.at_work == 8)
    reader, _ = await guests.come()
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 503 ")
    guests.let.set()
    for reader, _ in busy:
        assert await asyncio.wait_for(reader.readuntil(b"at last"), 5)
    assert await asked(guests) == "200 here"


async def test_one_address_leaves_room_for_others(serve: Serve) -> None:
    limits = HttpSettings(connections=8, connections_per_address=5, idle_seconds=60.0, header_seconds=60.0)
    guests = await serve(limits)
    crowd = [await guests.come(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(20)]
    await eventually(lambda: guests.at_work == 5)
    other, writer = await guests.come(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n", "127.0.0.2")
    await asyncio.wait_for(other.readuntil(b"here"), 5)
    # The waiting connection of the other address stays: the crowd's address loses only its own connections.
    crowd += [await guests.come(host="127.0.0.3") for _ in range(20)]
    assert await asked(guests, "127.0.0.4") == "200 here"
    writer.write(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.wait_for(other.readuntil(b"here"), 5)


@BOTH
@pytest.mark.parametrize(
    "sent", [b"", b"GET /quick HTTP/1.1\r\nHost: x\r\nX-A", b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_silence_and_half_a_head_end_connections(serve: Serve, sent: bytes) -> None:
    limits = HttpSettings(idle_seconds=0.6 if not sent or sent.endswith(b"\n") else 60.0, header_seconds=0.4)
    guests = await serve(limits)
    reader, writer = await guests.come(sent)

    end = asyncio.create_task(reader.read())
    for _ in range(100):
        if sent.endswith(b"X-A") and not end.done():
            writer.write(b"a")  # a byte now and then makes no head either
        await asyncio.wait([end], timeout=0.05)
        if end.done():
            break
    assert (end.done() and end.exception() is None) or isinstance(end.exception(), ConnectionError)


@BOTH
async def test_half_a_body_ends(serve: Serve) -> None:
    guests = await serve(LONG)
    reader, writer = await guests.come(
        b"PUT /blobs/" + b"a" * 64 + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    )
    answer = asyncio.create_task(reader.readuntil(b"}"))
    sent = 0
    while not answer.done() and sent < 99:
        writer.write(b"x")  # never silent for too long, but too slow
        sent += 1
        await asyncio.wait([answer], timeout=0.05)
    assert b" 408 " in await asyncio.wait_for(answer, 5)
    assert sent < 99


@BOTH
async def test_who_takes_no_answer_is_cut_off(serve: Serve, credentials: Credentials) -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no TCP_USER_TIMEOUT: such connections stay, and count for the limits")
    seconds = 1.0 if credentials.server_tls is None else 3.0  # to encrypt the answer takes time
    limits = HttpSettings(connections=2, connections_per_address=2, idle_seconds=seconds)
    guests = await serve(limits)
    socks = []
    for _ in range(2):
        sock = socket.create_connection((HOST, guests.port))
        if guests.tls is not None:
            sock = await asyncio.to_thread(guests.tls.wrap_socket, sock)
        sock.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        socks.append(sock)

    await eventually(lambda: guests.at_work == 2)
    assert await asked(guests) == "503 "

    async def answered() -> bool:
        return await asked(guests) == "200 here"

    await eventually(answered, timeout_seconds=10)
    for sock in socks:
        sock.close()


async def test_the_limit_of_files_bounds_connections(serve: Serve) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256 + 2 * 8, hard))
    try:
        guests = await serve(HttpSettings())
        crowd = [await guests.come() for _ in range(40)]
        assert await asked(guests) == "200 here"
        assert await asyncio.wait_for(crowd[0][0].read(), 5) == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_strangers_keep_no_member_out(
    stack: AsyncExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator's server takes clients without a certificate: each costs it a quarter of a megabyte, and them nothing."""
    monkeypatch.setattr(http, "STRANGERS_LIMIT", 4)
    authority = Authority()
    where = authority.member(tmp_path / "home", "coordinator", certificates.coordinator_profile("attic"))
    member = Credentials.load(authority.member(tmp_path / "n1", "node", certificates.node_profile("n1")), "node")
    sock = socket.create_server((HOST, 0))
    strangers = Guests(sock.getsockname()[1], contexts.trusting(authority.ca, certificates.PEER))
    members = Guests(strangers.port, member.client_tls)

    async def quick(request: web.Request) -> web.Response:
        if "Authorization" in request.headers:
            http.recognised(request)
        return web.Response(text="here")

    async def slow(request: web.Request) -> web.Response:
        strangers.at_work += 1
        await strangers.let.wait()
        return web.Response(text="at last")

    limits = HttpSettings(connections=16, connections_per_address=16, idle_seconds=60.0, header_seconds=60.0)
    routes = [web.get("/quick", quick), web.get("/slow", slow)]
    credentials = Credentials.load(where, "coordinator")
    await stack.enter_async_context(serve_http(sock, routes, credentials, limits=limits))
    for guests in (strangers, members):
        stack.push_async_callback(guests.go)
    stack.callback(strangers.let.set)

    mine, writer = await members.come(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.wait_for(mine.readuntil(b"here"), 5)
    bearer, _ = await strangers.come(b"GET /quick HTTP/1.1\r\nHost: x\r\nAuthorization: x\r\n\r\n")
    await asyncio.wait_for(bearer.readuntil(b"here"), 5)
    busy = [await strangers.come(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n", "127.0.0.2") for _ in range(4)]
    await eventually(lambda: strangers.at_work == 4)
    for _ in range(20):
        refused, _ = await strangers.come(host="127.0.0.2")
        assert (await asyncio.wait_for(refused.read(), 5)).startswith(b"HTTP/1.1 503 ")
    assert await asked(strangers, "127.0.0.3") == "200 here", "one address does not keep the others out"
    assert await asyncio.wait_for(busy[0][0].read(), 5) == b"", "it lost one"
    for _ in range(12):
        assert await asked(members) == "200 here"
    for reader in (mine, bearer):
        assert not reader.at_eof()
    crowd = [await members.come(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(13)]
    for reader, _ in crowd:
        assert await asyncio.wait_for(reader.readuntil(b"here"), 5)
    writer.write(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await asyncio.wait_for(mine.readuntil(b"here"), 5), "members make no room where strangers are"
    crowd.append(await members.come(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert await asyncio.wait_for(crowd[-1][0].readuntil(b"here"), 5)  # all 16 places are taken
    for _ in range(20):
        await strangers.come(host="127.0.0.4")
    for reader, sender in ((mine, writer), *crowd):
        sender.write(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.wait_for(reader.readuntil(b"here"), 5), "members make no room for strangers"


TLS = pytest.mark.parametrize("credentials", ["mTLS"], indirect=True)


@TLS
async def test_unfinished_handshakes_are_few_and_keep_nobody_out(
    serve: Serve, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    guests = await serve(LONG)
    await guests.come(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
    hello = client_hello(guests)
    crowd = []
    for number in range(1024):
        sock = stack.enter_context(socket.socket())
        sock.bind(("127.0.0.2", 0))
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (HOST, guests.port))
        if number % 2:
            await asyncio.get_running_loop().sock_sendall(sock, hello[: 1 + number % (len(hello) - 1)])
        crowd.append(sock)
        if number % 100 == 99:
            assert await asked(guests) == "200 here"

    def half_open() -> list[asyncio.Task[None]]:
        return [task for task in asyncio.all_tasks() if task.get_name() == "TLS with 127.0.0.2"]

    gone = crowd[1024 - http.HALF_OPEN_LIMIT - 1]  # the oldest went first
    with suppress(ConnectionError):
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(gone, 1), 5) == b""
    assert len(half_open()) == http.HALF_OPEN_LIMIT
    assert guests.at_work == 1, "a request under way stays"


@TLS
@pytest.mark.parametrize("sent", [0, 5, 100])
async def test_a_handshake_that_stops_ends(serve: Serve, monkeypatch: pytest.MonkeyPatch, sent: int) -> None:
    monkeypatch.setattr(http, "HANDSHAKE_SECONDS", 0.3)
    guests = await serve(LONG)
    reader, writer = await asyncio.open_connection(HOST, guests.port)
    writer.write(client_hello(guests)[:sent])
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert await asked(guests) == "200 here"


@TLS
async def test_a_member_without_a_certificate_or_in_plain_text_asks_nothing(serve: Serve) -> None:
    guests = await serve(LONG)
    assert guests.tls is not None
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    for tls in (bare, None):
        reader, writer = await asyncio.open_connection(HOST, guests.port, ssl=tls)
        writer.write(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n")
        with suppress(OSError):
            assert b"here" not in await asyncio.wait_for(reader.read(), 5)
        writer.close()
    assert await asked(guests) == "200 here"


def client_hello(guests: Guests) -> bytes:
    """The first bytes of a client's TLS handshake."""
    assert guests.tls is not None
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        guests.tls.wrap_bio(coming, going).do_handshake()
    return going.read()


def test_patience_is_only_for_bodies_that_come() -> None:
    patience = Patience(30.0)
    for _ in range(100):
        assert patience.left() == 30.0
        patience.came(20 * LEAST_RATE, 10.0)
    slow = Patience(30.0)
    pieces = 0
    while slow.left() > 0:
        slow.came(1, 10.0)
        pieces += 1
    assert pieces == 4
    sly = Patience(30.0)
    sly.came(60 * 2**20, 0.1)
    sly.came(1, 29.0)
    assert sly.left() < 2.0, "many bytes at once give no time for later"
