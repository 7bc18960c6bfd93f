"""Large inputs of a client: which node they go to, and what happens if that node is lost. The tests tell the coordinator's answers."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from node.inputs import Inputs
from potluck.blobs import server
from potluck.blobs.rights import OPEN
from potluck.client import AsyncClient
from potluck.client import inputs as inputs_module
from potluck.client.inputs import Choice
from potluck.credentials import Credentials
from potluck.errors import BadMessage, InputsLost, PotluckError, TimedOut, Unavailable
from potluck.net.http import serve_http
from potluck.wire.questions import FindReplicas, Infer, Inferred, ReplicaPlace, ReplicasFound
from potluck.wire.tensors import from_numpy
from potluck.wire.values import BlobRef, Message
from support.fake_bus import FakeBroker, FakeBus
from support.scripted_coordinator import ScriptedCoordinator

LARGE = np.random.default_rng(0).random((300, 300), dtype=np.float32)


class Cluster:
    """A coordinator, and the HTTP servers of nodes, each a place."""

    def __init__(self, coordinator: ScriptedCoordinator, folder: Path, stack: AsyncExitStack) -> None:
        self.coordinator = coordinator
        self.places: list[ReplicaPlace] = []
        self.inputs: dict[str, Inputs] = {}
        self.holders: list[str] = []
        """The holder of the inputs, as each question names it."""
        self.lost: list[PotluckError] = []
        """Errors to send in place of the next answers."""
        self._folder = folder
        self._stack = stack
        self._stacks: dict[str, AsyncExitStack] = {}
        coordinator.answers[FindReplicas] = lambda asked: ReplicasFound(replicas=tuple(self.places))
        coordinator.answers[Infer] = self._infer

    async def node(self, node_id: str) -> ReplicaPlace:
        stack = self._stacks[node_id] = await self._stack.enter_async_context(AsyncExitStack())
        inputs = self.inputs[node_id] = await stack.enter_async_context(Inputs(self._folder / node_id, Credentials()))
        sock = socket.create_server(("127.0.0.1", 0))
        routes = [
            *server.routes(inputs.store, writable=False, max_bytes=0, rights=OPEN),
            *inputs.routes(lambda: None, OPEN),
        ]
        await stack.enter_async_context(serve_http(sock, routes, Credentials()))
        place = ReplicaPlace(node_id=node_id, http=(f"http://127.0.0.1:{sock.getsockname()[1]}",))
        self.places.append(place)
        return place

    async def kill(self, node_id: str) -> None:
        await self._stacks[node_id].aclose()

    def asked(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.coordinator.asked)

    def _infer(self, asked: Infer) -> Message:
        (tensor,) = asked.inputs
        assert isinstance(tensor.data, BlobRef)
        (holder,) = tensor.data.holders
        names = {place.http[0]: place.node_id for place in self.places} | {self.coordinator.urls[0]: "coordinator"}
        self.holders.append(names[holder])
        if self.lost:
            raise self.lost.pop(0)
        name = self.holders[-1]
        store = self.coordinator.store if name == "coordinator" else self.inputs[name].store
        found = np.frombuffer(store.read(tensor.data.sha256), np.float32)
        return Inferred(model="m:1", outputs=(from_numpy("y", found[:3]),))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        broker = FakeBroker()
        bus = FakeBus(broker, client_id="coordinator")
        coordinator = await stack.enter_async_context(ScriptedCoordinator(bus, tmp_path / "store"))
        found = Cluster(coordinator, tmp_path, stack)
        found.broker = broker  # type: ignore[attr-defined]
        yield found


@pytest.fixture
async def client(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    async with AsyncClient(timeout=5, bus=FakeBus(cluster.broker, client_id="client")) as connected:  # type: ignore[attr-defined]
        yield connected


Ask = Callable[[], Awaitable[None]]


@pytest.fixture
def ask(client: AsyncClient) -> Ask:
    async def one() -> None:
        assert np.array_equal(await client.infer("m", LARGE), LARGE[0, :3])

    return one


async def test_they_go_to_a_node_and_the_coordinator_never_has_them(cluster: Cluster, ask: Ask) -> None:
    await cluster.node("a")
    for _ in range(3):
        await ask()
    assert cluster.holders == ["a", "a", "a"]
    assert cluster.coordinator.store.size_bytes == 0
    assert cluster.asked(FindReplicas) == 1


async def test_requests_that_are_under_way_together_are_spread(cluster: Cluster, ask: Ask) -> None:
    for node_id in ("a", "b", "c"):
        await cluster.node(node_id)
    await asyncio.gather(*(ask() for _ in range(6)))
    assert sorted(cluster.holders) == ["a", "a", "b", "b", "c", "c"]


async def test_where_replicas_are_is_asked_again_after_a_while(
    cluster: Cluster, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "KNOWN_SECONDS", 0.0)
    await ask()
    await cluster.node("a")
    await ask()
    assert cluster.holders == ["coordinator", "a"]


async def test_without_a_node_that_can_be_reached_the_coordinator_takes_them(cluster: Cluster, ask: Ask) -> None:
    for node_id in ("a", "b", "c"):
        await cluster.node(node_id)
        await cluster.kill(node_id)
    await ask()
    await ask()
    assert cluster.holders == ["coordinator"] * 2
    assert cluster.coordinator.store.size_bytes == LARGE.nbytes


@pytest.mark.parametrize("says", [BadMessage("unknown type FindReplicas"), None])
async def test_a_coordinator_too_old_to_list_replicas_takes_them(
    cluster: Cluster, ask: Ask, monkeypatch: pytest.MonkeyPatch, says: PotluckError | None
) -> None:
    monkeypatch.setattr(inputs_module, "FIND_SECONDS", 0.2)

    def answer(asked: FindReplicas) -> None:
        if says is not None:
            raise says

    cluster.coordinator.answers[FindReplicas] = answer
    await ask()
    assert cluster.holders == ["coordinator"]


async def test_what_a_node_lost_is_sent_again_elsewhere(cluster: Cluster, ask: Ask) -> None:
    await cluster.node("a")
    await cluster.node("b")
    cluster.lost = [InputsLost("the node is gone")]
    await ask()
    assert len(cluster.holders) == len(set(cluster.holders)) == 2
    cluster.lost = [InputsLost("the node is gone")]
    await ask()
    assert cluster.holders[2:] == [cluster.holders[1], "coordinator"]  # the first is left alone for now


async def test_other_failures_are_not_tried_again(cluster: Cluster, client: AsyncClient) -> None:
    await cluster.node("a")
    for error in (Unavailable("no replica answered in 4 attempts"), TimedOut("no answer in time")):
        cluster.lost = [error]
        with pytest.raises(type(error), match=error.message):
            await client.infer("m", LARGE)
    assert cluster.holders == ["a", "a"]


async def test_a_node_that_is_frozen_is_given_up(
    cluster: Cluster, client: AsyncClient, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:  # it listens, and nobody accepts
        http = f"http://127.0.0.1:{sock.getsockname()[1]}"
        cluster.places = [ReplicaPlace(node_id="frozen", http=(http,))]
        with pytest.raises(TimedOut, match="could not be sent"):
            await client.infer("m", LARGE, timeout=0.2)
        assert cluster.holders == []
        monkeypatch.setattr("potluck.blobs.download._INPUTS_SECONDS", 0.2)
        await ask()
    assert cluster.holders == ["coordinator"]


async def test_the_time_to_send_counts(cluster: Cluster, client: AsyncClient) -> None:
    await cluster.node("a")
    await client.infer("m", LARGE, timeout=4)
    (asked,) = [message for message in cluster.coordinator.asked if isinstance(message, Infer)]
    assert asked.expires > 0


def test_the_choice_goes_by_requests_under_way_and_avoids_nodes_that_failed() -> None:
    places = [ReplicaPlace(node_id=node_id, http=(f"http://{node_id}",)) for node_id in "abcd"]
    choice = Choice(rng=random.Random(0))
    choice.under_way.update({"a": 2, "b": 1, "d": 3})
    assert [place.node_id for place in choice.order(places, 0.0)] == ["c", "b"]
    choice.failed("c", 0.0)
    assert [place.node_id for place in choice.order(places, 1.0)] == ["b", "a"]
    assert [place.node_id for place in choice.order(places, inputs_module.LEFT_ALONE_SECONDS + 1.0)] == ["c", "b"]
    assert choice.order([], 0.0) == []
    idle = Choice(rng=random.Random(0))
    assert {idle.order(places, 0.0)[0].node_id for _ in range(50)} == set("abcd")
