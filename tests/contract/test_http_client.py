"""Probes over HTTP: a server that takes a connection is there, even if it answers nonsense."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp import web

from potluck.credentials import Credentials
from potluck.errors import Unavailable
from potluck.net.http import caller_of, serve_http
from potluck.net.http_client import answers, is_there, post_json

ANN = Credentials.of("client", "ann")


async def test_what_answers(unused_tcp_port: int) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.json_response({"caller": caller_of(request), "asked": await request.json()})

    async def live(request: web.Request) -> web.Response:
        return web.Response()

    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    async with serve_http(
        sock, [web.get("/live", live), web.post("/live", live), web.post("/ask", echo)], Credentials()
    ):
        assert await is_there(url, ANN, 5.0)
        assert await answers(f"{url}/live", ANN, 5.0)
        assert not await answers(f"{url}/dead", ANN, 5.0)
        assert await post_json(f"{url}/ask", [1], ANN, 5.0) == {"caller": "client:ann", "asked": [1]}
        assert await post_json(f"{url}/ask", 2, Credentials(), 5.0) == {"caller": "anonymous", "asked": 2}
        with pytest.raises(Unavailable, match="/dead answers 404"):
            await post_json(f"{url}/dead", 1, ANN, 5.0)
        with pytest.raises(Unavailable, match="/live answers with something else than JSON"):
            await post_json(f"{url}/live", 1, ANN, 5.0)
    for nobody in (f"http://127.0.0.1:{unused_tcp_port}", f"http://{'x' * 300}:1", "http://"):
        assert not await is_there(nobody, ANN, 1.0)
        assert not await answers(nobody, ANN, 1.0)
    with pytest.raises(Unavailable, match="does not answer"):
        await post_json(f"http://127.0.0.1:{unused_tcp_port}", 1, ANN, 1.0)


@pytest.mark.parametrize("said", [b"", b"MQTT", b"HTTP/1.1 200 OK\r\n"])
@pytest.mark.parametrize("stays", [False, True])
async def test_a_server_that_takes_a_connection_is_there(said: bytes, stays: bool) -> None:
    """A daemon that hangs, or another program, does so."""
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        if stays:
            await over.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        assert await is_there(url, ANN, 0.3)
        assert not await answers(url, ANN, 0.3)
        over.set()
