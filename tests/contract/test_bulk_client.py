"""Blobs over mTLS in threads: connections are kept, found closed, given up and bounded."""

from __future__ import annotations

import asyncio
import http.client
import select
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from potluck.credentials import Credentials
from potluck.net import bulk_client
from potluck.net.bulk_client import BulkClient
from potluck.net.http import serve_http
from potluck.security import certificates
from potluck.settings import HttpSettings
from potluck.wire.addresses import address
from support.closed import Authority
from support.eventually import eventually

HOST = "127.0.0.1"
LONG = 60.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    where = Authority().member(tmp_path_factory.mktemp("member"), "node", certificates.node_profile("n1"))
    return Credentials.load(where, "node")


class Served:
    """A server that answers with who asked from which port; `/slow` sends half of its answer, and the rest never."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ports: list[int] = []
        self.slow = 0
        self.left = 0

    async def who(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        self.ports.append(request.transport.get_extra_info("peername")[1])
        return web.Response(text=request.headers["Potluck-Caller"])

    async def half(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "10"})
        await answer.prepare(request)
        await answer.write(b"12345")
        self.slow += 1
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.left += 1
            raise
        return answer


@pytest.fixture
async def served(node: Credentials) -> AsyncIterator[Served]:
    sock = socket.create_server((HOST, 0))
    found = Served(address(HOST, sock.getsockname()[1], "https"))
    limits = HttpSettings(idle_seconds=0.5)
    routes = [web.get("/who", found.who), web.get("/half", found.half)]
    async with serve_http(sock, routes, node, limits=limits):
        yield found


@pytest.fixture
async def client(node: Credentials) -> AsyncIterator[BulkClient]:
    made = BulkClient(node, connect_seconds=5.0, idle_seconds=LONG)
    yield made
    await made.close()
    assert not made._under_way


def whole(response: http.client.HTTPResponse) -> bytes:
    return response.read()


async def test_connections_are_kept_and_found_closed(served: Served, client: BulkClient) -> None:
    for _ in range(3):
        assert await client.get(served.url, "/who", {}, whole, LONG) == b"node:n1"
    assert len(set(served.ports)) == 1
    (kept,) = client._kept[served.url]
    await eventually(lambda: _is_closed(kept[1].sock))  # the server closes it, as nobody asks
    assert await client.get(served.url, "/who", {}, whole, LONG) == b"node:n1"
    assert len(set(served.ports)) == 2


async def test_a_kept_connection_is_closed_in_the_end(
    served: Served, client: BulkClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_client, "KEPT_SECONDS", 0.05)
    await client.get(served.url, "/who", {}, whole, LONG)
    (kept,) = client._kept[served.url]
    await eventually(lambda: not client._kept and kept[1].sock is None)
    assert client._sweep is None


async def test_an_answer_that_is_not_read_costs_the_connection(served: Served, client: BulkClient) -> None:
    assert await client.get(served.url, "/who", {}, lambda response: response.status, LONG) == 200
    assert not client._kept


async def test_who_gives_up_ends_the_request_at_once(served: Served, client: BulkClient) -> None:
    asking = asyncio.create_task(client.get(served.url, "/half", {}, whole, LONG))
    await eventually(lambda: served.slow == 1)
    asking.cancel()
    await asyncio.wait({asking})
    await eventually(lambda: served.left == 1 and not client._under_way)
    with pytest.raises(TimeoutError):
        await client.get(served.url, "/half", {}, whole, 0.3)
    await eventually(lambda: served.left == 2 and not client._under_way)
    assert not client._kept
    assert await client.get(served.url, "/who", {}, whole, LONG) == b"node:n1"


async def test_no_more_at_once_than_there_are_threads(
    served: Served, node: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_client, "AT_ONCE", 2)
    client = BulkClient(node, connect_seconds=5.0, idle_seconds=LONG)
    asking = [asyncio.create_task(client.get(served.url, "/half", {}, whole, LONG)) for _ in range(3)]
    await eventually(lambda: served.slow == 2)
    assert len(client._under_way) == 2
    asking[0].cancel()
    await eventually(lambda: served.slow == 3)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await client.close()


async def test_errors_are_those_of_aiohttp(node: Credentials, unused_tcp_port: int) -> None:
    client = BulkClient(node, connect_seconds=0.3, idle_seconds=0.3)

    async def error(base_url: str) -> BaseException | None:
        (found,) = await asyncio.gather(client.get(base_url, "/", {}, whole, 5.0), return_exceptions=True)
        return found if isinstance(found, BaseException) else None

    assert isinstance(await error(address(HOST, unused_tcp_port, "http")), aiohttp.ClientError)
    assert isinstance(await error(address(HOST, unused_tcp_port, "https")), ConnectionRefusedError)
    with socket.create_server((HOST, 0)) as dumb:  # it takes connections, and says nothing
        assert isinstance(await error(address(HOST, dumb.getsockname()[1], "https")), aiohttp.ConnectionTimeoutError)
    assert node.server_tls is not None
    for says, kind in ((b"", aiohttp.ServerTimeoutError), (b"nonsense\r\n\r\n", aiohttp.ClientPayloadError)):

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, says: bytes = says) -> None:
            writer.write(says)
            await reader.read()
            writer.close()

        server = await asyncio.start_server(talk, HOST, 0, ssl=node.server_tls)
        async with server:
            assert isinstance(await error(address(HOST, server.sockets[0].getsockname()[1], "https")), kind)
    await client.close()


def _is_closed(sock: socket.socket) -> bool:
    """Whether the other side has closed the connection: its farewell is there to be read."""
    return bool(select.select([sock], [], [], 0)[0])
