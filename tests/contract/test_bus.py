"""The contract of the Bus, held by the fake and by every broker that potluck runs on."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import aiomqtt
import msgpack
import msgspec
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from potluck.bus import mqtt, quick_link
from potluck.bus.link import PlainLink
from potluck.bus.mqtt import Bus, Envelope, MqttBus, Will, _UnderWay, request_failed
from potluck.bus.quick_link import QuickLink
from potluck.credentials import Credentials
from potluck.errors import InvalidRequest, NotFound, TimedOut, TooLarge, Unavailable
from potluck.settings import BusTimings
from potluck.wire import codec
from potluck.wire.births import CoordinatorStatus, NodeStatus
from potluck.wire.commands import AcknowledgeResult
from potluck.wire.questions import (
    CancelJob,
    GetJob,
    Inferred,
    JobAccepted,
    ListJobs,
    ListNodes,
    NodesListed,
    RequestFailed,
)
from potluck.wire.topics import Topics
from potluck.wire.values import INLINE_LIMIT_BYTES, Message, Tensor
from support.brokers import TestBroker
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus

TOPICS = Topics("test")
TIMINGS = BusTimings(
    keepalive_seconds=2, connect_timeout_seconds=2.0, reconnect_min_seconds=0.02, reconnect_max_seconds=0.2
)


class Bench:
    """A broker and the buses on it; `broker` is None for the fake."""

    def __init__(self, broker: TestBroker | None, version: int = 5, *, plain: bool = False) -> None:
        self.broker = broker
        self.timings = msgspec.structs.replace(TIMINGS, plain=plain)
        self.fake = FakeBroker()
        self.version = version
        self.tasks: dict[Bus, asyncio.Task[None]] = {}

    def bus(self, client_id: str, will: Will | None = None) -> Bus:
        """A bus that runs until the test ends."""
        bus: Bus
        if self.broker is None:
            bus = FakeBus(self.fake, TOPICS, client_id=client_id, will=will)
        else:
            bus = MqttBus(
                self.broker.address,
                TOPICS,
                Credentials(),
                client_id=client_id,
                will=will,
                timings=self.timings,
                highest_version=5 if self.version == 5 else 4,
            )
        self.tasks[bus] = asyncio.create_task(bus.run(), name=f"bus-{client_id}")
        return bus

    async def connected(self, *client_ids: str) -> list[Bus]:
        buses = [self.bus(client_id) for client_id in client_ids]
        for bus in buses:
            await bus.connected(5)
        return buses

    async def leave(self, bus: Bus) -> None:
        task = self.tasks.pop(bus)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def cut(self, bus: Bus) -> None:
        """End the connection as a crash or a pulled cable does."""
        if isinstance(bus, FakeBus):
            bus.kill()
        else:
            assert isinstance(bus, MqttBus)
            link = bus._link
            assert isinstance(link, QuickLink | PlainLink)
            sock = (link if isinstance(link, QuickLink) else link._mqtt)._client.socket()
            assert isinstance(sock, socket.socket)
            sock.shutdown(socket.SHUT_RDWR)

    async def stop_broker(self) -> None:
        if self.broker is None:
            self.fake.stop()
        else:
            await self.broker.kill()

    async def start_broker(self) -> None:
        if self.broker is None:
            self.fake.start()
        else:
            await self.broker.start()

    async def send_raw(self, topic: str, payload: bytes) -> None:
        """Publish bytes as a foreign client does, over MQTT 3.1.1."""
        if self.broker is None:
            self.fake.publish(topic, payload, 1, False, None)
        else:
            async with aiomqtt.Client("127.0.0.1", self.broker.port, protocol=aiomqtt.ProtocolVersion.V311) as client:
                await client.publish(topic, payload, qos=1)

    async def close(self) -> None:
        for bus in list(self.tasks):
            await self.leave(bus)
        if self.broker is not None:
            await self.broker.stop()


@pytest.fixture(params=["fake", "mosquitto-v5", "mosquitto-v311", "mosquitto-plain", "amqtt", "amqtt-plain"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    broker = None
    if request.param != "fake":
        broker = TestBroker("embedded" if request.param.startswith("amqtt") else "mosquitto", tmp_path)
        await broker.start()
    version = 4 if request.param == "mosquitto-v311" else 5
    made = Bench(broker, version=version, plain=request.param.endswith("plain"))
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def mosquitto(tmp_path: Path) -> AsyncIterator[Bench]:
    broker = TestBroker("mosquitto", tmp_path)
    await broker.start()
    made = Bench(broker)
    try:
        yield made
    finally:
        await made.close()


def answers(bus: Bus, make: Callable[[Envelope], Message]) -> Callable[[Envelope], None]:
    """A handler that replies with `make(question)` from a task."""
    tasks: set[asyncio.Task[None]] = set()

    def handle(envelope: Envelope) -> None:
        task = asyncio.create_task(bus.reply(envelope, make(envelope)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return handle


def inbox() -> tuple[list[Envelope], Callable[[Envelope], None]]:
    got: list[Envelope] = []
    return got, got.append


# --- publish and subscribe


async def test_a_message_reaches_its_subscriber_with_every_field(bench: Bench) -> None:
    alice, bob = await bench.connected("alice", "bob")
    got, handler = inbox()
    bob.subscribe(TOPICS.coordinator_inbox, handler)
    await bob.publish(TOPICS.node("x", "outbox"), ListJobs())  # the subscription was sent before this was
    for encoding in ("msgpack", "json"):
        await alice.publish(
            TOPICS.coordinator_inbox, CancelJob(id="7", reply_to="here", job_id="j1"), encoding=encoding
        )
    await eventually(lambda: len(got) == 2)
    assert [envelope.encoding for envelope in got] == ["msgpack", "json"]
    for envelope in got:
        assert envelope.message == CancelJob(id="7", reply_to="here", job_id="j1")
        assert envelope.topic == TOPICS.coordinator_inbox
        assert envelope.reply_to == "here"
        assert not envelope.retained


@pytest.mark.parametrize(
    "payload",
    [
        b' {"reply_to": "", "job_id": "j-1",\n "type": "GetJob", "of a later version": 1.0}',
        b"\x83\xa4type\xa6GetJob\xa6job_id\xa3j-1\xd9\x08of later\x01",
    ],
    ids=["json", "msgpack"],
)
async def test_the_bytes_of_a_message_come_with_it(bench: Bench, payload: bytes) -> None:
    """The bytes come as they were sent, with fields that this version does not know: a signature covers bytes."""
    (bob,) = await bench.connected("bob")
    got, handler = inbox()
    bob.subscribe(TOPICS.jobs_submit, handler)
    await bob.publish(TOPICS.jobs_submit, GetJob(job_id="first"))
    await bench.send_raw(TOPICS.jobs_submit, payload)
    await eventually(lambda: len(got) == 2)
    assert got[0].payload == codec.encode(GetJob(job_id="first"))
    assert (got[1].message, got[1].payload) == (GetJob(job_id="j-1"), payload)
    assert got[1].without_payload() == msgspec.structs.replace(got[1], payload=b"")


@pytest.mark.parametrize("qos", [0, 1])
async def test_messages_of_one_publisher_keep_their_order(bench: Bench, qos: int) -> None:
    alice, bob = await bench.connected("alice", "bob")
    got, handler = inbox()
    bob.subscribe(TOPICS.node("+", "outbox"), handler)
    await bob.publish(TOPICS.node("x", "inbox"), ListJobs())
    for number in range(300):
        await alice.publish(TOPICS.node("n1", "outbox"), AcknowledgeResult(attempt_id=str(number)), qos=qos)
    await eventually(lambda: len(got) == 300)
    assert [envelope.message.attempt_id for envelope in got] == [str(number) for number in range(300)]  # type: ignore[attr-defined]


async def test_wildcards_and_several_handlers(bench: Bench) -> None:
    alice, bob = await bench.connected("alice", "bob")
    one_level, one = inbox()
    all_below, every = inbox()
    again, same = inbox()
    bob.subscribe(TOPICS.node("+", "status"), one)
    bob.subscribe(f"{TOPICS.root}/jobs/#", every)
    bob.subscribe(TOPICS.node("+", "status"), same)
    await bob.publish(TOPICS.node("x", "inbox"), ListJobs())
    for topic in (
        TOPICS.node("n1", "status"),
        TOPICS.node("n2", "capacity"),
        TOPICS.job("j", "events"),
        TOPICS.jobs_submit,
    ):
        await alice.publish(topic, ListNodes())
    await eventually(lambda: len(all_below) == 2)
    assert {envelope.topic for envelope in one_level} == {TOPICS.node("n1", "status")}
    assert {envelope.topic for envelope in again} == {TOPICS.node("n1", "status")}
    assert [envelope.topic for envelope in all_below] == [TOPICS.job("j", "events"), TOPICS.jobs_submit]


async def test_unsubscribed_topics_are_silent(bench: Bench) -> None:
    alice, bob = await bench.connected("alice", "bob")
    got, handler = inbox()
    other, other_handler = inbox()
    bob.subscribe(TOPICS.jobs_submit, handler)
    bob.subscribe(TOPICS.coordinator_inbox, other_handler)
    bob.unsubscribe(TOPICS.jobs_submit)
    await bob.publish(TOPICS.node("x", "inbox"), ListJobs())
    await alice.publish(TOPICS.jobs_submit, ListNodes())
    await alice.publish(TOPICS.coordinator_inbox, ListNodes())
    await eventually(lambda: other)
    assert not got


async def test_a_bad_filter_is_refused(bench: Bench) -> None:
    (bus,) = await bench.connected("alice")
    for bad in ("", "a/#/b", "a+/b", "a#"):
        with pytest.raises(ValueError, match="topic filter"):
            bus.subscribe(bad, lambda envelope: None)


async def test_a_handler_that_raises_is_logged_and_the_next_message_comes(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = await bench.connected("alice", "bob")
    got, handler = inbox()

    def broken(envelope: Envelope) -> None:
        raise KeyError("mistake in a handler")

    bob.subscribe(TOPICS.jobs_submit, broken)
    bob.subscribe(TOPICS.jobs_submit, handler)
    await bob.publish(TOPICS.node("x", "inbox"), ListJobs())
    for _ in range(2):
        await alice.publish(TOPICS.jobs_submit, ListNodes())
    await eventually(lambda: len(got) == 2)
    assert bob.counters["handler_errors"] == 2
    assert "mistake in a handler" in caplog.text


# --- retained messages and wills


async def test_retained_messages_wait_for_late_subscribers_until_cleared(bench: Bench) -> None:
    alice, bob = await bench.connected("alice", "bob")
    status = NodeStatus(node_id="n1", session="s", state="online")
    await alice.publish(TOPICS.node("n1", "status"), status, retain=True)
    got, handler = inbox()
    bob.subscribe(TOPICS.node("+", "status"), handler)
    await eventually(lambda: got)
    assert got[0].retained
    assert got[0].message == status
    await alice.publish(TOPICS.node("n1", "status"), status, retain=True)
    await eventually(lambda: len(got) == 2)
    assert not got[1].retained, "a subscriber who is there sees it as news"
    await alice.clear(TOPICS.node("n1", "status"))
    (carol,) = await bench.connected("carol")
    late, late_handler = inbox()
    carol.subscribe("#", late_handler)
    await carol.publish(TOPICS.jobs_submit, ListNodes())
    await eventually(lambda: late)
    assert [envelope.topic for envelope in late] == [TOPICS.jobs_submit]
    assert len(got) == 2, "clearing is no message"


async def test_the_will_is_published_after_a_crash_and_not_after_a_goodbye(bench: Bench) -> None:
    (watcher,) = await bench.connected("watcher")
    got, handler = inbox()
    watcher.subscribe(TOPICS.node("+", "status"), handler)
    await watcher.publish(TOPICS.node("x", "inbox"), ListJobs())

    def will(name: str) -> Will:
        return Will(TOPICS.node(name, "status"), NodeStatus(node_id=name, session="s", state="offline"))

    polite, crashing = bench.bus("polite", will("polite")), bench.bus("crashing", will("crashing"))
    await polite.connected(5)
    await crashing.connected(5)
    await bench.leave(polite)
    bench.cut(crashing)
    await eventually(lambda: got)
    assert [envelope.message for envelope in got] == [will("crashing").message]
    late, late_handler = inbox()
    (carol,) = await bench.connected("carol")
    carol.subscribe(TOPICS.node("+", "status"), late_handler)
    await eventually(lambda: late)
    assert late[0].retained, "the will is retained"


# --- questions and answers


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
@pytest.mark.parametrize("qos", [0, 1])
async def test_a_question_is_answered_in_its_encoding(bench: Bench, encoding: Any, qos: int) -> None:
    client, server = await bench.connected("client", "server")
    asked: list[Envelope] = []

    def make(envelope: Envelope) -> Message:
        asked.append(envelope)
        return Inferred(model="m:1", outputs=(Tensor(name="y", datatype="FP32", shape=(2,), data=b"\0\0\x80?\0\0\0@"),))

    server.subscribe(TOPICS.coordinator_inbox, answers(server, make))
    await server.publish(TOPICS.node("x", "inbox"), ListJobs())
    answer = await client.request(TOPICS.coordinator_inbox, ListNodes(), timeout_seconds=5, qos=qos, encoding=encoding)
    assert isinstance(answer, Inferred)
    assert answer.id == asked[0].message.id != ""
    assert asked[0].encoding == encoding
    assert asked[0].qos >= qos, "amqtt delivers at the QoS of the subscription, whatever that of the message"
    expected = b"\0\0\x80?\0\0\0@" if encoding == "msgpack" else [1.0, 2.0]
    assert answer.outputs[0].data == expected


async def test_many_questions_at_once_get_each_their_own_answer(bench: Bench) -> None:
    client, server = await bench.connected("client", "server")
    held: list[Envelope] = []

    async def answer_in_disorder() -> None:
        await eventually(lambda: len(held) == 50)
        random.Random(1).shuffle(held)
        for envelope in held:
            assert isinstance(envelope.message, CancelJob)
            await server.reply(envelope, JobAccepted(job_id=envelope.message.job_id))

    server.subscribe(TOPICS.coordinator_inbox, held.append)
    await server.publish(TOPICS.node("x", "inbox"), ListJobs())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answer_in_disorder())
        asking = [
            tasks.create_task(
                client.request(TOPICS.coordinator_inbox, CancelJob(job_id=f"j{number}"), timeout_seconds=10)
            )
            for number in range(50)
        ]
    assert [task.result().job_id for task in asking] == [f"j{number}" for number in range(50)]  # type: ignore[attr-defined]


async def test_an_error_is_raised_where_it_was_asked(bench: Bench) -> None:
    client, server = await bench.connected("client", "server")
    server.subscribe(TOPICS.coordinator_inbox, answers(server, lambda _: request_failed(NotFound("no such job: j9"))))
    await server.publish(TOPICS.node("x", "inbox"), ListJobs())
    with pytest.raises(NotFound, match="no such job: j9"):
        await client.request(TOPICS.coordinator_inbox, CancelJob(job_id="j9"), timeout_seconds=5)


async def test_no_answer_is_a_timeout_and_a_late_or_second_one_is_ignored(bench: Bench) -> None:
    client, server = await bench.connected("client", "server")
    held: list[Envelope] = []
    server.subscribe(TOPICS.coordinator_inbox, held.append)
    await server.publish(TOPICS.node("x", "inbox"), ListJobs())
    with pytest.raises(TimedOut, match="ListNodes"):
        await client.request(TOPICS.coordinator_inbox, ListNodes(), timeout_seconds=0.3)
    await eventually(lambda: held)
    for _ in range(2):
        await server.reply(held[0], NodesListed(nodes=()))
    await eventually(lambda: client.counters["unexpected_answers"] == 2)


async def test_an_answer_goes_only_where_answers_may_go(bench: Bench) -> None:
    alice, bob = await bench.connected("alice", "bob")
    got, handler = inbox()
    bob.subscribe(TOPICS.node("victim", "inbox"), handler)
    await bob.publish(TOPICS.node("x", "inbox"), ListJobs())
    for topic in (TOPICS.node("victim", "inbox"), "bad/+/topic", "control\x01sign", "$SYS/x", "a/" * 300):
        await bob.reply(Envelope(TOPICS.jobs_submit, ListNodes(id="1"), reply_to=topic), NodesListed(nodes=()))
    await bob.reply(Envelope(TOPICS.jobs_submit, ListNodes(id="1")), NodesListed(nodes=()))
    assert bob.counters["refused_replies"] == 5
    await alice.publish(TOPICS.node("victim", "inbox"), ListJobs())
    await eventually(lambda: got)
    assert [type(envelope.message) for envelope in got] == [ListJobs]
    assert bob.counters["connects"] == 1


async def test_an_answer_that_is_too_large_says_so(bench: Bench) -> None:
    client, server = await bench.connected("client", "server")
    large = Inferred(model="m", outputs=(Tensor(name="y", datatype="UINT8", shape=(300000,), data=bytes(300000)),))
    server.subscribe(TOPICS.coordinator_inbox, answers(server, lambda _: large))
    await server.publish(TOPICS.node("x", "inbox"), ListJobs())
    with pytest.raises(TooLarge):
        await client.request(TOPICS.coordinator_inbox, ListNodes(), timeout_seconds=5)


async def test_a_message_that_is_too_large_is_not_sent(bench: Bench) -> None:
    (bus,) = await bench.connected("alice")
    with pytest.raises(TooLarge, match="262144"):
        await bus.publish(TOPICS.jobs_submit, AcknowledgeResult(attempt_id="x" * INLINE_LIMIT_BYTES))


# --- what foreign programs send


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b'{"type": "CancelJob", "id": "q1", "reply_to": "elsewhere/answers", "job_id": 5}', "bad_message"),
        (b'{"type": "Nonsense", "id": "q1", "reply_to": "elsewhere/answers"}', "bad_message"),
        (b'{"id": "q1", "reply_to": "elsewhere/answers"}', "bad_message"),
        (msgpack.packb({"type": "CancelJob", "id": "q1", "reply_to": "elsewhere/answers"}), "bad_message"),
        (
            json.dumps(
                {"type": "CancelJob", "id": "q1", "reply_to": "elsewhere/answers", "job_id": "x" * 300_000}
            ).encode(),
            "too_large",
        ),
    ],
)
async def test_a_malformed_message_gets_an_error_in_its_encoding(bench: Bench, payload: bytes, code: str) -> None:
    server, client = await bench.connected("server", "client")
    got, handler = inbox()
    answers_got, on_answer = inbox()
    server.subscribe(TOPICS.coordinator_inbox, handler)
    client.subscribe("elsewhere/answers", on_answer)
    await server.publish(TOPICS.node("x", "inbox"), ListJobs())
    await client.publish(TOPICS.node("x", "inbox"), ListJobs())
    await bench.send_raw(TOPICS.coordinator_inbox, payload)
    await eventually(lambda: answers_got)
    answer = answers_got[0].message
    assert isinstance(answer, RequestFailed)
    assert (answer.id, answer.error.code) == ("q1", code)
    assert answers_got[0].encoding == ("json" if payload[:1] == b"{" else "msgpack")
    assert not got
    assert server.counters["malformed"] == 1


async def test_hostile_payloads_do_no_harm(bench: Bench) -> None:
    (server,) = await bench.connected("server")
    got, handler = inbox()
    server.subscribe(TOPICS.coordinator_inbox, handler)
    await server.publish(TOPICS.node("x", "inbox"), ListJobs())
    hostile = [
        b"\xff",
        b"{" * 200_000,
        b"[1]",
        b"\x81" * 100_000,
        b'{"type": "ListJobs", "id": "\\ud800", "reply_to": "a\\ud800"}',
        b'{"type": "Nope\\u0001", "reply_to": "control/\\u0001"}',
        b'{"type": "Nope", "reply_to": "' + b"a/" * 300 + b'"}',
        b'{"type": ["ListJobs"], "reply_to": "potluck/v1/test/nodes/n1/inbox"}',
        b'{"type": "' + b"\\u0001" * 40_000 + b'", "reply_to": "x/y"}',
        random.Random(2).randbytes(5000),
    ]
    for payload in hostile:
        await bench.send_raw(TOPICS.coordinator_inbox, payload)
    await bench.send_raw(TOPICS.coordinator_inbox, b' {"type": "ListJobs", "unknown": 1}')
    await eventually(lambda: got)
    assert server.counters["malformed"] == len(hostile)
    assert server.counters["connects"] == 1
    await server.publish(TOPICS.jobs_submit, ListJobs())


# --- connections that come and go


async def test_after_a_broker_restart_subscriptions_are_back_and_births_are_sent_again(bench: Bench) -> None:
    alice, bob = bench.bus("alice"), bench.bus("bob")
    got, handler = inbox()
    alice.subscribe(TOPICS.coordinator_status, handler)

    async def birth() -> None:
        await bob.publish(
            TOPICS.coordinator_status, CoordinatorStatus(session="s", epoch=1, state="online"), retain=True
        )

    bob.on_connect(birth)
    await eventually(lambda: got)
    await bench.stop_broker()
    got.clear()
    await bench.start_broker()
    await eventually(lambda: got)
    assert bob.counters["connects"] == 2
    await bob.publish(TOPICS.coordinator_status, CoordinatorStatus(session="s", epoch=2, state="online"))
    await eventually(lambda: any(envelope.message.epoch == 2 for envelope in got))  # type: ignore[attr-defined]


async def test_a_birth_that_fails_is_tried_again_on_a_new_connection(bench: Bench) -> None:
    bus = bench.bus("alice")
    tried = 0

    async def birth() -> None:
        nonlocal tried
        tried += 1
        if tried == 1:
            raise Unavailable("not yet")

    bus.on_connect(birth)
    await eventually(lambda: tried == 2)
    assert bus.counters["connects"] == 2


async def test_subscribing_at_any_moment_of_connecting_is_heard(bench: Bench) -> None:
    (alice,) = await bench.connected("alice")
    status = NodeStatus(node_id="n", session="s", state="online")
    for number in range(30):
        await alice.publish(TOPICS.node(f"n{number}", "status"), status, retain=True)
    bob = bench.bus("bob")
    got, handler = inbox()
    for number in range(30):
        bob.subscribe(TOPICS.node(f"n{number}", "status"), handler)
        await asyncio.sleep(0.0005)
    await eventually(lambda: len({envelope.topic for envelope in got}) == 30)


async def test_stopping_while_connecting_leaves_nothing(bench: Bench) -> None:
    for turns in range(0, 40, 3):
        bus = bench.bus("brief")
        for _ in range(turns):
            await asyncio.sleep(0.0003)
        await bench.leave(bus)


async def test_two_connections_with_one_name_do_not_both_stay(bench: Bench) -> None:
    first, second = bench.bus("same"), bench.bus("same")
    await eventually(lambda: first.counters["connects"] + second.counters["connects"] >= 2)
    await bench.leave(first)
    await second.connected(5)
    await second.publish(TOPICS.jobs_submit, ListNodes())


async def test_a_cut_connection_is_made_again(bench: Bench) -> None:
    alice, bob = await bench.connected("alice", "bob")
    got, handler = inbox()
    alice.subscribe(TOPICS.jobs_submit, handler)
    bench.cut(alice)
    await eventually(lambda: alice.counters["connects"] == 2)
    await alice.connected(5)
    await bob.publish(TOPICS.jobs_submit, ListNodes())
    await eventually(lambda: got)


async def test_publishing_waits_out_a_short_outage(bench: Bench) -> None:
    (alice,) = await bench.connected("alice")
    bench.cut(alice)
    await alice.publish(TOPICS.jobs_submit, ListNodes())
    await alice.publish(TOPICS.jobs_submit, ListNodes(), qos=0)
    await eventually(lambda: alice.counters["connects"] == 2)


@pytest.mark.parametrize("qos", [0, 1])
async def test_publishing_without_a_broker_fails_in_bounded_time(bench: Bench, qos: int) -> None:
    (alice,) = await bench.connected("alice")
    await bench.stop_broker()
    started = time.monotonic()

    async def publish_until_it_fails() -> None:
        # a first QoS 0 message may still leave before the loss is noticed
        for _ in range(3):
            await alice.publish(TOPICS.jobs_submit, ListNodes(), qos=qos)
            await asyncio.sleep(0.02)

    with pytest.raises(Unavailable, match="connection"):
        await publish_until_it_fails()
    assert time.monotonic() - started < 4
    with pytest.raises(Unavailable):
        await alice.connected(0.05)
    with pytest.raises(TimedOut, match="connection to the broker is lost"):
        await alice.request(TOPICS.jobs_submit, ListNodes(), timeout_seconds=0.1)


async def test_subscribing_before_running_and_while_disconnected(bench: Bench) -> None:
    (bob,) = await bench.connected("bob")
    got, handler = inbox()
    await bench.stop_broker()
    bob.subscribe(TOPICS.jobs_submit, handler)
    await bench.start_broker()
    await bob.connected(5)
    await bob.publish(TOPICS.jobs_submit, ListNodes())
    await eventually(lambda: got)


async def test_an_outage_is_told_with_the_address_and_the_reason() -> None:
    async def nowhere() -> tuple[str, int]:
        return "127.0.0.1", 1

    bus = MqttBus(nowhere, TOPICS, Credentials(), client_id="alone", timings=TIMINGS)
    task = asyncio.create_task(bus.run())
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: .*refused"):
        await bus.connected(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_failing_address_source_is_asked_again() -> None:
    asked = 0

    async def none_yet() -> tuple[str, int]:
        nonlocal asked
        asked += 1
        raise Unavailable("no coordinator found yet")

    bus = MqttBus(none_yet, TOPICS, Credentials(), client_id="alone", timings=TIMINGS)
    task = asyncio.create_task(bus.run())
    await eventually(lambda: asked >= 2)
    with pytest.raises(Unavailable, match="no coordinator found yet"):
        await bus.connected(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "does not speak MQTT, and is no MQTT broker"),
        (b"HTTP/1.1 400 Bad Request\r\n", "answers by HTTP, and is no MQTT broker: .* 1883, a gateway's 7814"),
        (b"", "hung up without a word"),
    ],
)
async def test_something_that_is_not_a_broker_is_named_as_such(said: bytes, told: str, version: Literal[4, 5]) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(said)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)

    async def there() -> tuple[str, int]:
        port: int = server.sockets[0].getsockname()[1]
        return "127.0.0.1", port

    async with server:
        bus = MqttBus(there, TOPICS, Credentials(), client_id="alone", timings=TIMINGS, highest_version=version)
        task = asyncio.create_task(bus.run())
        with pytest.raises(Unavailable, match=told):
            await bus.connected(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
async def test_a_frozen_broker_is_noticed_within_the_keepalive_and_publishing_fails_in_time(
    tmp_path: Path, kind: Any
) -> None:
    broker = TestBroker(kind, tmp_path)
    await broker.start()
    bench = Bench(broker)
    try:
        (alice,) = await bench.connected("alice")
        broker.freeze()
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await alice.publish(TOPICS.jobs_submit, ListNodes())
        assert time.monotonic() - started < TIMINGS.connect_timeout_seconds + 1
        assert isinstance(alice, MqttBus)
        await eventually(lambda: alice._link is None, timeout_seconds=TIMINGS.keepalive_seconds + 3)
        broker.thaw()
        await eventually(lambda: alice.counters["connects"] == 2)
    finally:
        await bench.close()


async def test_a_broker_that_was_replaced_by_an_older_one_is_found_again(tmp_path: Path) -> None:
    newer, older = TestBroker("mosquitto", tmp_path), TestBroker("embedded", tmp_path)
    await newer.start()
    bench = Bench(newer)
    try:
        (alice,) = await bench.connected("alice")
        await newer.stop()
        older.port = newer.port
        await older.start()
        await eventually(lambda: alice.counters["connects"] == 2)
        await alice.publish(TOPICS.jobs_submit, ListNodes())
    finally:
        await bench.close()
        await older.stop()


# --- MQTT 5


def v5(port: int) -> aiomqtt.Client:
    return aiomqtt.Client("127.0.0.1", port, protocol=aiomqtt.ProtocolVersion.V5)


async def test_a_question_may_name_its_answer_in_mqtt5_properties_alone(mosquitto: Bench) -> None:
    (server,) = await mosquitto.connected("server")
    assert mosquitto.broker is not None
    server.subscribe(TOPICS.coordinator_inbox, answers(server, lambda _: NodesListed(nodes=())))
    await server.publish(TOPICS.node("x", "inbox"), ListJobs())
    async with v5(mosquitto.broker.port) as client:
        await client.subscribe("my/answers")
        for correlation, shown in ((b"abc", "abc"), (b"\xff\xfe", "fffe")):
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = "my/answers"
            properties.CorrelationData = correlation
            for payload in (b'{"type": "ListNodes"}', b'{"type": "Unknown"}', b"rubbish"):
                await client.publish(TOPICS.coordinator_inbox, payload, qos=1, properties=properties)
                answer = await anext(aiter(client.messages))
                assert answer.properties is not None
                assert answer.properties.CorrelationData == correlation  # type: ignore[attr-defined]
                assert answer.properties.ContentType == "application/json"  # type: ignore[attr-defined]
                assert isinstance(answer.payload, bytes)
                body = json.loads(answer.payload)
                assert body["id"] == shown
                assert body["type"] == ("NodesListed" if b"ListNodes" in payload else "RequestFailed")


async def test_a_question_mirrors_its_body_into_mqtt5_properties(mosquitto: Bench) -> None:
    (client,) = await mosquitto.connected("client")
    assert mosquitto.broker is not None
    async with v5(mosquitto.broker.port) as server:
        await server.subscribe(TOPICS.coordinator_inbox)
        asking = asyncio.create_task(client.request(TOPICS.coordinator_inbox, ListNodes(), timeout_seconds=5))
        question = await anext(aiter(server.messages))
        properties: Any = question.properties
        body = msgpack.unpackb(question.payload)
        assert properties.ResponseTopic == body["reply_to"] == TOPICS.client_inbox("client")
        assert properties.CorrelationData.decode() == body["id"]
        assert properties.ContentType == "application/msgpack"
        assert 1 <= properties.MessageExpiryInterval <= 5
        # a server that knows nothing of our bodies' ids: only the correlation data comes back
        answer = Properties(PacketTypes.PUBLISH)
        answer.CorrelationData = properties.CorrelationData
        await server.publish(properties.ResponseTopic, b'{"type": "NodesListed", "nodes": []}', properties=answer)
        assert await asking == NodesListed(id=body["id"], nodes=())


async def test_a_retained_message_expires(mosquitto: Bench) -> None:
    alice, bob = await mosquitto.connected("alice", "bob")
    await alice.publish(TOPICS.job("j", "status"), ListNodes(), retain=True, expiry_seconds=1)

    async def gone() -> bool:
        got, handler = inbox()
        bob.subscribe(TOPICS.job("j", "+"), handler)
        await bob.publish(TOPICS.job("j", "events"), ListJobs())
        await eventually(lambda: any(envelope.topic.endswith("events") for envelope in got))
        bob.unsubscribe(TOPICS.job("j", "+"))
        return not any(envelope.retained for envelope in got)

    assert not await gone()
    await eventually(gone, timeout_seconds=5, every=0.2)


async def test_internals_of_paho_that_the_bus_uses(mosquitto: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A large burst of both QoS through one connection: everything arrives, no writer or receipt is left behind."""
    alice, bob = await mosquitto.connected("alice", "bob")
    got, handler = inbox()
    bob.subscribe(TOPICS.jobs_submit, handler)
    await bob.publish(TOPICS.node("x", "inbox"), ListJobs())
    message = AcknowledgeResult(attempt_id="x" * 60_000)
    with caplog.at_level(logging.WARNING):
        async with asyncio.TaskGroup() as tasks:
            for number in range(400):
                tasks.create_task(alice.publish(TOPICS.jobs_submit, message, qos=number % 2))
        await eventually(lambda: len(got) == 400)
    assert isinstance(alice, MqttBus)
    link = alice._link
    assert isinstance(link, QuickLink)
    assert not link._receipts
    assert not link._client.want_write()
    assert not caplog.records


def test_private_names_of_the_libraries_are_there_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """This test names a private name that a version lacks. With such a version, the bus uses the plain connection."""

    async def missing() -> list[str]:
        return quick_link.missing(aiomqtt.Client("localhost"))

    assert asyncio.run(missing()) == []
    monkeypatch.delattr(aiomqtt.Client, "_on_socket_open")
    monkeypatch.setattr(aiomqtt.Client, "__init__", lambda self, *rest: None)
    monkeypatch.delattr("paho.mqtt.client.Client._packet_handle")
    assert {"aiomqtt._on_socket_open", "paho._packet_handle"} < set(asyncio.run(missing()))


async def test_with_versions_that_are_not_known_the_bus_is_plain_and_says_so_once(
    mosquitto: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quick_link, "missing", lambda client: ["paho._sock_send"])
    mqtt._unknown_parts.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            alice, bob = await mosquitto.connected("alice", "bob")
        got, handler = inbox()
        bob.subscribe(TOPICS.jobs_submit, handler)
        await bob.publish(TOPICS.node("x", "inbox"), ListJobs())
        await alice.publish(TOPICS.jobs_submit, ListNodes())
        await eventually(lambda: len(got) == 1)
        assert isinstance(alice, MqttBus)
        assert isinstance(alice._link, PlainLink)
        assert [record.getMessage() for record in caplog.records if "slower" in record.getMessage()] == [
            "these versions of aiomqtt and paho are not known: the bus is slower missing=paho._sock_send "
            "tested='aiomqtt 2.5.1, paho-mqtt 2.1.0 to 2.2.0'"
        ]
    finally:
        mqtt._unknown_parts.cache_clear()


async def test_receipts_do_not_tear_a_packet_that_is_half_written(mosquitto: Bench) -> None:
    """A client that gets its own large messages at QoS 1 acknowledges them while the socket is full of the next ones."""
    alice, bob = await mosquitto.connected("alice", "bob")
    got, handler = inbox()
    alice.subscribe(TOPICS.jobs_submit, handler)
    await alice.publish(TOPICS.node("x", "inbox"), ListJobs())
    for number in range(200):
        message = AcknowledgeResult(attempt_id=f"{number:03}" + "x" * 200_000)
        while not alice.publish_now(TOPICS.jobs_submit, message):
            await alice.room()
        assert bob.publish_now(TOPICS.jobs_submit, AcknowledgeResult(attempt_id="b")) or await bob.room() is None
    await eventually(lambda: len([1 for envelope in got if len(envelope.message.attempt_id) > 1]) == 200)  # type: ignore[attr-defined]
    assert alice.counters["connects"] == 1


async def test_many_are_under_way_at_once_and_none_is_lost_with_the_connection(bench: Bench) -> None:
    alice, bob = await bench.connected("alice", "bob")
    got, handler = inbox()
    bob.subscribe(TOPICS.jobs_submit, handler)
    await bob.publish(TOPICS.node("x", "inbox"), ListJobs())
    most = 0
    for number in range(500):
        message = AcknowledgeResult(attempt_id=f"{number:03}")
        while not alice.publish_now(TOPICS.jobs_submit, message):
            await alice.room()
        if isinstance(alice, MqttBus):
            most = max(most, len(alice._under_way))
        if number in (120, 333):
            bench.cut(alice)
    await eventually(lambda: len({envelope.message.attempt_id for envelope in got}) == 500)  # type: ignore[attr-defined]
    firsts = list(dict.fromkeys(envelope.message.attempt_id for envelope in got))  # type: ignore[attr-defined]
    # amqtt may lose one of them at the cut, and keep the next.
    if bench.broker is None or bench.broker.kind == "mosquitto":
        assert firsts == sorted(firsts), "in the order of the calls, but for what came twice"
    if isinstance(alice, MqttBus):
        assert 1 < most <= 100
        await eventually(lambda: not alice._under_way)  # type: ignore[attr-defined]


async def test_the_last_retained_message_stays_when_earlier_ones_are_sent_again(mosquitto: Bench) -> None:
    alice, bob = await mosquitto.connected("alice", "bob")
    assert isinstance(alice, MqttBus)
    topic = TOPICS.node("n", "status")
    states = [NodeStatus(node_id="n", session=f"s{number}", state="online") for number in range(20)]
    for state in states:
        assert alice.publish_now(topic, state, retain=True)
    first = next(iter(alice._under_way))
    await eventually(lambda: not alice._under_way)
    alice._under_way[first] = None  # as if the broker had lost it, and had those behind it
    alice._newest[topic] = _UnderWay(topic, b"", True, None, 0.0)
    mosquitto.cut(alice)
    await eventually(lambda: alice.counters["connects"] == 2)
    await eventually(lambda: not alice._under_way)
    got, handler = inbox()
    bob.subscribe(topic, handler)
    await eventually(lambda: got)
    assert got[0].message == states[-1]


async def test_a_message_that_nobody_took_in_time_is_not_sent_late(mosquitto: Bench) -> None:
    (alice,) = await mosquitto.connected("alice")
    assert isinstance(alice, MqttBus)
    assert mosquitto.broker is not None
    mosquitto.broker.freeze()
    assert alice.publish_now(TOPICS.jobs_submit, ListNodes())
    assert alice._under_way
    for message in alice._under_way:
        message.given_up_at = 0.0
    mosquitto.cut(alice)
    mosquitto.broker.thaw()
    await eventually(lambda: alice.counters["connects"] == 2)
    assert not alice._under_way


async def test_a_question_says_when_the_broker_went(bench: Bench) -> None:
    """A caller that waits for an answer learns that the broker went: the fault is not at the receiver."""
    (alice,) = await bench.connected("alice")
    asked = asyncio.create_task(alice.request(TOPICS.jobs_submit, ListNodes(), timeout_seconds=2))
    await eventually(lambda: bool(alice._pending))
    await bench.stop_broker()
    with pytest.raises(
        TimedOut, match=r"no answer to ListNodes on .* within 2 s: the connection to the broker is lost"
    ):
        await asked


async def test_refused_requests_leave_nothing_pending(bench: Bench) -> None:
    (client,) = await bench.connected("client")
    with pytest.raises(TooLarge):
        await client.request(
            TOPICS.jobs_submit, AcknowledgeResult(attempt_id="x" * INLINE_LIMIT_BYTES), timeout_seconds=1
        )
    with pytest.raises(TimedOut):
        await client.request(TOPICS.jobs_submit, ListNodes(id="again"), timeout_seconds=0.05)
    assert not client._pending


def test_reply_topics() -> None:
    for good in ("answers/me", TOPICS.client_inbox("x"), "émigré/1"):
        assert TOPICS.check_reply_to(good) == good
    for bad in ("", "a/+", "a/#", "\0", TOPICS.jobs_submit, "potluck/v1/other/clients/x/inbox", "a\ud800"):
        with pytest.raises(InvalidRequest):
            TOPICS.check_reply_to(bad)
