"""A Serving on a bus in memory, and scripted nodes with replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from coordinator.journal import Journal
from coordinator.membership import Membership
from coordinator.registry import Registry
from coordinator.serving.bus_requests import BusRequests
from coordinator.serving.endpoints import OneNode
from coordinator.serving.inference import Inference
from coordinator.serving.serving import Serving
from potluck.bus.exchange import Envelope
from potluck.bus.outbox import Outbox
from potluck.settings import CoordinatorSettings
from potluck.wire import tensors
from potluck.wire.births import NodeCapacity, NodeStatus, NodeTelemetry
from potluck.wire.commands import CancelInference, LoadModel, RunInference, UnloadModel
from potluck.wire.jobs import Deploy
from potluck.wire.questions import Infer, Inferred
from potluck.wire.reports import InferenceFinished, ModelLoaded, ModelLoadFailed, RequestOutcome
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Capacity, ErrorInfo, Signature, Tensor, TensorSpec
from support.fake_bus import FakeBroker, FakeBus

TOPICS = Topics("serve")
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 2)),),
)
BROKEN = ErrorInfo(code="invalid_model", message="it has a Lambda layer")


class Node:
    """Loads every model (or refuses it as `broken`), and answers each request with twice its input (unless `mute`)."""

    def __init__(self, broker: FakeBroker, node_id: str, *runtimes: str) -> None:
        self.node_id = node_id
        self.runtimes = dict.fromkeys(runtimes or ("tensorflow",), "2")
        self.bus = FakeBus(broker, TOPICS, client_id=node_id)
        self.broken = False
        self.mute = False
        self.slow_to_load = False
        self.forgetful = False
        self.signature = SIGNATURE
        """The signature of models that it loads from now on."""
        self.signatures: dict[str, Signature] = {}
        self.fetch: Callable[[BlobRef], bytes] | None = None
        """How it fetches inputs that are blobs."""
        self.keep: Callable[[bytes], BlobRef] | None = None
        """If set, it answers with blobs."""
        self.inputs: list[tuple[Tensor, ...]] = []
        """The requests as they came."""
        self.failing: ErrorInfo | None = None
        self.fails = ""
        """Replicas whose ids begin with this fail with `failing`: those of a version, or all ("")."""
        self.resident_bytes = 0
        """The memory of a replica that it reports after loading."""
        self.unloaded: list[str] = []
        self.loaded: list[str] = []
        self.formats: list[str] = []
        self.batches: list[int] = []
        self.cancelled: list[str] = []
        self.asked: list[RunInference] = []
        self.outbox = Outbox(self.bus)
        self.bus.subscribe(TOPICS.node(node_id, "inbox"), self.on_command)

    def on_command(self, envelope: Envelope) -> None:
        topic = TOPICS.node(self.node_id, "outbox")
        match envelope.message:
            case LoadModel(replica_id=replica_id):
                if self.slow_to_load:
                    return  # it is asked again
                if self.broken:
                    self.outbox.publish(topic, ModelLoadFailed(replica_id=replica_id, error=BROKEN))
                else:
                    self.formats.append(envelope.message.format)
                    self.loaded.append(replica_id)
                    signature = self.signatures.setdefault(replica_id, self.signature)
                    loaded = ModelLoaded(replica_id=replica_id, signature=signature, resident_bytes=self.resident_bytes)
                    self.outbox.publish(topic, loaded)
            case UnloadModel(replica_id=replica_id):
                self.unloaded.append(replica_id)
                self.loaded = [one for one in self.loaded if one != replica_id]
            case CancelInference(id=batch_id):
                self.cancelled.append(batch_id)
            case RunInference() as batch if self.mute:
                self.asked.append(batch)
            case RunInference() as batch if self.forgetful or (
                self.failing is not None and batch.replica_id.startswith(self.fails)
            ):
                error = self.failing or ErrorInfo(code="not_found", message="replica is not loaded on this node")
                outcomes = (RequestOutcome(error=error),) * len(batch.requests)
                finished = InferenceFinished(id=batch.id, replica_id=batch.replica_id, outcomes=outcomes)
                self.outbox.publish(topic, finished, qos=0)
            case RunInference() as batch:
                self.batches.append(len(batch.requests))
                outcomes = tuple(
                    RequestOutcome(outputs=self.doubled(self.signatures[batch.replica_id], request))
                    for request in batch.requests
                )
                finished = InferenceFinished(id=batch.id, replica_id=batch.replica_id, outcomes=outcomes)
                self.outbox.publish(topic, finished, qos=0)

    def doubled(self, signature: Signature, request: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The doubled first input, as each output."""
        self.inputs.append(request)
        first = request[0]
        if isinstance(first.data, BlobRef):
            assert self.fetch is not None, "an input is a blob"
            first = replace(first, data=tensors.unpacked(first.name, first.datatype, self.fetch(first.data)))
        found = tuple(tensors.from_numpy(spec.name, 2 * tensors.to_numpy(first)) for spec in signature.outputs)
        if self.keep is None:
            return found
        return tuple(replace(tensor, data=self.keep(tensors.packed(tensor))) for tensor in found)


class Lab:
    """A Serving with its surroundings; `join` and `leave` do what births and wills do in the daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = FakeBroker()
        self.nodes: dict[str, Node] = {}
        self.settings = CoordinatorSettings(resend_seconds=1.0, queue_limit=50)
        self.clock_ahead_seconds = 0.0
        """How far the clock of the next opened coordinator is ahead."""

    async def open(self, stack: AsyncExitStack, name: str = "coordinator") -> None:
        self.journal = Journal(self.folder / "journal")
        self.bus = FakeBus(self.broker, TOPICS, client_id=name)
        self.outbox = Outbox(self.bus)
        self.membership = Membership(1000.0)
        self.registry = Registry(self.journal)
        ahead_seconds = self.clock_ahead_seconds

        def clock() -> float:
            return time.time() + ahead_seconds

        self.inference = Inference(registry=self.registry, settings=self.settings, clock=clock)
        self.answers = Outbox(self.bus)
        self.endpoint = partial(OneNode, topics=TOPICS, outbox=self.answers)
        self.bus_requests = BusRequests(
            self.inference, topics=TOPICS, outbox=self.answers, settings=self.settings, clock=clock
        )
        self.serving = Serving(
            topics=TOPICS, outbox=self.outbox, inference=self.inference, membership=self.membership,
            registry=self.registry, journal=self.journal, settings=self.settings, holders=lambda sha256: ("http://here",),
            endpoint=self.endpoint, epoch=self.journal.epoch, clock=clock,
        )  # fmt: skip
        self.bus.subscribe(TOPICS.infer("+"), self.bus_requests.on_infer)
        self.bus.subscribe(TOPICS.node("+", "outbox"), self._on_outbox)
        self.running = asyncio.create_task(self._run(), name="lab")
        stack.push_async_callback(self.close)
        await self.bus.connected(5)
        for node_id in self.nodes:
            self._born(node_id)

    async def close(self) -> None:
        if not self.running.done():
            self.running.cancel()
            await asyncio.wait([self.running])
            self.inference.stop()
            self.journal.close()

    async def deploy(self, model: str, replicas: int = 1, **options: Any) -> str:
        return await self.serving.deploy(Deploy(model=model, replicas=replicas, **options))

    async def join(self, stack: AsyncExitStack, node_id: str, *runtimes: str) -> Node:
        node = self.nodes[node_id] = Node(self.broker, node_id, *runtimes)
        tasks = [asyncio.create_task(part, name=node_id) for part in (node.bus.run(), node.outbox.run())]

        async def stop() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        stack.push_async_callback(stop)
        await node.bus.connected(5)
        self._born(node_id)
        return node

    def leave(self, node_id: str) -> None:
        status = NodeStatus(node_id=node_id, session="1", state="offline")
        self.membership.on_status(status, 0.0)
        self.serving.node_lost(node_id)

    def report(self, node_id: str, replicas: tuple[str, ...], available_bytes: int = 0) -> None:
        """Report a node's replicas and memory, as telemetry does."""
        if self.membership.get(node_id) is None:
            self._born(node_id, join=False)
        telemetry = NodeTelemetry(
            node_id=node_id,
            session="1",
            cpu_percent=0,
            memory_used_bytes=0,
            memory_available_bytes=available_bytes,
            replicas=replicas,
        )
        self.membership.on_telemetry(telemetry, 0.0)
        self.serving.node_joined(node_id)

    def add_model(self, number: int = 1, **changes: Any) -> None:
        self.registry.add_model("m", BlobRef(sha256=f"{number:064x}", size=1), now=1.0, **changes)

    def _born(self, node_id: str, join: bool = True) -> None:
        runtimes = self.nodes[node_id].runtimes if node_id in self.nodes else {"tensorflow": "2"}
        capacity = Capacity(hostname=node_id, system="", cores=1, memory_bytes=2**36, runtimes=runtimes, gflops=1.0)
        self.membership.on_capacity(NodeCapacity(node_id=node_id, capacity=capacity), 0.0)
        self.membership.on_status(NodeStatus(node_id=node_id, session="1", state="online"), 0.0)
        if join:
            self.serving.node_joined(node_id)

    def _on_outbox(self, envelope: Envelope) -> None:
        node_id = TOPICS.segment(envelope.topic, 1)
        if isinstance(envelope.message, InferenceFinished):
            self.inference.on_answers(node_id, envelope.message)
        else:
            self.serving.on_node_event(node_id, envelope.message)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for part in (self.bus.run(), self.outbox.run(), self.answers.run(), self.serving.run()):
                tasks.create_task(part)


@asynccontextmanager
async def client(lab: Lab) -> AsyncIterator[FakeBus]:
    bus = FakeBus(lab.broker, TOPICS, client_id="client")
    running = asyncio.create_task(bus.run(), name="client")
    await bus.connected(5)
    try:
        yield bus
    finally:
        running.cancel()
        await asyncio.wait([running])


def question(*rows: float) -> Infer:
    return Infer(inputs=(tensors.from_numpy("x", np.float32([rows])),))


async def ask(bus: FakeBus, message: Infer, model: str = "m", **options: Any) -> Inferred:
    answer = await bus.request(TOPICS.infer(model), message, timeout_seconds=10, **options)
    assert isinstance(answer, Inferred)
    return answer
