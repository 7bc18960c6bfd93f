"""On the bus of a closed cluster: the topic proves who asks, answers go to whoever asked, and commands come under a seal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from potluck.bus.exchange import Envelope
from potluck.bus.properties import Mirrored
from potluck.wire import codec, seals
from potluck.wire.commands import ForgetJob, RunInference, Sealed
from potluck.wire.questions import CancelInfer, GetJob, ListNodes, NodesListed, RequestFailed
from potluck.wire.seals import Opener, Sealer, SealRefused
from potluck.wire.topics import Topics
from potluck.wire.values import INLINE_LIMIT_BYTES, Message, Tensor
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus

OPEN = Topics("closed")
ANN = Topics("closed", "ann")
INBOX = OPEN.node("n1", "inbox")
NOW = 1_800_000_000.0


def sign(data: bytes) -> bytes:
    """Stands for a signature: that of Ed25519 is tested with the keys."""
    return b"signed" + len(data).to_bytes(4)


class Cluster:
    def __init__(self) -> None:
        self.broker = FakeBroker()
        self.coordinator = FakeBus(self.broker, OPEN, client_id="coordinator")
        self.ann = FakeBus(self.broker, ANN, client_id="ann-1")
        self.node = FakeBus(self.broker, OPEN, client_id="n1")
        self.asked: list[Envelope] = []
        self.heard: list[tuple[str, Message]] = []
        self.commands: list[Envelope] = []

    async def open(self, stack: AsyncExitStack) -> None:
        self.coordinator.subscribe_asked(
            dict.fromkeys((OPEN.coordinator_inbox, OPEN.jobs_submit, OPEN.infer("+")), self._on_asked)
        )
        self.node.subscribe(INBOX, self.commands.append)
        self.ann.subscribe("#", lambda envelope: self.heard.append((envelope.topic, envelope.message)))
        for bus in (self.coordinator, self.ann, self.node):
            running = asyncio.create_task(bus.run())
            stack.callback(running.cancel)
            await bus.connected(5)

    def _on_asked(self, envelope: Envelope) -> None:
        self.asked.append(envelope)
        if isinstance(envelope.message, GetJob):
            raise RuntimeError("a bug")
        self.coordinator.reply_now(envelope, NodesListed(nodes=()))

    def answers(self) -> list[tuple[str, Message]]:
        return [one for one in self.heard if isinstance(one[1], NodesListed | RequestFailed)]

    async def settled(self) -> None:
        """Return when the coordinator has seen all that was sent to it before."""
        before = len(self.asked)
        await self.ann.publish(ANN.coordinator_inbox, ListNodes(id="last"))
        await eventually(lambda: len(self.asked) > before and self.asked[-1].message.id == "last")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        made = Cluster()
        await made.open(stack)
        yield made


async def test_whoever_asks_is_known_by_the_topic(cluster: Cluster) -> None:
    answer = await cluster.ann.request(ANN.coordinator_inbox, ListNodes(id="1"), timeout_seconds=5)
    assert isinstance(answer, NodesListed)
    await cluster.ann.publish(ANN.infer("soup"), CancelInfer(id="2"))
    await eventually(lambda: len(cluster.asked) == 2)
    assert [(one.caller, one.topic) for one in cluster.asked] == [
        ("client:ann", OPEN.coordinator_inbox),
        ("client:ann", OPEN.infer("soup")),
    ]
    assert cluster.asked[0].reply_to == "potluck/v1/closed/clients/ann/ann-1/inbox"


@pytest.mark.parametrize(
    "topic",
    [
        OPEN.coordinator_inbox,
        OPEN.jobs_submit,
        "potluck/v1/closed/clients/ann/to/nodes/n1/outbox",
        "potluck/v1/closed/clients/ann/to/nodes/n1/capacity",
        "potluck/v1/closed/clients/ann/to/clients/bob/to/coordinator/inbox",
        "potluck/v1/closed/clients//to/coordinator/inbox",
        "potluck/v1/closed/clients/ann/to/coordinator/inbox/more",
        "potluck/v1/closed/clients/ann/to/",
    ],
)
@pytest.mark.parametrize("payload", [codec.encode(ListNodes(id="q")), b"\x81\x90\x01"])
async def test_no_other_topic_asks(cluster: Cluster, topic: str, payload: bytes) -> None:
    refused: list[str] = []
    presence: list[Envelope] = []
    cluster.coordinator.on_refused = lambda topic, error: refused.append(topic)
    cluster.coordinator.subscribe(OPEN.node("+", "outbox"), presence.append)
    cluster.coordinator.subscribe(OPEN.node("+", "capacity"), presence.append)
    await cluster.ann.publish_raw(topic, payload)
    await cluster.settled()
    assert [one.message.id for one in cluster.asked] == ["last"]
    assert (refused, presence) == ([], [])


ELSEWHERE = [
    "potluck/v1/closed/clients/bob/b-1/inbox",
    "potluck/v1/closed/nodes/n1/inbox",
    "potluck/v1/closed/coordinator/status",
    "potluck/v1/closed/clients/ann/inbox",
    "potluck/v1/closed/clients/ann//inbox",
    "potluck/v1/closed/clients/ann/to/inbox",
    "potluck/v1/closed/clients/ann/to/coordinator/inbox",
    "potluck/v1/closed/clients/ann/a/b/inbox",
    "potluck/v1/closed/clients/ann/+/inbox",
    "potluck/v1/closed/clients/ann/ann-1/inbox/",
    "potluck/v1/closed/clients/ann/ann-1/outbox",
    "potluck/v1/other/clients/ann/ann-1/inbox",
    "anywhere",
    "$SYS/x",
]


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("by", ["body", "property"])
@pytest.mark.parametrize("kind", ["answered", "at fault", "malformed"])
async def test_no_answer_goes_elsewhere(cluster: Cluster, where: str, by: str, kind: str) -> None:
    question = GetJob(id="q", job_id="j") if kind == "at fault" else ListNodes(id="q")
    if by == "body":
        question = msgspec.structs.replace(question, reply_to=where)
    payload = codec.encode(question)
    if kind == "malformed":
        payload = payload.replace(b"ListNodes", b"ListNoise")
    mirrored = Mirrored("application/msgpack", where, b"q") if by == "property" else None
    cluster.broker.publish(ANN.coordinator_inbox, payload, 1, False, mirrored)
    if kind == "malformed":  # its answer is made later, and withheld then
        await eventually(lambda: cluster.coordinator.counters["refused_replies"] == 1)
    await cluster.settled()
    assert cluster.coordinator.counters["refused_replies"] == 1
    assert [one.message.id for one in cluster.asked] == ["last"], "it was not carried out either"
    assert cluster.answers() == []


@pytest.mark.parametrize("by", ["body", "property"])
async def test_what_cannot_be_read_is_answered_to_whoever_sent_it(cluster: Cluster, by: str) -> None:
    own = ANN.client_inbox("ann-1")
    payload = b'{"id": "q", "type": "GetJob"%s}' % (b', "reply_to": "%s"' % own.encode() if by == "body" else b"")
    mirrored = Mirrored("application/json", own, None) if by == "property" else None
    cluster.broker.publish(ANN.coordinator_inbox, payload, 1, False, mirrored)
    await eventually(lambda: cluster.answers())
    ((topic, answer),) = cluster.answers()
    assert topic == own
    assert isinstance(answer, RequestFailed)
    assert (answer.id, answer.error.code) == ("q", "bad_message")


# --- commands -------------------------------------------------------------------------------------------------------------


def seals_on(cluster: Cluster, **changes: Any) -> None:
    sealer = Sealer("c1", 3, "home-1", sign)

    def seal(topic: str, body: bytes) -> Sealed | None:
        found = sealer.seal(topic, "node:n1", "s1", body, NOW)
        return Sealed(seal=found.seal, body=found.body, signature=found.signature)

    cluster.coordinator.seal_on(OPEN.node("+", "inbox"), changes.get("seal", seal))


def opens_on(cluster: Cluster, session: str = "s1") -> None:
    opener = Opener("node:n1", session, "home-1", lambda signature, data: signature == sign(data))

    def opens(topic: str, message: Sealed) -> bytes:
        return opener.open(seals.Sealed(message.seal, message.body, message.signature), topic, NOW, 0.0)

    cluster.node.open_on(INBOX, opens)


async def test_commands_travel_under_a_seal(cluster: Cluster) -> None:
    seals_on(cluster)
    opens_on(cluster)
    largest = RunInference(
        id="b",
        replica_id="r",
        requests=((Tensor(name="x", datatype="UINT8", shape=(1,), data=bytes(INLINE_LIMIT_BYTES - 150)),),),
    )
    assert len(codec.encode(largest)) > INLINE_LIMIT_BYTES - 100
    assert cluster.coordinator.publish_now(INBOX, ForgetJob(job_id="j", epoch=3))
    assert cluster.coordinator.publish_now(INBOX, largest, qos=0, expiry_seconds=5.0)
    await cluster.coordinator.publish(INBOX, ForgetJob(job_id="k", epoch=3), encoding="json")
    await eventually(lambda: len(cluster.commands) == 3)
    first, second, third = (one.message for one in cluster.commands)
    assert (first, third) == (ForgetJob(job_id="j", epoch=3), ForgetJob(job_id="k", epoch=3))
    assert isinstance(second, RunInference)
    assert second.requests == largest.requests
    assert second.expires, "the body has it too, and only the body is covered"
    assert codec.decode(cluster.commands[0].payload)[0] == first
    sent = [payload for topic, payload in cluster.broker.published if topic == INBOX]
    assert all(payload.startswith(b"\x84\xa4type\xa6Sealed") for payload in sent)
    assert cluster.node.counters["refused_seals"] == 0


async def test_a_command_that_is_not_sealed_or_not_ours_is_dropped(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Envelope] = []
    cluster.ann.subscribe("answers", heard.append)
    opens_on(cluster)
    await cluster.coordinator.publish(INBOX, ForgetJob(id="x", job_id="j", reply_to="answers"))
    await eventually(lambda: cluster.node.counters["refused_seals"] == 1)
    seals_on(cluster)
    opens_on(cluster, session="s2")
    await cluster.coordinator.publish(INBOX, ForgetJob(job_id="j"))
    await eventually(lambda: cluster.node.counters["refused_seals"] == 2)
    opens_on(cluster)
    await cluster.coordinator.publish(INBOX, ForgetJob(job_id="j"))
    await eventually(lambda: len(cluster.commands) == 1)
    cluster.broker.publish(*again(cluster), 1, False, None)
    await eventually(lambda: cluster.node.counters["refused_seals"] == 3)
    assert len(cluster.commands) == 1
    assert heard == []
    said = [record.getMessage() for record in caplog.records if "message not taken" in record.getMessage()]
    assert len(said) == 1, "a flood of them does not fill the log"
    assert "ForgetJob is not sealed" in said[0]


def again(cluster: Cluster) -> tuple[str, bytes]:
    return [one for one in cluster.broker.published if one[0] == INBOX][-1]


async def test_what_the_seal_does_not_cover_is_not_read(cluster: Cluster) -> None:
    seals_on(cluster)
    opens_on(cluster)
    await cluster.coordinator.publish(INBOX, ForgetJob(job_id="j"))
    await eventually(lambda: len(cluster.commands) == 1)
    opens_on(cluster)  # anew, so that it may come again
    cluster.broker.publish(*again(cluster), 1, False, Mirrored("application/msgpack", "answers", b"an-id"))
    await eventually(lambda: len(cluster.commands) == 2)
    assert (cluster.commands[1].reply_to, cluster.commands[1].message.id) == ("", "")
    assert cluster.commands[1].correlation is None


async def test_nothing_is_sent_where_nothing_can_be_sealed(cluster: Cluster) -> None:
    seals_on(cluster, seal=lambda topic, body: None)
    assert cluster.coordinator.publish_now(INBOX, ForgetJob(job_id="j")), "it is done with"
    await cluster.coordinator.publish(INBOX, ForgetJob(job_id="j"))
    await cluster.settled()
    assert INBOX not in [topic for topic, _ in cluster.broker.published]


async def test_a_sealed_body_that_cannot_be_read_is_no_command(cluster: Cluster) -> None:
    def opens(topic: str, message: Sealed) -> bytes:
        if message.body == b"no":
            raise SealRefused("no")
        return message.body

    cluster.node.open_on(INBOX, opens)
    for body in (b"no", b"\x81\x90\x01", codec.encode(Sealed(seal=b"", body=b"", signature=b""))):
        await cluster.coordinator.publish(INBOX, Sealed(seal=b"s", body=body, signature=b"s"))
    await eventually(lambda: len(cluster.commands) == 1)
    assert cluster.node.counters["refused_seals"] == 1
    assert cluster.node.counters["malformed"] == 1
    assert isinstance(cluster.commands[0].message, Sealed), "a seal in a seal opens nothing: no handler knows it"


async def test_other_topics_are_as_ever(cluster: Cluster) -> None:
    seals_on(cluster)
    await cluster.coordinator.publish(ANN.client_inbox("x"), NodesListed(nodes=()))
    await eventually(lambda: cluster.answers())
    assert isinstance(cluster.answers()[0][1], NodesListed)
