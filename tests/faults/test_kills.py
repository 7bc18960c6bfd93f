"""Whoever kills a process sees the job finish, with the same result: nothing twice, nothing missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from paho.mqtt import publish

from potluck.client import Client
from potluck.errors import PotluckError
from potluck.local_cluster import LocalCluster
from potluck.wire.jobs import JobProgress
from support.digits import mlp, split
from support.eventually import eventually_now
from support.processes import engines, still_running

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster"), cluster="faults", nodes=2, discovery=False) as running:
        yield running


@pytest.fixture
def cluster(shared: LocalCluster, client: Client) -> Iterator[LocalCluster]:
    """With two nodes online; what a test has killed is started again after it."""
    yield shared
    for node in shared.nodes:
        if not node.running:
            node.start()
    eventually_now(lambda: [node.state for node in client.nodes()] == ["online", "online"], 60)


@pytest.fixture(scope="module")
def client(shared: LocalCluster) -> Iterator[Client]:
    with Client(f"{shared.broker_host}:{shared.broker_port}", cluster=shared.cluster) as connected:
        yield connected


def half_way(job: Any) -> JobProgress:
    for progress in job.progress():
        if progress.total and progress.done >= progress.total * 0.3:
            return progress
    raise AssertionError("the job ended before it was half-way")


def training(client: Client, epochs: int = 60) -> Any:
    data = split()
    return client.train(mlp(), (data["x_train"], data["y_train"]), epochs=epochs, batch_size=32, name="mlp")


def test_a_killed_node_does_not_stop_training(cluster: LocalCluster, client: Client) -> None:
    job = training(client)
    half_way(job)
    cluster.nodes[1].kill()
    job.wait(timeout=200)
    assert len(job.history["loss"]) == 60
    assert job.history["accuracy"][-1] > 0.95


def test_a_killed_coordinator_resumes_training_with_no_hole_in_the_history(
    cluster: LocalCluster, client: Client
) -> None:
    job = training(client)
    half_way(job)
    cluster.coordinator.kill()
    cluster.restart_coordinator()
    job.wait(timeout=200)
    assert len(job.history["loss"]) == 60
    assert [kept.round for kept in job.rounds] == list(range(len(job.rounds)))
    assert sum(kept.samples for kept in job.rounds) == job.result().history[-1].samples
    assert job.history["accuracy"][-1] > 0.95


@pytest.mark.parametrize("victim", ["node", "engine", "coordinator"])
def test_predictions_are_complete_whoever_dies(cluster: LocalCluster, client: Client, victim: str) -> None:
    data = split()
    model = mlp()
    client.register(model, "mlp")
    rows = np.tile(data["x_test"], (1500, 1))
    job = client.predict("mlp", rows, batch_size=32)
    half_way(job)
    if victim == "node":
        cluster.nodes[0].kill()
    elif victim == "engine":
        killed = engines(cluster.nodes[0].pid)
        assert killed
        for engine in killed.values():
            engine.kill()
    else:
        cluster.coordinator.kill()
        cluster.restart_coordinator()
    found = job.wait(timeout=200).predictions
    assert found.shape == (len(rows), 10)
    expected = np.tile(model.predict(data["x_test"], verbose=0), (1500, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_replica_that_dies_is_replaced_and_no_request_fails(cluster: LocalCluster, client: Client) -> None:
    client.register(mlp(), "mlp")
    client.deploy("mlp", replicas=2).wait(timeout=100)
    row = split()["x_test"][:1]
    first = client.infer("mlp", row)
    cluster.nodes[0].kill()
    for _ in range(200):
        np.testing.assert_allclose(client.infer("mlp", row), first, rtol=1e-4)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    with LocalCluster(tmp_path, cluster="leftovers", nodes=1, discovery=False) as running:
        with Client(f"{running.broker_host}:{running.broker_port}", cluster="leftovers") as client:
            data = split()
            client.train(mlp(), (data["x_train"], data["y_train"]), epochs=1).wait(timeout=200)
        mine = psutil.Process().children(recursive=True)
        assert len(mine) >= 4  # coordinator, broker, node, engine
    assert [one for one in still_running(mine) if one.pid not in before] == []


def test_an_inference_that_the_coordinator_took_with_it_is_asked_again(cluster: LocalCluster, client: Client) -> None:
    client.register(mlp(), "mlp")
    client.deploy("mlp", replicas=2).wait(timeout=100)
    row = split()["x_test"][:1]
    expected = client.infer("mlp", row)
    found: list[Any] = []
    stop = threading.Event()

    def ask() -> None:
        with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as own:
            while not stop.is_set():
                try:
                    found.append(own.infer("mlp", row, timeout=30))
                except PotluckError as error:
                    found.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        _until(lambda: len(found) > 50)
        cluster.coordinator.kill()
        cluster.restart_coordinator()
        after = len(found)
        _until(lambda: len(found) > after + 50)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    errors = [one for one in found if isinstance(one, PotluckError)]
    assert not errors, errors[:3]
    np.testing.assert_allclose(np.concatenate(found), np.repeat(expected, len(found), axis=0), rtol=1e-4, atol=1e-6)


def test_clients_find_the_coordinator_again_when_its_status_was_cleared(cluster: LocalCluster, client: Client) -> None:
    topic = f"potluck/v1/{cluster.cluster}/coordinator/status"
    for payload in ("garbage", None):
        publish.single(topic, payload, retain=True, hostname=cluster.broker_host, port=cluster.broker_port)

    def found() -> bool:
        try:
            with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as another:
                return len(another.nodes()) == 2
        except PotluckError:
            return False

    _until(found)


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
