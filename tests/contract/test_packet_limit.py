"""What a packet over the broker's limit does to its sender, byte by byte: docs/protocol.md says it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from potluck.net.broker import PACKET_LIMIT_BYTES
from support.brokers import TestBroker

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[TestBroker]:
    started = TestBroker("mosquitto", tmp_path)
    await started.start()
    yield started
    await started.stop()


def packet(kind: int, body: bytes) -> bytes:
    """MQTT 5, section 2.1: kind, length (1.5.5), body."""
    length, left = bytearray(), len(body)
    while left >= 0x80:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([kind, *length, left]) + body


async def connect(broker: TestBroker, version: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """A connection, and what its CONNACK says."""
    reader, writer = await asyncio.open_connection(*await broker.address())
    writer.write(packet(0x10, b"\0\4MQTT" + bytes([version, 2, 0, 60]) + b"\0" * (version == 5) + b"\0\0"))
    kind, length = await reader.readexactly(2)
    assert kind == 0x20
    return reader, writer, await reader.readexactly(length)


def publish(version: int, size: int) -> bytes:
    """PUBLISH at QoS 1 as a packet of about this size."""
    return packet(0x32, b"\0\1t\0\7" + b"\0" * (version == 5) + b"x" * size)


@pytest.mark.parametrize("version", [4, 5])
async def test_the_connection_ends(broker: TestBroker, version: int) -> None:
    reader, writer, _ = await connect(broker, version)
    writer.write(publish(version, PACKET_LIMIT_BYTES - 100))
    kind, length = await reader.readexactly(2)
    assert kind == 0x40  # PUBACK: up to the limit it is the receiver who refuses, with an answer
    await reader.readexactly(length)
    writer.write(publish(version, 3_000_000))
    try:
        left = await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        left = b""
    finally:
        writer.close()
    assert left[:1] != b"\x40"


async def test_mqtt_5_tells_the_limit_when_it_connects(broker: TestBroker) -> None:
    _, writer, told = await connect(broker, 5)
    writer.close()
    assert b"\x27" + PACKET_LIMIT_BYTES.to_bytes(4, "big") in told  # section 3.2.2.3.6
    assert f"{PACKET_LIMIT_BYTES:,}" in DOCUMENT.read_text(encoding="utf-8")
