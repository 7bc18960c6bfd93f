"""Deployments on real nodes with TensorFlow, asked without a pause: versions change, a node is killed, and no request fails."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from potluck.client import Client
from potluck.errors import PotluckError
from potluck.local_cluster import LocalCluster
from potluck.wire.questions import DeploymentInfo
from support.digits import mlp, split

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]

ASKERS = 4
ROW = split()["x_test"][:1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("rollout"), cluster="rollout", nodes=2, discovery=False) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with connected(cluster) as made:
        yield made


@pytest.fixture(scope="module")
def versions(client: Client) -> list[Any]:
    """What versions 1 and 2 of `mlp` answer to ROW; the first one is deployed."""
    made = [mlp(width=width) for width in (128, 64)]
    for model in made:
        client.register(model, "mlp")
    client.deploy("mlp:1").wait(timeout=120)
    return [model.predict(ROW, verbose=0) for model in made]


def connected(cluster: LocalCluster) -> Client:
    return Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster)


def found(client: Client) -> dict[str, DeploymentInfo]:
    return {info.name: info for info in client.deployments()}


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Load:
    """Clients that ask `mlp` without a pause, each on a connection of its own: `answers` are outputs, or errors."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(ASKERS)]
        self.answers: list[Any] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.answers) > 50)
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        with connected(self._cluster) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(client.infer("mlp", ROW, timeout=60))
                except PotluckError as error:
                    self.answers.append(error)

    def check(self, expected: list[Any]) -> list[int]:
        """How many answers were those of each version; every answer was of one of them."""
        errors = [answer for answer in self.answers if isinstance(answer, PotluckError)]
        assert not errors, errors[:3]
        near = [[np.allclose(answer, one, rtol=1e-4, atol=1e-6) for one in expected] for answer in self.answers]
        assert all(sum(one) == 1 for one in near)
        return [sum(one[index] for one in near) for index in range(len(expected))]


def potluck(cluster: LocalCluster, *arguments: str) -> Any:
    command = [sys.executable, "-m", "potluck.cli.main", *arguments, "--json"]
    command += ["--seed", f"{cluster.broker_host}:{cluster.broker_port}", "--cluster", cluster.cluster]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_canary_and_a_swap_under_load_fail_no_request(
    cluster: LocalCluster, client: Client, versions: list[Any]
) -> None:
    with Load(cluster) as load:
        canary = potluck(cluster, "deploy", "mlp:2", "--canary", "25", "--watch", "0.5", "--rollback-factor", "20")
        assert (canary["role"], canary["weight"], canary["state"]) == ("canary", 25, "ready")
        assert canary["resident_bytes"] > 0, "measured"
        begin = len(load.answers)
        until(lambda: len(load.answers) > begin + 300)
        first, second = load.check(versions)
        assert first > second > 30
        potluck(cluster, "promote", "mlp")
        until(lambda: set(found(client)) == {"mlp:2"})
        begin = len(load.answers)
        until(lambda: len(load.answers) > begin + 50)
    load.check(versions)
    load.answers = load.answers[begin + ASKERS :]
    assert load.check(versions)[0] == 0


def test_a_killed_replica_is_replaced_and_no_request_fails(
    cluster: LocalCluster, client: Client, versions: list[Any]
) -> None:
    (replica,) = found(client)["mlp:2"].replicas
    with Load(cluster) as load:
        next(node for node in cluster.nodes if node.name == replica.node_id).kill()
        until(lambda: [one.state for one in found(client)["mlp:2"].replicas if one != replica] == ["ready"])
        begin = len(load.answers)
        until(lambda: len(load.answers) > begin + 50)
    assert load.check(versions)[0] == 0
