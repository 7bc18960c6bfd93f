"""What any MQTT client may expect of each broker that potluck starts (MQTT 3.1.1; sections in brackets)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from potluck.net import broker_embedded
from potluck.net.broker import PACKET_LIMIT_BYTES, QUEUED_LIMIT_BYTES
from support.brokers import TestBroker
from support.eventually import eventually
from support.raw_mqtt import CONNACK, DISCONNECT, PUBLISH, RawClient, connect


@pytest.fixture(params=["mosquitto", "embedded"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TestBroker]:
    started = TestBroker(request.param, tmp_path)
    await started.start()
    yield started
    await started.stop()


async def retained(port: int, count: int) -> None:
    async with RawClient(port) as publisher:
        await publisher.connect("publisher")
        for number in range(count):
            publisher.publish(f"state/{number}", b"on", retain=True)
        await publisher.round_trip()


async def test_nobody_gets_what_others_subscribe_to(broker: TestBroker) -> None:
    """[3.8.4] A client gets retained messages for its own subscriptions, not for those of other clients."""
    await retained(broker.port, 20)
    async with RawClient(broker.port) as watcher, RawClient(broker.port) as asking:
        await watcher.connect("watcher")
        await watcher.subscribe("state/#")
        await asking.connect("asking")
        assert await asking.round_trip() == []
        assert await asking.subscribe("answers/me") == []
        assert await asking.round_trip() == []


async def test_what_is_retained_comes_once_and_marked(broker: TestBroker) -> None:
    """[3.3.1.3]"""
    await retained(broker.port, 20)
    async with RawClient(broker.port) as first, RawClient(broker.port) as second:
        for name, client in (("first", first), ("second", second)):
            await client.connect(name)
            got = await client.subscribe("state/+")
            while len(got) < 20:
                packet = await client.packet()
                assert packet is not None
                got.append(packet)
            got += await client.round_trip()
            assert sorted(packet.topic for packet in got) == sorted(f"state/{number}" for number in range(20))
            assert all(packet.retained for packet in got)


async def test_no_will_after_a_goodbye(broker: TestBroker) -> None:
    """[3.14.4] Also when the goodbye and the end of the stream arrive together; fifty times, since this is a race in amqtt."""
    async with RawClient(broker.port) as watcher:
        await watcher.connect("watcher")
        await watcher.subscribe("wills")
        for number in range(50):
            async with RawClient(broker.port) as leaving:
                await leaving.connect(f"leaving-{number}", will=("wills", b"died"))
                leaving.send(DISCONNECT)
        async with RawClient(broker.port) as dying:
            await dying.connect("dying", will=("wills", b"the only one"))
        will = await watcher.packet()
        assert will is not None
        assert will.payload == b"the only one"


async def test_a_silent_client_counts_as_lost(broker: TestBroker) -> None:
    """[3.1.2.10] After one and a half keep-alive times of silence, the connection ends and the will is sent."""
    async with RawClient(broker.port) as watcher, RawClient(broker.port) as silent:
        await watcher.connect("watcher")
        await watcher.subscribe("wills")
        await silent.connect("silent", keepalive_seconds=1, will=("wills", b"lost"))
        will = await watcher.packet(10)
        assert will is not None
        assert will.payload == b"lost"
        assert await silent.packet() is None


@pytest.mark.parametrize("will", [None, ("wills", b"lost")])
async def test_mqtt_5_is_answered_at_once(broker: TestBroker, will: Any) -> None:
    """[3.2.2.3] The embedded broker answers `unacceptable protocol version`, as a server of 3.1.1 must."""
    async with RawClient(broker.port) as client:
        client.send(connect("modern", will=will, version=5))
        answer = await client.packet(2)
        assert answer is not None
        assert answer.kind == CONNACK
        if broker.kind == "embedded":
            assert answer.body == b"\0\1"
            assert await client.packet(2) is None
        else:
            assert answer.body[1] == 0


async def test_a_packet_over_the_limit_ends_only_the_connection_of_its_sender(broker: TestBroker) -> None:
    async with RawClient(broker.port) as other, RawClient(broker.port) as sender:
        await other.connect("other")
        await sender.connect("sender")
        sender.publish("large", bytes(PACKET_LIMIT_BYTES + 1))
        assert await sender.packet() is None
        await other.subscribe("small")
        other.publish("small", b"still here")
        packet = await other.packet()
        assert packet is not None
        assert packet.payload == b"still here"


@pytest.mark.parametrize(
    "begin", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x10\xff\xff\xff\xff\x01", bytes(4000), b"\x10"]
)
async def test_a_connection_that_does_not_speak_mqtt_is_closed(broker: TestBroker, begin: bytes) -> None:
    async with RawClient(broker.port) as stranger, RawClient(broker.port) as client:
        stranger.send(begin)
        if len(begin) > 1:
            assert await stranger.packet() is None
        await client.connect("client")
        await client.round_trip()


async def test_nobody_waits_for_a_client_that_does_not_read(broker: TestBroker) -> None:
    """Messages kept for it have a limit, so the broker's memory has one too. Others get everything."""
    message = bytes(256 * 1024)
    count = 2 * QUEUED_LIMIT_BYTES // len(message)
    async with RawClient(broker.port) as frozen, RawClient(broker.port) as reading, RawClient(broker.port) as sender:
        for name, client in (("frozen", frozen), ("reading", reading)):
            await client.connect(name)
            await client.subscribe("news")
        await sender.connect("sender")
        assert broker._broker is not None
        process = psutil.Process(broker._broker.pid)
        before = process.memory_info().rss
        for _ in range(count):
            sender.publish("news", message)
            await sender.writer.drain()
            packet = await reading.packet(30)
            assert packet is not None
            assert (packet.kind, len(packet.payload)) == (PUBLISH, len(message))
        assert process.memory_info().rss - before < 2 * QUEUED_LIMIT_BYTES


async def test_the_embedded_broker_does_not_wait_for_silent_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_embedded, "CONNECT_SECONDS", 0.05)
    server = await asyncio.start_server(
        lambda reader, writer: broker_embedded._connected(None, reader, writer), "127.0.0.1", 0  # type: ignore[arg-type]
    )  # fmt: skip
    async with server, RawClient(server.sockets[0].getsockname()[1]) as mute:
        assert await mute.packet(5) is None


async def test_clients_that_come_and_go_leave_nothing(broker: TestBroker) -> None:
    """Each command on the command line is a new client with its own inbox: nothing of these may add up."""
    assert broker._broker is not None
    process = psutil.Process(broker._broker.pid)
    numbers = itertools.count()

    async def come_and_go(times: int) -> None:
        for _ in range(times):
            async with RawClient(broker.port) as client:
                name = f"client-{next(numbers)}"
                await client.connect(name)
                await client.subscribe(f"clients/{name}/inbox")
                for _ in range(10):
                    client.publish(f"clients/{name}/inbox", bytes(20_000))
                for _ in range(10):
                    assert await client.packet() is not None
                client.send(DISCONNECT)

    await come_and_go(100)
    await eventually(lambda: len(process.net_connections()) == 1)
    before = process.memory_info().rss
    await come_and_go(300)
    await eventually(lambda: len(process.net_connections()) == 1)
    assert process.memory_info().rss - before < 20 * 2**20, "300 clients got 60 MB, and none of it is left"
