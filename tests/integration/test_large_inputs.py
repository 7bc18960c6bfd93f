"""Large inputs with real processes: they go straight to a node with a replica, from there to another node, and nothing is left.

The nodes have fake engines, which answer with their inputs.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from potluck.client import AsyncClient
from potluck.client.connection import Connection
from potluck.errors import InputsLost, Unavailable
from potluck.local_cluster import Daemon, LocalCluster
from potluck.wire import tensors
from potluck.wire.questions import FindReplicas, Infer, Inferred, ModelRegistered, RegisterModel, ReplicasFound
from potluck.wire.values import BlobRef
from support.eventually import eventually
from support.fake_nodes import fake_node

IMAGES = np.random.default_rng(0).random((8, 128, 128, 3), np.float32)


class Cluster:
    """A coordinator and nodes `node-1`, `node-2`; `both` is deployed on both, `one` on one of them."""

    def __init__(self, running: LocalCluster, client: AsyncClient, connection: Connection) -> None:
        self.running = running
        self.client = client
        self.connection = connection

    async def deploy(self, name: str, replicas: int) -> None:
        model = await self.connection.push(f"model {name}".encode())
        await self.connection.ask(RegisterModel(name=name, model=model), ModelRegistered)
        await (await self.client.deploy(name, replicas)).wait(timeout=30)

    async def places(self, model: str) -> dict[str, str]:
        """The address of each node with a replica."""
        found = await self.connection.ask(FindReplicas(model=model), ReplicasFound)
        return {place.node_id: place.http[0] for place in found.replicas}

    def node(self, node_id: str) -> Daemon:
        return next(node for node in self.running.nodes if node.node_id == node_id)

    def inputs(self) -> list[str]:
        """Files of inputs on any node."""
        return [path.name for path in self.running.folder.glob("node-*/inputs/*")]

    def coordinators(self) -> set[int]:
        """The sizes of the blobs that the coordinator has."""
        return {path.stat().st_size for path in self.running.folder.glob("coordinator/blobs/*")}

    async def infer(self, model: str = "both", images: Any = IMAGES) -> None:
        assert np.array_equal(await self.client.infer(model, images), images)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    running = LocalCluster(tmp_path / "cluster", cluster="inputs", nodes=0, discovery=False)
    with running:
        broker = f"{running.broker_host}:{running.broker_port}"
        async with AsyncClient(broker, cluster="inputs", timeout=20) as client:
            for number in (1, 2):
                fake_node(running, f"node-{number}")
            await eventually(lambda: online(client))
            cluster = Cluster(running, client, await client._connected())
            await cluster.deploy("both", 2)
            await cluster.deploy("one", 1)
            yield cluster


async def online(client: AsyncClient) -> bool:
    return sum(node.state == "online" for node in await client.nodes()) == 2


def when_sent(connection: Connection, monkeypatch: pytest.MonkeyPatch, act: Callable[[Infer], object]) -> list[str]:
    """Let `act` be called after inputs are sent and before the question. Lists the holder of each question's inputs."""
    holders: list[str] = []
    ask = connection.infer

    async def infer(model: str, question: Infer, timeout_seconds: float | None = None) -> Inferred:
        ref = question.inputs[0].data
        assert isinstance(ref, BlobRef)
        holders.append(ref.holders[0])
        await asyncio.to_thread(act, question)
        return await ask(model, question, timeout_seconds)

    monkeypatch.setattr(connection, "infer", infer)
    return holders


async def test_they_do_not_pass_the_coordinator_and_none_are_left(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        await cluster.infer("one", IMAGES + number)
    await eventually(lambda: cluster.inputs() == [])
    # A replica may fetch the inputs of one that is known to be slower. Then the other node keeps them for a while.
    places = set((await cluster.places("both")).values())
    holders = when_sent(cluster.connection, monkeypatch, lambda question: None)
    for number in range(6):
        await asyncio.gather(*(cluster.infer(images=IMAGES + number + share) for share in (0, 0.5)))
    assert len(places) == 2
    assert set(holders) <= places
    assert max(cluster.coordinators()) < 100


async def test_a_replica_elsewhere_fetches_them(cluster: Cluster) -> None:
    both, (one,) = await cluster.places("both"), await cluster.places("one")
    (other,) = both.keys() - {one}
    tensor = tensors.from_numpy("x", IMAGES)
    assert isinstance(tensor.data, bytes)
    ref = await cluster.connection.send_inputs(tensor.data, both[other])
    asked = Infer(inputs=(replace(tensor, data=ref),))
    answer = await cluster.connection.infer("one", asked)
    assert isinstance(answer.outputs[0].data, BlobRef)
    sha256 = answer.outputs[0].data.sha256
    assert sha256 == hashlib.sha256(tensor.data).hexdigest()
    assert max(cluster.coordinators()) < 100
    folder = cluster.running.folder
    await eventually(lambda: not list((folder / one / "inputs").iterdir()))
    assert {path.name for path in (folder / other / "inputs").iterdir()} == {ref.sha256, sha256}  # to be swept


async def test_a_node_that_dies_before_it_is_asked(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {url: node_id for node_id, url in (await cluster.places("both")).items()}

    def kill(question: Infer) -> None:
        ref = question.inputs[0].data
        assert isinstance(ref, BlobRef)
        if len(holders) == 1:
            cluster.node(names[ref.holders[0]]).kill()

    holders = when_sent(cluster.connection, monkeypatch, kill)
    await cluster.infer()
    assert len(holders) == 2
    assert holders[0] != holders[1]
    for _ in range(3):
        await cluster.infer()
    assert set(holders[1:]) == {holders[1]}


async def test_clients_that_reach_or_know_no_node_send_them_to_the_coordinator(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(data: bytes, base: str) -> BlobRef:
        raise Unavailable(f"no connection to {base}")

    monkeypatch.setattr(cluster.connection, "send_inputs", unreachable)
    await cluster.infer()
    assert max(cluster.coordinators()) == IMAGES.nbytes
    ref = await cluster.connection.push(IMAGES.tobytes())  # as clients did before
    inputs = (replace(tensors.from_numpy("x", IMAGES), data=ref),)
    assert (await cluster.connection.infer("both", Infer(inputs=inputs))).outputs[0].shape == IMAGES.shape
    await eventually(lambda: cluster.inputs() == [])


async def test_inputs_that_nobody_has_are_reported_as_lost(cluster: Cluster) -> None:
    (holder, *_) = (await cluster.places("both")).values()
    ref = BlobRef(sha256="0" * 64, size=IMAGES.nbytes, holders=(holder,))
    with pytest.raises(InputsLost):
        await cluster.connection.infer(
            "both", Infer(inputs=(replace(tensors.from_numpy("x", IMAGES), data=ref),)), timeout_seconds=20
        )


async def test_a_node_without_a_replica_takes_none(cluster: Cluster) -> None:
    place = (await cluster.places("one")).popitem()[1]
    for name in ("one", "both"):
        await cluster.client.undeploy(name)

    async def refused() -> bool:
        try:
            await cluster.connection.send_inputs(b"soup", place)
        except Unavailable as error:
            return "has no replica" in error.message
        return False

    await eventually(refused)
