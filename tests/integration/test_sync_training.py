"""Synchronous training on real nodes: the same numbers as in one process, also when members are lost on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from potluck.client import Client
from potluck.data.order import passes, shuffled
from potluck.errors import PotluckError
from potluck.local_cluster import LocalCluster
from support.digits import split
from support.eventually import eventually_now
from support.plain import plainly, relative
from support.processes import engines

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(400)]
INSECURE = {"POTLUCK_LISTEN__INSECURE": "true"}  # TensorFlow's server listens beyond loopback


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(folder, cluster="sync", nodes=2, discovery=False, environment=INSECURE) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        yield connected


def network(optimizer: Any) -> Any:
    import keras

    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def reach(job: Any, rounds: int) -> None:
    for progress in job.progress():
        if progress.round >= rounds:
            return
    raise AssertionError(f"the job ended before round {rounds}")


@pytest.mark.parametrize("kind", ["sgd", "void"])
def test_two_nodes_give_the_weights_of_one_process(client: Client, kind: str) -> None:
    import keras

    def made() -> Any:
        model = network(keras.optimizers.SGD(0.1))
        if kind == "void":
            model.compile(model.optimizer, keras.losses.SparseCategoricalCrossentropy(ignore_class=-1))
        return model

    data = split()
    x, y = data["x_train"].reshape(-1, 64)[:640], data["y_train"][:640]
    if kind == "void":  # the number of these differs in each member's part of a batch
        y = np.where(np.random.default_rng(0).random(640) < 0.3, -1, y)
    job = client.train(made(), (x, y), validation=(x, y), epochs=3, strategy="sync").wait(timeout=200)
    ended = job.result()
    assert [epoch.samples for epoch in ended.history] == [640, 1280, 1920]
    model = plainly(made(), x, y, epochs=3, batch=32)
    assert relative(job.model(), model) < 1e-6
    loss = model.evaluate(x, y, batch_size=len(x), return_dict=True, verbose=0)["loss"]  # over all values with a class
    assert job.history["val_loss"][-1] == pytest.approx(loss, rel=1e-4)


def test_two_outputs_and_weights_of_items_give_the_weights_of_one_process(client: Client) -> None:
    import keras

    def make() -> Any:
        keras.utils.set_random_seed(3)
        given = keras.Input((64,))
        digit = keras.layers.Dense(10, activation="softmax", name="digit")(given)
        model = keras.Model(given, [digit, keras.layers.Dense(1, name="ink")(given)])
        model.compile(
            keras.optimizers.SGD(0.1, global_clipnorm=1.0), ["sparse_categorical_crossentropy", "mse"],
            loss_weights=[1.0, 0.1], metrics=[["accuracy"], ["mae"]],
        )  # fmt: skip
        return model

    data = split()
    x, digit = data["x_train"].reshape(-1, 64)[:640], data["y_train"][:640]
    ink, weights = x.mean(axis=1), np.random.default_rng(0).uniform(0, 2, len(x)).astype(np.float32)
    job = client.train(make(), (x, {"digit": digit, "ink": ink}, weights), epochs=2, strategy="sync").wait(timeout=200)
    model, order = make(), shuffled(digit, len(digit), 0)
    for step in range(2 * 20):
        index = order[np.fromiter(passes(len(x), 0, skip=step * 32), np.int64, 32)]
        model.train_on_batch(x[index], [digit[index], ink[index][:, None]], sample_weight=weights[index])
    assert relative(job.model(), model) < 1e-5
    assert set(job.history) == {"loss", "digit_loss", "ink_loss", "digit_accuracy", "ink_mae"}


def test_a_step_over_two_members_is_that_of_fit_where_gradients_are_sparse(client: Client) -> None:
    """Optimizers square each gradient of a repeated token by itself, not their sum. Frozen weights keep their bits."""
    import keras

    def made(optimizer: Any) -> Any:
        keras.utils.set_random_seed(3)
        wide = keras.layers.Dense(1024, activation="tanh", trainable=False)
        narrow = keras.layers.Dense(8, activation="tanh", trainable=False)
        model = keras.Sequential(
            [
                keras.Input((12,), dtype="int32"),
                keras.layers.Embedding(20, 8),
                wide,
                narrow,
                keras.layers.BatchNormalization(trainable=False),
                keras.layers.GRU(8),
                keras.layers.Dense(20, activation="softmax"),
            ]
        )
        model.compile(optimizer, "sparse_categorical_crossentropy")
        return model

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, (256, 12)).astype(np.int32), rng.integers(0, 20, 256)
    for optimizer in (
        keras.optimizers.Adam(0.01),
        keras.optimizers.RMSprop(0.01, clipnorm=0.1),
        keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
    ):
        config = optimizer.get_config()
        job = client.train(made(optimizer), (x, y), epochs=2, batch_size=256, strategy="sync").wait(timeout=200)
        assert job.result().history[0].exchanged_bytes > 0, "two members"
        found, model = job.model(), made(type(optimizer).from_config(config))
        model.fit(x, y, epochs=2, batch_size=256, verbose=0)
        assert relative(found, model) < 1e-5, optimizer.name
        frozen = [weight.path for weight in model.non_trainable_weights]
        assert len(frozen) == 8
        for ours, theirs in zip(found.weights, model.weights, strict=True):
            if theirs.path in frozen:
                assert ours.numpy().tobytes() == theirs.numpy().tobytes(), theirs.path


def test_after_the_job_nothing_listens_beyond_loopback(cluster: LocalCluster, client: Client) -> None:
    data = split()
    x, y = data["x_train"].reshape(-1, 64)[:640], data["y_train"][:640]
    job = client.train(network("sgd"), (x, y), epochs=30, strategy="sync", round_seconds=0.2)
    reach(job, 2)
    assert len(open_ports(cluster)) == 2
    job.wait(timeout=200)
    eventually_now(lambda: not open_ports(cluster), 15)


def open_ports(cluster: LocalCluster) -> list[str]:
    """The addresses where the nodes' engines listen, without loopback."""
    found = [engine for node in cluster.nodes for engine in engines(node.pid).values()]
    sockets = [socket for engine in found for socket in engine.net_connections() if socket.status == "LISTEN"]
    return [f"{socket.laddr.ip}:{socket.laddr.port}" for socket in sockets if socket.laddr.ip != "127.0.0.1"]


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_the_rest_goes_on_when_a_member_is_lost(cluster: LocalCluster, client: Client, how: str) -> None:
    import keras

    data = split()
    x, y = data["x_train"].reshape(-1, 64)[:640], data["y_train"][:640]
    eventually_now(lambda: [node.state for node in client.nodes()] == ["online", "online"], 60)
    job = client.train(network(keras.optimizers.SGD(0.1)), (x, y), epochs=40, strategy="sync", round_seconds=0.2)
    reach(job, 3)
    if how == "kill":
        cluster.nodes[1].kill()
    else:
        frozen = psutil.Process(cluster.nodes[1].pid)
        for process in [frozen, *frozen.children(recursive=True)]:
            os.kill(process.pid, signal.SIGSTOP)
    rounds = job.status().progress.round
    lost_at = time.monotonic()
    try:
        reach(job, rounds + 2)
        assert time.monotonic() - lost_at < 45
        job.wait(timeout=200)
    finally:
        if how == "freeze":
            for process in [frozen, *frozen.children(recursive=True)]:
                os.kill(process.pid, signal.SIGCONT)
        else:
            cluster.nodes[1].start()
    ended = job.result()
    assert [epoch.epoch for epoch in ended.history] == list(range(1, 41))
    model = plainly(network(keras.optimizers.SGD(0.1)), x, y, epochs=40, batch=32)
    assert relative(job.model(), model) < 1e-4


def test_weights_that_are_not_finite_end_the_job_even_if_the_loss_is(client: Client) -> None:
    import keras

    data = split()
    x, y = data["x_train"].reshape(-1, 64)[:640].copy(), data["y_train"][:640]
    x[::50, 3] = np.nan
    inputs = keras.Input((64,))
    # On some processors, ReLU turns NaN into 0 and so hides it from the loss. Here the model hides it on all processors.
    hidden = keras.layers.ReLU()(keras.ops.nan_to_num(keras.layers.Dense(32)(inputs)))
    hiding = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(hidden))
    hiding.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(
        PotluckError, match=r"diverged: weight '.*kernel' is not finite any more; .*look for values in the data"
    ):
        client.train(hiding, (x, y), epochs=2, strategy="sync").wait(timeout=200)


def test_a_loss_that_is_not_a_mean_is_refused(client: Client) -> None:
    import keras

    model = network("sgd")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(reduction="sum"))
    data = split()
    with pytest.raises(PotluckError, match="reduction='sum'"):
        client.train(model, (data["x_train"].reshape(-1, 64), data["y_train"]), strategy="sync").wait(timeout=100)
