"""Serving on a bus in memory, with scripted nodes: deploy, ask, lose, replace; and the gateway over a real socket."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from coordinator.gateway import routes as gateway
from coordinator.journal import Journal
from coordinator.membership import Membership
from coordinator.serving.registry import Registry
from coordinator.serving.serving import Serving
from potluck import tensors
from potluck.errors import InvalidModel, InvalidRequest, NotFound, Unavailable
from potluck.exchange import Envelope
from potluck.http import serve_http
from potluck.messages import (
    BlobRef,
    Capacity,
    ErrorInfo,
    Infer,
    InferenceFinished,
    Inferred,
    LoadModel,
    ModelLoaded,
    ModelLoadFailed,
    NodeCapacity,
    NodeStatus,
    RequestOutcome,
    RunInference,
    Signature,
    TensorSpec,
    UnloadModel,
)
from potluck.outbox import Outbox
from potluck.settings import CoordinatorSettings
from potluck.topics import Topics
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus

TOPICS = Topics("serve")
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 2)),),
)
BROKEN = ErrorInfo(code="invalid_model", message="it has a Lambda layer")


class Node:
    """Says yes to every model (or `broken`), and answers each request with twice its input (unless `mute`)."""

    def __init__(self, broker: FakeBroker, node_id: str) -> None:
        self.node_id = node_id
        self.bus = FakeBus(broker, TOPICS, client_id=node_id)
        self.broken = False
        self.mute = False
        self.loaded: list[str] = []
        self.batches: list[int] = []
        self.outbox = Outbox(self.bus)
        self.bus.subscribe(TOPICS.node(node_id, "inbox"), self.on_command)

    def on_command(self, envelope: Envelope) -> None:
        topic = TOPICS.node(self.node_id, "outbox")
        match envelope.message:
            case LoadModel(replica_id=replica_id):
                if self.broken:
                    self.outbox.publish(topic, ModelLoadFailed(replica_id=replica_id, error=BROKEN))
                else:
                    self.loaded.append(replica_id)
                    self.outbox.publish(topic, ModelLoaded(replica_id=replica_id, signature=SIGNATURE))
            case UnloadModel(replica_id=replica_id):
                self.loaded = [one for one in self.loaded if one != replica_id]
            case RunInference() as batch if not self.mute:
                self.batches.append(len(batch.requests))
                outcomes = tuple(
                    RequestOutcome(outputs=(tensors.from_numpy("y", 2 * tensors.to_numpy(request[0])),))
                    for request in batch.requests
                )
                finished = InferenceFinished(id=batch.id, replica_id=batch.replica_id, outcomes=outcomes)
                self.outbox.publish(topic, finished, qos=0)


class Lab:
    """A Serving with its surroundings; `join` and `leave` are what births and wills do in the daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = FakeBroker()
        self.nodes: dict[str, Node] = {}
        self.settings = CoordinatorSettings(resend_seconds=1.0, queue_limit=50)

    async def open(self, stack: AsyncExitStack, name: str = "coordinator") -> None:
        self.journal = Journal(self.folder / "journal")
        self.bus = FakeBus(self.broker, TOPICS, client_id=name)
        self.outbox = Outbox(self.bus)
        self.membership = Membership(1000.0)
        self.registry = Registry(self.journal)
        self.serving = Serving(
            bus=self.bus, topics=TOPICS, outbox=self.outbox, membership=self.membership, registry=self.registry,
            journal=self.journal, settings=self.settings, urls=("http://here",), epoch=self.journal.epoch,
        )  # fmt: skip
        self.bus.subscribe(TOPICS.infer("+"), self.serving.on_infer)
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
            self.journal.close()

    async def join(self, stack: AsyncExitStack, node_id: str) -> Node:
        node = self.nodes[node_id] = Node(self.broker, node_id)
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

    def add_model(self, number: int = 1) -> None:
        self.registry.add_model("m", BlobRef(sha256=f"{number:064x}", size=1), now=1.0)

    def _born(self, node_id: str) -> None:
        capacity = Capacity(
            hostname=node_id, system="", cores=1, memory_bytes=1, runtimes={"tensorflow": "2"}, gflops=1.0
        )
        self.membership.on_capacity(NodeCapacity(node_id=node_id, capacity=capacity))
        self.membership.on_status(NodeStatus(node_id=node_id, session="1", state="online"), 0.0)
        self.serving.node_joined(node_id)

    def _on_outbox(self, envelope: Envelope) -> None:
        self.serving.on_node_event(TOPICS.segment(envelope.topic, 1), envelope.message)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for part in (self.bus.run(), self.outbox.run(), self.serving.run()):
                tasks.create_task(part)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def lab(tmp_path: Path, stack: AsyncExitStack) -> Lab:
    made = Lab(tmp_path)
    await made.open(stack)
    return made


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


async def test_deploy_and_ask_in_both_encodings(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.join(stack, "a")
    await lab.join(stack, "b")
    lab.add_model()
    assert await lab.serving.deploy("m", 2) == "m:1"
    (info,) = lab.serving.deployments()
    assert [replica.state for replica in info.replicas] == ["ready", "ready"]
    assert lab.registry.model("m").signature == SIGNATURE
    async with client(lab) as bus:
        for model in ("m", "m:1"):
            answer = await ask(bus, question(1, 2), model)
            np.testing.assert_array_equal(tensors.to_numpy(answer.outputs[0]), [[2, 4]])
        spoken = await ask(bus, question(1, 2), encoding="json")
        assert spoken.outputs[0].data == [2.0, 4.0]


async def test_many_questions_share_batches(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.serving.deploy("m", 1)
    async with client(lab) as bus:
        answers = await asyncio.gather(*(ask(bus, question(n, n)) for n in range(40)))
    assert [float(tensors.to_numpy(answer.outputs[0])[0, 0]) for answer in answers] == [2.0 * n for n in range(40)]
    assert sum(node.batches) == 40
    assert len(node.batches) < 40


async def test_a_lost_replica_is_replaced_and_its_questions_are_asked_again(lab: Lab, stack: AsyncExitStack) -> None:
    first = await lab.join(stack, "a")
    lab.add_model()
    await lab.serving.deploy("m", 1)
    second = await lab.join(stack, "b")
    first.mute = True
    async with client(lab) as bus:
        asked = asyncio.create_task(ask(bus, question(3, 4)))
        await eventually(lambda: lab.serving._routers["m:1"].in_flight)
        lab.leave("a")
        np.testing.assert_array_equal(tensors.to_numpy((await asked).outputs[0]), [[6, 8]])
    assert second.loaded


async def test_a_model_that_cannot_be_loaded_says_why(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    node.broken = True
    lab.add_model()
    with pytest.raises(InvalidModel, match="Lambda"):
        await lab.serving.deploy("m", 1)
    assert lab.serving.deployments() == ()


async def test_more_replicas_than_nodes(lab: Lab, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.serving.serving.JOIN_SECONDS", 0.3)
    await lab.join(stack, "a")
    lab.add_model()
    with pytest.raises(InvalidRequest, match="2 replicas were asked for, but 1 node"):
        await lab.serving.deploy("m", 2)


async def test_undeploy_answers_who_waits(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.serving.deploy("m", 1)
    node.mute = True
    async with client(lab) as bus:
        asked = asyncio.create_task(ask(bus, question(1, 1)))
        await eventually(lambda: lab.serving._routers["m:1"].in_flight)
        assert await lab.serving.undeploy("m") == ("m:1",)
        with pytest.raises(Unavailable, match="undeployed"):
            await asked
        await eventually(lambda: not node.loaded)
        with pytest.raises(NotFound, match="potluck deploy m"):
            await ask(bus, question(1, 1))
    with pytest.raises(NotFound, match="not deployed"):
        await lab.serving.undeploy("m")


async def test_the_newest_deployed_version_answers_to_the_plain_name(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.join(stack, "a")
    lab.add_model(1)
    lab.add_model(2)
    await lab.serving.deploy("m:1", 1)
    async with client(lab) as bus:
        assert (await ask(bus, question(1, 1))).model == "m:1"
        await lab.serving.deploy("m:2", 1)
        assert (await ask(bus, question(1, 1))).model == "m:2"
        assert (await ask(bus, question(1, 1), "m:1")).model == "m:1"


async def test_deployments_are_taken_up_again_after_a_restart(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.join(stack, "a")
    lab.add_model()
    await lab.serving.deploy("m", 1)
    await lab.close()
    await lab.open(stack, "coordinator-again")
    await eventually(lambda: lab.serving.deployments() and lab.serving.ready("m"))
    async with client(lab) as bus:
        assert (await ask(bus, question(1, 1))).model == "m:1"


@pytest.fixture
async def http(lab: Lab, stack: AsyncExitStack) -> tuple[str, aiohttp.ClientSession]:
    await lab.join(stack, "a")
    lab.add_model()
    await lab.serving.deploy("m", 1)
    sock = socket.create_server(("127.0.0.1", 0))
    found = gateway.routes(lab.serving, lab.registry, lab.membership, lab.settings)
    await stack.enter_async_context(serve_http(sock, found, gateway.BODY_LIMIT_BYTES))
    session = await stack.enter_async_context(aiohttp.ClientSession())
    return f"http://127.0.0.1:{sock.getsockname()[1]}", session


Http = tuple[str, aiohttp.ClientSession]
GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


async def test_open_inference_protocol(http: Http) -> None:
    base, session = http
    for path, wanted in (
        ("/v2", {"name": "potluck"}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/m/ready", {"name": "m", "ready": True}),
        ("/v2/models/m/versions/1/ready", {"ready": True}),
        (
            "/v2/models/m",
            {"name": "m", "versions": ["1"], "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]},
        ),
    ):
        async with session.get(base + path) as response:
            assert response.status == 200, path
            said = await response.json()
        assert {key: said[key] for key in wanted} == wanted
    for path in ("/v2/models/m/infer", "/v2/models/m/versions/1/infer"):
        async with session.post(base + path, json=GOOD | {"id": "7", "outputs": [{"name": "y"}]}) as response:
            assert response.status == 200
            assert await response.json() == {
                "id": "7", "model_name": "m", "model_version": "1",
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 4.0]}],
            }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v2/models/none/infer", json.dumps(GOOD), 404, "none"),
        ("/v2/models/m/versions/9/infer", json.dumps(GOOD), 404, "9"),
        ("/v2/models/m/infer", "{", 400, "not an inference request"),
        ("/v2/models/m/infer", "[]", 400, "not an inference request"),
        ("/v2/models/m/infer", json.dumps({"inputs": []}), 400, "input"),
        ("/v2/models/m/infer", json.dumps({"inputs": [{"name": "x"}]}), 400, "shape"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"shape": [1, 3]}]}), 400, "3 values"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"datatype": "FP31"}]}), 400, "FP31"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"data": ["a", "b"]}]}), 400, "FP32"),
        ("/v2/models/m/infer", json.dumps(GOOD | {"outputs": [{"name": "z"}]}), 400, "outputs are y"),
        ("/v2/models/m/infer", "x" * (gateway.BODY_LIMIT_BYTES + 1), 413, "body"),
    ],
)
async def test_what_is_wrong_has_its_status_and_is_named(
    http: Http, path: str, body: str, status: int, said: str
) -> None:
    base, session = http
    async with session.post(base + path, data=io.BytesIO(body.encode())) as response:
        assert response.status == status
        assert said in (await response.json())["error"]


async def test_overload_says_when_to_come_back(lab: Lab, http: Http) -> None:
    base, session = http
    lab.nodes["a"].mute = True
    asked = [
        asyncio.create_task(lab.serving.infer("m", question(1, 1).inputs, 30))
        for _ in range(lab.settings.queue_limit + 2)
    ]
    await eventually(lambda: len(lab.serving._routers["m:1"].queue) == lab.settings.queue_limit)
    async with session.post(f"{base}/v2/models/m/infer", json=GOOD) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
    await lab.serving.undeploy("m")
    assert all(isinstance(error, Unavailable) for error in await asyncio.gather(*asked, return_exceptions=True))


async def test_metrics_are_prometheus_text(http: Http) -> None:
    base, session = http
    async with session.post(f"{base}/v2/models/m/infer", json=GOOD) as response:
        assert response.status == 200
    async with session.get(f"{base}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = (await response.text()).splitlines()
    assert 'potluck_requests_total{model="m:1",code="ok"} 1' in lines
    assert 'potluck_nodes{state="online"} 1' in lines
    assert 'potluck_request_seconds_count{model="m:1"} 1' in lines
    for line in lines:
        if not line.startswith("#"):
            float(line.rsplit(" ", 1)[1])
