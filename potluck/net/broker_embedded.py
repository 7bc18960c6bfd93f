"""The embedded broker's process: `python -m potluck.net.broker_embedded HOST PORT`. The only import of amqtt.

amqtt 0.12 breaks MQTT 3.1.1 in ways that clients notice (`docs/adr/0019-the-embedded-broker.md`). This module mends that: each
connection goes through our own reader and writer, and a retained message goes only to a client that has just subscribed to it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import sys
import time
from typing import Any

from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.broker import Broker

from potluck.bus.packets import PACKET_LIMIT_BYTES
from potluck.net.broker import CONNECT_SECONDS, QUEUED_LIMIT_BYTES

LISTENER = "default"
_CONNECT = 0x10
_LEVEL = 4
"""The protocol level of MQTT 3.1.1."""
_CONNACK_UNACCEPTABLE_LEVEL = bytes((0x20, 2, 0, 1))
_READ_BYTES = 1 << 16
_GRACE = 1.5
"""A connection ends after this many keep-alive intervals without a packet [MQTT-3.1.2-24]."""

log = logging.getLogger(__name__)


class _Reader(ReaderAdapter):  # type: ignore[misc] # amqtt has no types
    """Reads what a client sends. It ends the stream at a packet over the limit, and after a silence longer than the keep-alive allows."""

    def __init__(self, stream: asyncio.StreamReader, begin: bytes, keepalive_seconds: int) -> None:
        self._stream = stream
        self._buffer = bytearray(begin)
        self._silence_seconds = keepalive_seconds * _GRACE or None
        self._heard_at = time.monotonic()
        self._ended = False

    async def read(self, n: int = -1) -> bytes:
        if n > PACKET_LIMIT_BYTES:
            self._ended = True
        while not self._ended and len(self._buffer) < n:
            # Let other tasks run. When the stream ends, amqtt drops the packets that it has not handled yet. So it handles a
            # DISCONNECT that came just before the end now, and does not send the will.
            await asyncio.sleep(0)
            # amqtt cancels this call after each keep-alive interval and calls again, so the deadline must outlast the call.
            left = None if self._silence_seconds is None else self._heard_at + self._silence_seconds - time.monotonic()
            try:
                async with asyncio.timeout(left):
                    data = await self._stream.read(_READ_BYTES)
            except (TimeoutError, OSError):
                data = b""
            self._ended = not data
            self._heard_at = time.monotonic()
            self._buffer += data
        if self._ended:
            return b""
        data = bytes(self._buffer[:n])
        del self._buffer[:n]
        return data

    def feed_eof(self) -> None:
        self._stream.feed_eof()


class _Writer(WriterAdapter):  # type: ignore[misc]
    """Writes to a client. Nobody waits for a client that does not read: at the limit, its connection is cut."""

    def __init__(self, stream: asyncio.StreamWriter) -> None:
        self._stream = stream

    def write(self, data: bytes) -> None:
        if self._stream.transport.get_write_buffer_size() > QUEUED_LIMIT_BYTES:
            log.error("a client that does not read is cut off: %s", self.get_peer_info())
            self._stream.transport.abort()
        elif not self._stream.transport.is_closing():
            self._stream.write(data)

    async def drain(self) -> None:
        """Do not wait: amqtt would keep a task waiting here for each message, without a limit."""

    def get_peer_info(self) -> tuple[str, int] | None:
        peer = self._stream.get_extra_info("peername")
        return None if peer is None else peer[:2]

    def get_ssl_info(self) -> ssl.SSLObject | None:
        return None

    async def close(self) -> None:
        self._stream.close()


class _Broker(Broker):  # type: ignore[misc]
    """amqtt's broker, but it sends retained messages only to new subscriptions. It uses private names of 0.12, which tests check."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._subscribing: set[str | None] = set()

    async def _handle_subscription(self, client_session: Any, handler: Any, subscribe_waiter: Any) -> None:
        self._subscribing.add(client_session.client_id)
        try:
            await super()._handle_subscription(client_session, handler, subscribe_waiter)
        finally:
            self._subscribing.discard(client_session.client_id)

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Any) -> None:
        # Without this, a client that connects gets the retained messages for the subscriptions of all other clients.
        if session.client_id in self._subscribing:
            await super()._publish_retained_messages_for_subscription(subscription, session)


async def _connected(broker: Broker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            begin, level, keepalive_seconds = await _begin_of_connect(reader)
        if level != _LEVEL:
            # amqtt would read a CONNECT of MQTT 5 as one of 3.1.1, and then wait for bytes that never come.
            writer.write(_CONNACK_UNACCEPTABLE_LEVEL)
            return
        await broker.external_connected(_Reader(reader, begin, keepalive_seconds), _Writer(writer), LISTENER)
    except (TimeoutError, asyncio.IncompleteReadError, OSError, _NotMqtt) as error:
        log.info("no MQTT from %s: %r", writer.get_extra_info("peername"), error)
    finally:
        writer.close()


class _NotMqtt(Exception):
    """A connection does not begin with a CONNECT of any version."""


async def _begin_of_connect(reader: asyncio.StreamReader) -> tuple[bytes, int, int]:
    """(The bytes of a CONNECT up to its keep-alive, its protocol level, its keep-alive in seconds) (MQTT 3.1.1, section 3.1).

    Raises _NotMqtt, IncompleteReadError.
    """
    begin = await reader.readexactly(2)
    if begin[0] != _CONNECT:
        raise _NotMqtt(begin)
    while begin[-1] & 0x80 and len(begin) < 5:
        begin += await reader.readexactly(1)
    if begin[-1] & 0x80:
        raise _NotMqtt(begin)
    header = await reader.readexactly(10)
    if header[:6] != b"\x00\x04MQTT":
        raise _NotMqtt(begin + header)
    return begin + header, header[6], int.from_bytes(header[8:10], "big")


async def _serve(host: str, port: int) -> None:
    broker = _Broker(
        {
            "listeners": {LISTENER: {"type": "external"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await broker.start()
    server = await asyncio.start_server(lambda reader, writer: _connected(broker, reader, writer), host, port)
    print("amqtt running", file=sys.stderr, flush=True)  # noqa: T201 - what the parent waits for
    await stop.wait()
    server.close()
    await broker.shutdown()


def main() -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s %(message)s")
    host, port = sys.argv[1:]
    asyncio.run(_serve(host, int(port)))


if __name__ == "__main__":
    main()
