"""Questions that no handler answers are answered by the bus: what cannot be read, and what a handler fails at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from potluck.bus.exchange import Envelope
from potluck.errors import PotluckError
from potluck.wire import codec
from potluck.wire.questions import GetJob, ListNodes, NodesListed, RequestFailed
from potluck.wire.topics import Topics
from potluck.wire.values import Message
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus

TOPICS = Topics("refusals")


class Two:
    def __init__(self) -> None:
        self.broker = FakeBroker()
        self.server = FakeBus(self.broker, TOPICS, client_id="server")
        self.client = FakeBus(self.broker, TOPICS, client_id="client")


@pytest.fixture
async def two() -> AsyncIterator[Two]:
    made = Two()
    async with AsyncExitStack() as stack:
        for bus in (made.server, made.client):
            running = asyncio.create_task(bus.run())
            stack.callback(running.cancel)
            await bus.connected(5)
        yield made


async def test_who_asked_hears_of_a_fault(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    def handler(envelope: Envelope) -> None:
        if isinstance(envelope.message, GetJob):
            raise RuntimeError("a bug")
        two.broker.publish(
            envelope.reply_to, codec.encode(NodesListed(id=envelope.message.id, nodes=())), 1, False, None
        )

    two.server.subscribe(TOPICS.coordinator_inbox, handler)
    with pytest.raises(PotluckError, match="GetJob met a fault of server") as failed:
        await two.client.request(TOPICS.coordinator_inbox, GetJob(job_id="j"), timeout_seconds=5)
    assert failed.value.code == "internal"
    assert "a bug" in caplog.text
    assert isinstance(await two.client.request(TOPICS.coordinator_inbox, ListNodes(), timeout_seconds=5), NodesListed)


@pytest.mark.parametrize("payload", [b'{"id": "q", "reply_to": "answers", "type": "GetJob", }', b"\x81\x90\x01"])
async def test_a_message_that_cannot_be_read_ends_nothing(two: Two, payload: bytes) -> None:
    heard: list[Message] = []
    two.client.subscribe("answers", lambda envelope: heard.append(envelope.message))
    two.server.subscribe(TOPICS.coordinator_inbox, lambda envelope: None)
    await two.client.publish_raw(TOPICS.coordinator_inbox, payload)
    await eventually(lambda: two.server.counters["malformed"] == 1)
    if b"reply_to" in payload:
        await eventually(lambda: len(heard) == 1)
        assert isinstance(heard[0], RequestFailed)
        assert (heard[0].id, heard[0].error.code) == ("q", "bad_message")


async def test_nobody_answers_on_topics_without_questions(two: Two) -> None:
    """Each node and client listens to statuses: a thousand would answer."""
    heard: list[Message] = []
    two.client.subscribe("answers", lambda envelope: heard.append(envelope.message))
    topics = (
        TOPICS.coordinator_status,
        TOPICS.node("n", "status"),
        TOPICS.job("j", "status"),
        TOPICS.node("n", "inbox"),
    )

    def fail(envelope: Envelope) -> None:
        raise RuntimeError("a bug")

    for topic in (*topics, TOPICS.coordinator_inbox):
        two.server.subscribe(topic, fail)
    for topic in topics:
        await two.client.publish_raw(topic, b'{"id": "q", "reply_to": "answers", "type": "GetJob"}')
        await two.client.publish_raw(topic, b'{"id": "q", "reply_to": "answers", "type": "ListNodes"}')
    await two.client.publish_raw(TOPICS.coordinator_inbox, b'{"id": "last", "reply_to": "answers", "type": "GetJob"}')
    await eventually(lambda: heard)
    assert [message.id for message in heard] == ["last"]
    assert two.server.counters["malformed"] == len(topics) + 1
    assert two.server.counters["handler_errors"] == len(topics)


async def test_a_flood_on_one_topic_does_not_hide_errors_on_another(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    for topic in (TOPICS.node("loud", "status"), TOPICS.node("shy", "status")):
        two.server.subscribe(topic, lambda envelope: None)
        for _ in range(20):
            await two.client.publish_raw(topic, b"\0")
    await eventually(lambda: two.server.counters["malformed"] == 40)
    refused = [record.getMessage() for record in caplog.records if "message refused" in record.getMessage()]
    assert len(refused) == 2
    assert "nodes/loud" in refused[0]
    assert "nodes/shy" in refused[1]


async def test_a_defect_in_decoding_stops_no_other_message(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Message] = []
    two.server.subscribe(TOPICS.coordinator_inbox, lambda envelope: heard.append(envelope.message))
    decode = codec.decode

    def fails(payload: bytes) -> tuple[Message, codec.Encoding]:
        if b"GetJob" in payload:
            raise AssertionError
        return decode(payload)

    monkeypatch.setattr(codec, "decode", fails)
    for message in (GetJob(job_id="j"), ListNodes()):
        await two.client.publish(TOPICS.coordinator_inbox, message)
    await eventually(lambda: heard == [ListNodes()])
