"""A day of a served model in half a minute: mixed clients ask without a pause while engines and nodes die and versions change.

Each version answers the sum of its inputs times its number, so that every answer tells who gave it and whether it is true.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from potluck.client import AsyncClient
from potluck.local_cluster import LocalCluster
from support.eventually import eventually
from support.processes import engines

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]

WIDTH = 8


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path, cluster="day", nodes=3, discovery=False) as running:
        yield running


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The files of versions 1 to 5, and of the pair as 0: importing TensorFlow stops a loop, and connections would be lost."""
    folder = tmp_path_factory.mktemp("models")
    made = {number: adder(number) for number in range(1, 6)} | {0: pair()}
    for number, model in made.items():
        model.save(folder / f"{number}.keras")
    return {number: folder / f"{number}.keras" for number in made}


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        yield connected


def adder(number: int) -> Any:
    """A model of one layer: `number` times the sum of its inputs."""
    import keras

    model = keras.Sequential([keras.Input((WIDTH,), name="x"), keras.layers.Dense(1, use_bias=False)], name="adder")
    model.set_weights([np.full((WIDTH, 1), number, np.float32)])
    return model


def pair() -> Any:
    """A model of two inputs and two outputs: their sum, and their difference."""
    import keras

    left, right = keras.Input((WIDTH,), name="left"), keras.Input((WIDTH,), name="right")
    layers = keras.layers
    outputs = {"sum": layers.Add(name="sum")([left, right]), "rest": layers.Subtract(name="rest")([left, right])}
    return keras.Model([left, right], outputs, name="pair")


class Day:
    """Clients that ask without a pause until `over` is set; what they were answered, and what went wrong."""

    def __init__(self, client: AsyncClient, url: str) -> None:
        self.over = asyncio.Event()
        self.versions: Counter[int] = Counter()
        """Answers by the version that gave them."""
        self.answered: Counter[str] = Counter()
        self.problems: list[str] = []
        self._client = client
        self._url = url
        self._rng = np.random.default_rng(0)

    async def keep_asking(self, way: Callable[[], Awaitable[None]]) -> None:
        name = way.__name__
        while not self.over.is_set():
            try:
                await way()
                self.answered[name] += 1
            except Exception as error:  # noqa: BLE001 - whatever a client meets is what this test is about
                self.problems.append(f"{name}: {error!r:.300}")
                await asyncio.sleep(0)

    async def by_mqtt(self) -> None:
        x = self._rows()
        self._check(x, np.asarray(await self._client.infer("adder", x)))

    async def two_inputs(self) -> None:
        left, right = self._rows(), self._rows()
        right = np.resize(right, left.shape)
        found = await self._client.infer("pair", {"left": left, "right": right})
        np.testing.assert_allclose(found["sum"], left + right, rtol=1e-5)
        np.testing.assert_allclose(found["rest"], left - right, rtol=1e-5)

    async def by_open_inference(self) -> None:
        x = self._rows()
        tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
        answer = await self._post("/v2/models/adder/infer", {"inputs": [tensor]})
        self._check(x, np.array(answer["outputs"][0]["data"]).reshape(-1, 1))

    async def _post(self, path: str, body: Any) -> Any:
        async with aiohttp.ClientSession() as session, session.post(self._url + path, json=body) as response:
            text = await response.text()
            assert response.status == 200, f"{response.status} {text}"
            return json.loads(text)

    def _rows(self) -> np.ndarray[Any, Any]:
        return self._rng.uniform(1, 2, (int(self._rng.integers(1, 5)), WIDTH)).astype(np.float32)

    def _check(self, x: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> None:
        """One version answered all rows, and rightly."""
        ratios = found / x.sum(axis=1, keepdims=True)
        number = round(float(ratios[0, 0]))
        np.testing.assert_allclose(ratios, number, rtol=1e-4)
        self.versions[number] += 1


async def test_a_day_of_requests_while_nodes_die_and_versions_change(
    models: dict[int, Path], cluster: LocalCluster, client: AsyncClient
) -> None:
    await client.deploy(models[1], replicas=2, name="adder", wait=True)
    await client.deploy(models[0], replicas=2, name="pair", wait=True)
    day = Day(client, cluster.http_url)
    ways = (day.by_mqtt, day.by_mqtt, day.by_mqtt, day.two_inputs, day.by_open_inference, day.by_open_inference)
    async with asyncio.TaskGroup() as tasks:
        for way in ways:
            tasks.create_task(day.keep_asking(way), name=way.__name__)
        try:
            for number, victim in zip(range(2, 6), itertools.cycle(cluster.nodes)):
                kill_engine(victim.pid)
                await client.deploy(models[number], replicas=2, name="adder", wait=True)
                await until_answered_by(day, number)
                victim.kill()
                await until_answered_by(day, number)
                victim.start()
        finally:
            day.over.set()
    assert not day.problems, f"{len(day.problems)} of {day.answered.total()} failed, first: {day.problems[:3]}"
    assert set(day.versions) == {1, 2, 3, 4, 5}
    assert min(day.answered[way.__name__] for way in ways) > 20
    (stable,) = [one for one in await client.deployments() if one.name == "adder:5"]
    assert sum(replica.state == "ready" for replica in stable.replicas) >= 1


async def until_answered_by(day: Day, number: int, answers: int = 50) -> None:
    """Wait until a version has given so many more answers."""
    goal = day.versions[number] + answers
    await eventually(lambda: day.versions[number] >= goal, 60)


def kill_engine(node_pid: int) -> None:
    """SIGKILL of the process that holds a node's replicas, if it has one."""
    for engine in engines(node_pid).values():
        engine.kill()
