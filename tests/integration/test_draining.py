"""A stop that drains, with real processes: what was asked is answered, everybody hears a goodbye, and no will is sent.

The node has a fake engine, which takes a second for a `slow` request and answers with its inputs.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from potluck.bus.mqtt import Envelope, MqttBus
from potluck.client import AsyncClient
from potluck.credentials import Credentials
from potluck.local_cluster import LocalCluster
from potluck.net.discovery import Discovery
from potluck.wire.births import CoordinatorStatus, NodeStatus
from potluck.wire.questions import Infer, ModelRegistered, RegisterModel
from potluck.wire.topics import Topics
from potluck.wire.values import Message, Tensor
from support.brokers import TestBroker, some_kind
from support.eventually import eventually
from support.fake_nodes import fake_node

SLOW = Tensor(name="slow", datatype="UINT8", shape=(1, 1), data=b"\7")
OVER_HTTP = {"inputs": [{"name": "slow", "datatype": "UINT8", "shape": [1, 1], "data": [7]}]}


class Watcher:
    """Everything that is told about who is there, in order."""

    def __init__(self, broker: TestBroker, topics: Topics) -> None:
        self.bus = MqttBus(broker.address, topics, Credentials(), client_id=f"watcher-{uuid.uuid4().hex[:6]}")
        self.topics = topics
        self.said: list[Message] = []
        for topic in (topics.coordinator_status, topics.node("+", "status")):
            self.bus.subscribe(topic, self._on_status)

    def _on_status(self, envelope: Envelope) -> None:
        self.said.append(envelope.message)

    async def all(self) -> list[Message]:
        """What was said until now: the broker keeps the order."""
        last = NodeStatus(node_id="nobody", session=uuid.uuid4().hex, state="offline")
        await self.bus.publish(self.topics.node("nobody", "status"), last)
        await eventually(lambda: last in self.said)
        return [one for one in self.said if not (isinstance(one, NodeStatus) and one.node_id == "nobody")]


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[TestBroker]:
    broker = TestBroker(some_kind(), tmp_path)
    await broker.start()
    yield broker
    await broker.stop()


async def test_a_stop_answers_what_was_asked_and_says_goodbye(tmp_path: Path, broker: TestBroker) -> None:
    cluster = f"draining-{uuid.uuid4().hex[:6]}"
    watcher = Watcher(broker, Topics(cluster))
    watching = asyncio.create_task(watcher.bus.run(), name="watcher")
    running = LocalCluster(
        tmp_path / "cluster", cluster=cluster, nodes=0, broker="external", broker_port=broker.port
    )  # fmt: skip
    seed = f"127.0.0.1:{broker.port}"
    async with Discovery(cluster) as discovery, aiohttp.ClientSession() as http:
        with running:
            node = fake_node(running, "n1")
            async with AsyncClient(seed, cluster=cluster, timeout=30) as client:
                await eventually(lambda: online(client), 20)
                connection = await client._connected()
                model = await connection.push(b"slow")
                await connection.ask(RegisterModel(name="m", model=model), ModelRegistered)
                await (await client.deploy("m", 1)).wait(timeout=30)
                assert await discovery.wait_for(lambda one: one.role == "coordinator", 10)

                async def over_http() -> int:
                    async with http.post(f"{running.http_url}/v2/models/m/infer", json=OVER_HTTP) as answer:
                        return answer.status

                # The coordinator stops: two requests are at the node, and the third waits in the queue.
                asked = [asyncio.create_task(over_http()) for _ in range(2)]
                over_bus = asyncio.create_task(connection.infer("m", Infer(inputs=(SLOW,))))
                await eventually(lambda: one_waits(client))
                running.coordinator.terminate()
                await eventually(lambda: offline(watcher))
                assert await over_http() == 503, "it takes no more"
                async with http.get(f"{running.http_url}/v2/health/ready") as answer:
                    assert (answer.status, "stopping" in await answer.text()) == (503, True)
                assert [await one for one in asked] == [200, 200]
                assert (await over_bus).outputs == (SLOW,)
                assert await asyncio.to_thread(running.coordinator.wait, 10) == 0
                told = [one for one in await watcher.all() if isinstance(one, CoordinatorStatus)]
                assert [one.since > 0 for one in told if one.state == "offline"] == [True], "a goodbye, and no will"
                await eventually(lambda: not discovery.services("coordinator"))

                # The node stops, which has the same. The third request is answered by another node.
                await asyncio.to_thread(running.restart_coordinator)
                fake_node(running, "n2")
                await eventually(lambda: ready(http, running.http_url), 20)
                asked = [asyncio.create_task(over_http()) for _ in range(3)]
                await eventually(lambda: one_waits(client))
                node.terminate()
                assert [await one for one in asked] == [200, 200, 200]
                assert await asyncio.to_thread(node.wait, 10) == 0
                left = [
                    one.left for one in await watcher.all() if isinstance(one, NodeStatus) and one.state == "offline"
                ]
                assert left == [True], "a goodbye, and no will"
    watching.cancel()
    await asyncio.wait([watching])


async def online(client: AsyncClient) -> bool:
    return any(node.state == "online" for node in await client.nodes())


def offline(watcher: Watcher) -> bool:
    last = [one for one in watcher.said if isinstance(one, CoordinatorStatus)][-1]
    return last.state == "offline"


async def one_waits(client: AsyncClient) -> bool:
    return [deployment.queued for deployment in await client.deployments()] == [1]


async def ready(http: aiohttp.ClientSession, url: str) -> bool:
    async with http.get(f"{url}/v2/models/m/ready") as answer:
        return answer.status == 200
