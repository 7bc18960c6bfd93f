"""MQTT 3.1.1 by hand on a socket: for things that a good library does not do, or does not show."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import NamedTuple, Self

CONNACK, PUBLISH, SUBACK = 2, 3, 9
DISCONNECT = b"\xe0\0"


class Packet(NamedTuple):
    kind: int
    flags: int
    body: bytes

    @property
    def topic(self) -> str:
        return self.body[2 : 2 + int.from_bytes(self.body[:2], "big")].decode()

    @property
    def payload(self) -> bytes:
        skipped = 2 + len(self.topic.encode()) + (2 if self.flags & 0x06 else 0)
        return self.body[skipped:]

    @property
    def retained(self) -> bool:
        return bool(self.flags & 1)


class RawClient:
    """One connection; an async context manager that closes the socket without a DISCONNECT."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def packet(self, seconds: float = 5) -> Packet | None:
        """The next packet; None at the end of the stream. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            try:
                (first,) = await self.reader.readexactly(1)
                length, shift = 0, 0
                while True:
                    (digit,) = await self.reader.readexactly(1)
                    length |= (digit & 0x7F) << shift
                    shift += 7
                    if digit < 0x80:
                        break
                return Packet(first >> 4, first & 0x0F, await self.reader.readexactly(length))
            except (asyncio.IncompleteReadError, ConnectionError):
                return None

    async def connect(self, name: str, keepalive_seconds: int = 60, will: tuple[str, bytes] | None = None) -> Packet:
        self.send(connect(name, keepalive_seconds, will))
        answer = await self.packet()
        assert answer is not None
        assert answer.kind == CONNACK
        return answer

    async def subscribe(self, topic_filter: str, qos: int = 0) -> list[Packet]:
        """Subscribe; returns, when granted, the messages that came before that."""
        self.send(_packet(0x82, b"\0\1" + _text(topic_filter) + bytes((qos,))))
        before = []
        while (packet := await self.packet()) is not None and packet.kind != SUBACK:
            before.append(packet)
        assert packet is not None
        return before

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self.send(_packet(0x31 if retain else 0x30, _text(topic) + payload))

    async def round_trip(self) -> list[Packet]:
        """All messages that the broker has for this client by now: sends a ping, whose answer comes after them."""
        self.send(b"\xc0\0")
        got = []
        while (packet := await self.packet()) is not None and packet.kind != 13:
            got.append(packet)
        return got


def connect(
    name: str, keepalive_seconds: int = 60, will: tuple[str, bytes] | None = None, *, version: int = 4
) -> bytes:
    """A CONNECT with a clean session; `version` 4 is MQTT 3.1.1, 5 is MQTT 5."""
    properties = b"\0" if version == 5 else b""
    body = _text("MQTT") + bytes((version, 0x02 | (0x2C if will else 0))) + keepalive_seconds.to_bytes(2, "big")
    body += properties + _text(name)
    if will:
        body += properties + _text(will[0]) + len(will[1]).to_bytes(2, "big") + will[1]
    return _packet(0x10, body)


def _packet(first: int, body: bytes) -> bytes:
    length, digits = len(body), bytearray()
    while True:
        digits.append(length & 0x7F | (0x80 if length > 0x7F else 0))
        length >>= 7
        if not length:
            return bytes((first,)) + bytes(digits) + body


def _text(text: str) -> bytes:
    return len(text.encode()).to_bytes(2, "big") + text.encode()
