"""Endpoints: on whatever nodes a replica is, requests reach it, and are answered or asked again elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from coordinator.journal import Journal
from coordinator.registry import Registry
from coordinator.serving.batches import Batch
from coordinator.serving.endpoints import Endpoint, OneNode, run_inference
from coordinator.serving.inference import Asked, Inference
from potluck.bus.exchange import Envelope
from potluck.bus.outbox import Outbox
from potluck.errors import Cancelled, InputsLost, InvalidRequest, PotluckError, Unavailable
from potluck.settings import CoordinatorSettings
from potluck.wire import tensors
from potluck.wire.commands import CancelInference, RunInference
from potluck.wire.questions import Inferred
from potluck.wire.reports import InferenceFinished, RequestOutcome
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Message, Signature, Tensor, TensorSpec
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus

TOPICS = Topics("endpoints")
NODES = ("a", "b", "c", "z")
KINDS = (("a",), ("a", "b"), ("a", "b", "c"))
"""The nodes of a replica: batches go to the first, and the last one answers."""
RESTING_ON = [(nodes, node) for nodes in KINDS for node in nodes]


class Chain:
    """A replica of several stages, each on a different node. Each stage passes its results to the next."""

    def __init__(self, replica_id: str, nodes: tuple[str, ...], outbox: Outbox) -> None:
        self.replica_id = replica_id
        self.nodes = frozenset(nodes)
        self.takes_at, self.answers_from = nodes[0], nodes[-1]
        self._outbox = outbox

    def send(self, batch: Batch) -> None:
        self._outbox.publish(TOPICS.node(self.takes_at, "inbox"), run_inference(batch), qos=0)

    def withdraw(self, batch: Batch) -> None:
        for node_id in self.nodes:
            message = CancelInference(id=batch.batch_id, replica_id=self.replica_id)
            self._outbox.publish(TOPICS.node(node_id, "inbox"), message, qos=0)


class Stand:
    """An Inference on a bus in memory, and nodes that the test controls."""

    def __init__(self, folder: Path) -> None:
        self.broker = FakeBroker()
        self.bus = FakeBus(self.broker, TOPICS, client_id="coordinator")
        self.outbox = Outbox(self.bus)
        self.journal = Journal(folder / "journal")
        self.registry = Registry(self.journal)
        self.registry.add_model("m", BlobRef(sha256="1" * 64, size=1), now=1.0)
        self.inference = Inference(
            registry=self.registry,
            settings=CoordinatorSettings(),
            node_at=lambda url: url.removeprefix("http://").removesuffix(":1"),
        )
        self.inference.open("m:1")
        self.nodes = {node_id: FakeBus(self.broker, TOPICS, client_id=node_id) for node_id in NODES}
        self.heard: dict[str, list[Message]] = {node_id: [] for node_id in NODES}
        self.answers: list[Inferred | PotluckError] = []
        self.bus.subscribe(TOPICS.node("+", "outbox"), self._on_outbox)
        for node_id, bus in self.nodes.items():
            bus.subscribe(
                TOPICS.node(node_id, "inbox"),
                lambda envelope, heard=self.heard[node_id]: heard.append(envelope.message),
            )

    def ready(self, replica_id: str, nodes: tuple[str, ...]) -> None:
        endpoint: Endpoint = Chain(replica_id, nodes, self.outbox)
        if len(nodes) == 1:
            endpoint = OneNode(replica_id, nodes[0], topics=TOPICS, outbox=self.outbox)
        self.inference.add_replica("m:1", endpoint)

    def ask(self, tensor: Tensor | None = None) -> Asked:
        now = time.time()
        inputs = (tensor or tensors.from_numpy("x", np.float32([[1, 2]])),)
        return self.inference.ask("m", inputs, self.answers.append, now, now + 30)

    async def asked(self, node_id: str, count: int = 1) -> RunInference:
        """The latest of the `count` batches that this node got; no other node got one."""
        found = await eventually(lambda: (got := self._batches(node_id))[count - 1 :] and got)
        assert len(found) == count
        assert not any(self._batches(other) for other in NODES if other != node_id)
        return found[-1]

    async def answer(self, node_id: str, batch: RunInference) -> None:
        """Answer a batch from this node. The answer was received when this returns."""
        outcomes = tuple(RequestOutcome(outputs=inputs) for inputs in batch.requests)
        message = InferenceFinished(id=batch.id, replica_id=batch.replica_id, outcomes=outcomes)
        before = self.bus.counters["received"]
        await self.nodes[node_id].publish(TOPICS.node(node_id, "outbox"), message, qos=0)
        await eventually(lambda: self.bus.counters["received"] > before)

    def _batches(self, node_id: str) -> list[RunInference]:
        return [message for message in self.heard[node_id] if isinstance(message, RunInference)]

    def _on_outbox(self, envelope: Envelope) -> None:
        assert isinstance(envelope.message, InferenceFinished)
        self.inference.on_answers(TOPICS.segment(envelope.topic, 1), envelope.message)


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    made = Stand(tmp_path)
    async with AsyncExitStack() as stack:
        stack.callback(made.journal.close)
        stack.callback(made.inference.stop)
        parts = [bus.run() for bus in (made.bus, *made.nodes.values())]
        running = [asyncio.create_task(part, name="stand") for part in (*parts, made.outbox.run())]

        async def stop() -> None:
            for task in running:
                task.cancel()
            await asyncio.wait(running)

        stack.push_async_callback(stop)
        for bus in (made.bus, *made.nodes.values()):
            await bus.connected(5)
        yield made


@pytest.mark.parametrize("nodes", KINDS)
async def test_its_first_node_takes_and_its_last_answers(stand: Stand, nodes: tuple[str, ...]) -> None:
    stand.inference.set_objective("m:1", 0.5)
    stand.ready("r", nodes)
    before = time.time()
    stand.ask()
    batch = await stand.asked(nodes[0])
    assert (batch.replica_id, len(batch.requests), batch.objective_seconds) == ("r", 1, 0.5)
    assert before + 30 <= batch.expires <= time.time() + 30
    assert 29 < batch.valid_seconds <= 30
    await stand.answer(nodes[-1], batch)
    (answer,) = stand.answers
    assert isinstance(answer, Inferred)
    assert (answer.model, tensors.to_numpy(answer.outputs[0]).tolist()) == ("m:1", [[1, 2]])
    await stand.answer(nodes[-1], batch)  # a message may come twice
    assert len(stand.answers) == 1


async def test_a_late_answer_from_before_a_new_deployment_is_ignored(stand: Stand) -> None:
    stand.ready("r", ("a",))
    stand.ask()
    late = await stand.asked("a")
    stand.inference.close("m:1", Unavailable("undeployed"))
    stand.inference.open("m:1")
    stand.ready("r", ("a",))
    stand.ask()
    await stand.asked("a", 2)
    await stand.answer("a", late)
    assert [type(answer) for answer in stand.answers] == [Unavailable]
    assert stand.inference.busy("m:1")


async def test_a_single_item_may_lack_the_batch_axis_only_where_that_is_allowed(stand: Stand) -> None:
    """Rows of HTTP are a list of items: three numbers are three bad rows there, and not one good one."""
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 2))
    stand.registry.describe("m:1", Signature(inputs=(spec,), outputs=()))
    stand.ready("r", ("a",))
    item = tensors.from_numpy("x", np.float32([1, 2]))
    stand.ask(item)
    (refused,) = stand.answers
    assert isinstance(refused, InvalidRequest)
    now = time.time()
    stand.inference.ask("m", (item,), stand.answers.append, now, now + 30, items=True)
    batch = await stand.asked("a")
    assert batch.requests[0][0].shape == (1, 2)


@pytest.mark.parametrize("nodes", KINDS)
async def test_answers_of_other_nodes_are_ignored(stand: Stand, nodes: tuple[str, ...]) -> None:
    stand.ready("r", nodes)
    stand.ask()
    batch = await stand.asked(nodes[0])
    for other in (*nodes[:-1], "z"):
        await stand.answer(other, batch)
    assert stand.answers == []
    assert stand.inference.busy("m:1")
    await stand.answer(nodes[-1], batch)
    assert len(stand.answers) == 1


@pytest.mark.parametrize(("nodes", "anew"), RESTING_ON)
async def test_it_is_asked_again_when_any_of_its_nodes_connects_anew(
    stand: Stand, nodes: tuple[str, ...], anew: str
) -> None:
    stand.ready("r", nodes)
    stand.ask()
    batch = await stand.asked(nodes[0])
    stand.inference.ask_again("z")
    stand.inference.ask_again(anew)
    again = await stand.asked(nodes[0], count=2)
    assert (again.requests, again.replica_id) == (batch.requests, "r")
    assert again.id != batch.id
    await stand.answer(nodes[-1], again)
    assert len(stand.answers) == 1


@pytest.mark.parametrize(("nodes", "lost"), RESTING_ON)
async def test_it_is_lost_with_any_of_its_nodes_and_another_replica_is_asked(
    stand: Stand, nodes: tuple[str, ...], lost: str
) -> None:
    stand.ready("r", nodes)
    stand.ask()
    batch = await stand.asked(nodes[0])
    stand.inference.node_lost("z")
    assert list(stand.inference.router("m:1").lanes) == ["r"]
    stand.inference.node_lost(lost)
    assert not stand.inference.router("m:1").lanes
    await stand.answer(nodes[-1], batch)
    assert stand.answers == []
    stand.heard[nodes[0]].clear()
    stand.ready("other", ("z",))
    await stand.answer("z", await stand.asked("z"))
    assert len(stand.answers) == 1


@pytest.mark.parametrize("nodes", KINDS)
async def test_a_batch_that_nobody_waits_for_is_withdrawn(stand: Stand, nodes: tuple[str, ...]) -> None:
    stand.ready("r", nodes)
    asked = stand.ask()
    batch = await stand.asked(nodes[0])
    assert asked.waits
    stand.inference.cancel(asked)
    assert [type(answer) for answer in stand.answers] == [Cancelled]
    withdrawn = CancelInference(id=batch.id, replica_id="r")
    await eventually(lambda: withdrawn in stand.heard[nodes[0]])


@pytest.mark.parametrize("nodes", KINDS)
async def test_inputs_are_near_a_replica_if_its_first_node_has_them(stand: Stand, nodes: tuple[str, ...]) -> None:
    stand.ready("r", nodes)
    assert stand.inference.nodes_of("m") == [nodes[0]]
    stand.ready("other", ("z",))
    held = Tensor(
        name="x",
        datatype="FP32",
        shape=(1, 2),
        data=BlobRef(sha256="2" * 64, size=10**9, holders=(f"http://{nodes[0]}:1",)),
    )
    for count in range(1, 3):
        stand.ask(held)
        await stand.asked(nodes[0], count)
    stand.inference.node_lost(nodes[0])
    assert [type(answer) for answer in stand.answers] == [InputsLost] * 2


async def test_a_closed_deployment_is_forgotten(stand: Stand) -> None:
    stand.ready("r", ("a", "b"))
    stand.ask()
    batch = await stand.asked("a")
    stand.inference.close("m:1", InputsLost("undeployed"))
    assert len(stand.answers) == 1
    await stand.answer("b", batch)
    stand.inference.ask_again("a")
    stand.inference.node_lost("b")
    assert len(stand.answers) == 1
