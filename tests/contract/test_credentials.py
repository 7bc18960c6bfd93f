"""With `Credentials` filled in, each plane and its probes use TLS. Nothing else has to change."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from potluck.blobs import server
from potluck.blobs.download import Downloader
from potluck.blobs.parts import Timings
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.bus.connecting import refusal
from potluck.bus.mqtt import Envelope, MqttBus, in_turn
from potluck.credentials import Credentials
from potluck.errors import Unavailable
from potluck.net.addresses import base_urls
from potluck.net.http import serve_http
from potluck.net.http_client import is_there
from potluck.settings import BusTimings
from potluck.wire.questions import ListNodes
from potluck.wire.topics import Topics
from support.brokers import TestBroker, some_kind
from support.certificates import client_context, server_context
from support.eventually import eventually

QUICK = Timings(connect_seconds=5.0, failures_limit=1, rest_seconds=0.01)
TRUSTING = Credentials("client:t", client_tls=client_context(), broker_tls=client_context())
DEFAULT = ssl.create_default_context()
DOUBTING = Credentials("client:t", client_tls=DEFAULT, broker_tls=DEFAULT)
TOPICS = Topics("test")


async def test_bulk(tmp_path: Path) -> None:
    store, served = BlobStore(tmp_path / "held", 1 << 30), Credentials(server_tls=server_context(tmp_path))
    sock = socket.create_server(("127.0.0.1", 0))
    (url,) = base_urls("127.0.0.1", sock.getsockname()[1], served.scheme)
    assert url.startswith("https://")
    async with serve_http(sock, server.routes(store, writable=True, max_bytes=2**20, rights=OPEN), served):
        async with Downloader(BlobStore(tmp_path / "here", 1 << 30), TRUSTING, QUICK) as downloader:
            ref = await downloader.push(b"soup", (url,))
            assert (await downloader.fetch(ref)).read_bytes() == b"soup"
        for others in (DOUBTING, Credentials()):
            async with Downloader(BlobStore(tmp_path / "there", 1 << 30), others, QUICK) as downloader:
                with pytest.raises(Unavailable, match="certificate"):
                    await downloader.fetch(ref)
        assert await is_there(url, TRUSTING, 5.0)
        assert not await is_there(url, DOUBTING, 5.0)
    assert not await is_there(url, TRUSTING, 5.0)


@asynccontextmanager
async def behind_tls(address: tuple[str, int], folder: Path) -> AsyncIterator[int]:
    """The port of a TLS server that hands on what it gets, and back."""

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, on = await asyncio.open_connection(*address)
        await asyncio.gather(hand_on(reader, on), hand_on(back, writer), return_exceptions=True)

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context(folder))
    async with proxy:
        yield proxy.sockets[0].getsockname()[1]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("version", [4, 5])
async def test_the_bus(tmp_path: Path, version: Literal[4, 5], plain: bool) -> None:
    timings = BusTimings(connect_timeout_seconds=5.0, plain=plain)
    broker = TestBroker(some_kind(), tmp_path)
    await broker.start()
    try:
        async with behind_tls(await broker.address(), tmp_path) as port:
            assert await refusal("127.0.0.1", port, TRUSTING, 5.0) == ""
            assert "certificate" in await refusal("127.0.0.1", port, DOUBTING, 5.0)
            addresses = in_turn([("127.0.0.1", port)])
            bus = MqttBus(addresses, TOPICS, TRUSTING, client_id="t", timings=timings, highest_version=version)
            got: list[Envelope] = []
            bus.subscribe(TOPICS.jobs_submit, got.append)
            running = asyncio.create_task(bus.run())
            await bus.connected(10)
            await bus.publish(TOPICS.jobs_submit, ListNodes(id="x" * 200_000))
            await eventually(lambda: bool(got))
            assert got[0].message == ListNodes(id="x" * 200_000)
            running.cancel()
            await asyncio.wait([running])
    finally:
        await broker.stop()
