"""A relay before a server, whose kernel counts what clients send."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_HEADERS_BYTES = 52
"""Of a TCP packet over IPv4: 20 for IP, 20 for TCP, 12 for its timestamps."""
_COUNTERS = struct.Struct("@128xQII")
"""In the kernel's tcp_info (linux/tcp.h): bytes received, packets sent, packets received."""


class Relay:
    """Listens on `port` of loopback. `sent_bytes` is what the newest client has sent, with headers."""

    def __init__(self, port: int, to: int) -> None:
        self.port = port
        self._to = to
        self._newest: socket.socket | None = None

    @property
    def sent_bytes(self) -> int:
        assert self._newest is not None
        info = self._newest.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTERS.size)
        received, _, packets = _COUNTERS.unpack(info)
        return int(received + packets * _HEADERS_BYTES)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._newest = writer.get_extra_info("socket")
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        pumps = [asyncio.create_task(_pump(reader, back)), asyncio.create_task(_pump(there, writer))]
        await asyncio.wait(pumps)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def relay(to: int) -> AsyncIterator[Relay]:
    """A relay to this port of loopback."""
    made = Relay(0, to)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    async with server:
        yield made
