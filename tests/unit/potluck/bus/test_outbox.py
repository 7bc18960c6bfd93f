"""A daemon's outbox: in the order of the calls, at once if nothing waits, and bounded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from potluck.bus.exchange import Envelope
from potluck.bus.outbox import Outbox
from potluck.errors import Unavailable
from potluck.wire.commands import AcknowledgeResult
from potluck.wire.questions import ListNodes
from potluck.wire.topics import Topics
from potluck.wire.values import INLINE_LIMIT_BYTES
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus

TOPIC = Topics("default").node("a", "inbox")


def numbered(number: int) -> AcknowledgeResult:
    return AcknowledgeResult(attempt_id=str(number))


async def test_messages_keep_their_order_whatever_their_qos() -> None:
    broker = FakeBroker()
    bus = FakeBus(broker, client_id="a")
    outbox = Outbox(bus)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(bus.run()), tasks.create_task(outbox.run())]
        await bus.connected(1)
        outbox.publish(TOPIC, numbered(0), qos=0)
        assert broker.messages(TOPIC) == [numbered(0)]  # nothing waited, so it was sent at once
        for number in range(1, 6):
            outbox.publish(TOPIC, numbered(number), qos=number % 2)
        await outbox.drained()
        outbox.publish(TOPIC, numbered(6), qos=0)
        assert broker.messages(TOPIC) == [numbered(number) for number in range(7)]
        for task in running:
            task.cancel()


async def test_answers_go_at_once_and_in_order() -> None:
    broker = FakeBroker()
    bus = FakeBus(broker, client_id="a")
    outbox = Outbox(bus)
    question = Envelope(TOPIC, ListNodes(id="7"), reply_to="answers/b", qos=0)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(bus.run()), tasks.create_task(outbox.run())]
        await bus.connected(1)
        outbox.reply(question, numbered(1))
        assert [message.id for message in broker.messages("answers/b")] == ["7"]
        outbox.reply(Envelope(TOPIC, ListNodes()), numbered(1))  # nobody asked for an answer
        assert outbox.dropped == 0
        for task in running:
            task.cancel()


async def test_what_cannot_be_sent_is_dropped_and_counted() -> None:
    broker = FakeBroker()
    broker.up = False
    bus = FakeBus(broker, client_id="a")
    outbox = Outbox(bus, limit=3)
    outbox.publish(TOPIC, AcknowledgeResult(attempt_id="x" * INLINE_LIMIT_BYTES), qos=0)
    assert outbox.dropped == 1
    for number in range(5):
        outbox.publish(TOPIC, numbered(number), qos=0)
    assert outbox.dropped == 3
    broker.start()
    got: list[Any] = []
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(bus.run()), tasks.create_task(outbox.run())]

        def all_there() -> bool:
            got[:] = broker.messages(TOPIC)
            return len(got) == 3

        await eventually(all_there)
        assert got == [numbered(number) for number in range(3)]
        for task in running:
            task.cancel()


async def test_nothing_goes_out_before_what_it_rests_on_is_written() -> None:
    broker = FakeBroker()
    bus = FakeBus(broker, client_id="a")
    told: list[int] = []
    outbox = Outbox(bus, before=lambda: told.append(len(broker.messages(TOPIC))))
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(bus.run()), tasks.create_task(outbox.run())]
        await bus.connected(1)
        for number in range(3):
            outbox.publish(TOPIC, numbered(number), qos=number % 2)
        assert broker.messages(TOPIC) == []
        await outbox.drained()
        assert broker.messages(TOPIC) == [numbered(number) for number in range(3)]
        assert told[0] == 0
        for task in running:
            task.cancel()


async def test_what_cannot_be_written_ends_the_sending_and_is_not_sent() -> None:
    def fails() -> None:
        raise Unavailable("the journal cannot be written")

    broker = FakeBroker()
    bus = FakeBus(broker, client_id="a")
    outbox = Outbox(bus, before=fails)
    running = asyncio.create_task(bus.run())
    await bus.connected(1)
    outbox.publish(TOPIC, numbered(1))
    with pytest.raises(Unavailable, match="the journal"):
        await outbox.run()
    assert broker.messages(TOPIC) == []
    running.cancel()
    await asyncio.wait([running])
