"""The bytes of a message that came are handed on as they are: not a copy of them."""

from __future__ import annotations

import asyncio

from potluck.bus.exchange import Envelope
from potluck.wire import codec
from potluck.wire.questions import ListNodes
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus


async def test_payloads_are_shared() -> None:
    broker = FakeBroker()
    bus = FakeBus(broker, client_id="a")
    got: list[Envelope] = []
    bus.subscribe("a/b", got.append)
    bus.subscribe("a/+", got.append)
    running = asyncio.create_task(bus.run())
    await bus.connected(5)
    payload = codec.encode(ListNodes(id="7"))
    await bus.publish_raw("a/b", payload)
    await eventually(lambda: len(got) == 2)
    running.cancel()
    await asyncio.wait([running])
    assert [envelope.payload is payload for envelope in got] == [True, True]
    assert got[0].without_payload().payload == b""
    assert got[0].without_payload().message is got[0].message
