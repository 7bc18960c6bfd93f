"""`deterministic=True` on a real cluster: the same nodes give the same bits again, also when one, or the coordinator, is killed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from potluck.client import Client
from potluck.client.sync import Job
from potluck.errors import InvalidRequest
from potluck.local_cluster import LocalCluster
from support.digits import split
from support.eventually import eventually_now

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster"), cluster="fixed", nodes=2, discovery=False) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        yield connected


def network() -> Any:
    """A model with all that may differ from run to run: random layers, an optimizer with state, moving statistics."""
    import keras

    keras.utils.clear_session()  # otherwise layers get higher numbers in their names, which are in the file
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.GaussianNoise(0.1),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def begin(client: Client, **options: Any) -> Job:
    data = split()
    return client.train(
        network(), (data["x_train"], data["y_train"]), epochs=6, batch_size=16, deterministic=True, **options
    )


def checkpoint(job: Job) -> str:
    """The hash of the last weights, of all their bits."""
    found = job.result().checkpoint
    assert found is not None
    return found.sha256


def in_round(job: Job, number: int) -> None:
    for progress in job.progress():
        if progress.round >= number:
            return
    raise AssertionError(f"the job ended before round {number}")


def test_the_same_nodes_give_the_same_bits_again_and_learn(client: Client) -> None:
    once, again = begin(client).wait(timeout=120), begin(client).wait(timeout=120)
    assert checkpoint(again) == checkpoint(once)
    assert again.history == once.history
    assert again.result().model.sha256 == once.result().model.sha256, "the file, too"
    assert checkpoint(begin(client, seed=1).wait(timeout=120)) != checkpoint(once)
    data = split()
    assert (once.model().predict(data["x_test"], verbose=0).argmax(axis=1) == data["y_test"]).mean() > 0.9
    with pytest.raises(InvalidRequest, match="rounds over data that any node may use"):
        begin(client, strategy="sync")


def test_neither_a_killed_node_nor_a_killed_coordinator_changes_a_bit(client: Client, cluster: LocalCluster) -> None:
    undisturbed = begin(client).wait(timeout=120)
    with_node_killed = begin(client)
    in_round(with_node_killed, 2)
    cluster.nodes[1].kill()
    in_round(with_node_killed, 4)
    cluster.nodes[1].start()
    with_node_killed.wait(timeout=150)
    assert checkpoint(with_node_killed) == checkpoint(undisturbed)
    assert with_node_killed.history["loss"] == undisturbed.history["loss"]

    eventually_now(lambda: sum(node.state == "online" for node in client.nodes()) == 2, 60)
    with_coordinator_killed = begin(client)
    in_round(with_coordinator_killed, 3)
    cluster.coordinator.kill()
    cluster.restart_coordinator()
    with_coordinator_killed.wait(timeout=150)
    assert checkpoint(with_coordinator_killed) == checkpoint(undisturbed)
