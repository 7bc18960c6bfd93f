"""Data that live on the nodes (`node:name`): real nodes train on their own files, and only updates leave them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.client import Client
from potluck.errors import InvalidModel, InvalidRequest, NotFound
from potluck.local_cluster import LocalCluster
from support.digits import mlp, split
from support.eventually import eventually_now

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IN_ORDER = sorted(WORDS)
"""The order in which the cluster counts classes."""

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


def write_skewed(folder: Path) -> list[Path]:
    """The digits in two CSV files: the first has only 0 to 5, the second 4 to 9. They are words, so that both count classes alike."""
    data = split()
    x, y = data["x_train"], data["y_train"]
    halves = (y < 4) | ((y < 6) & (np.arange(len(y)) % 2 == 0))
    files = []
    for number, chosen in enumerate((halves, ~halves), 1):
        path = folder / f"private-{number}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*(f"p{i}" for i in range(x.shape[1])), "digit"])
            writer.writerows([*row.tolist(), WORDS[label]] for row, label in zip(x[chosen], y[chosen], strict=True))
        files.append(path)
    return files


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    files = write_skewed(tmp_path_factory.mktemp("private"))
    with LocalCluster(
        tmp_path_factory.mktemp("cluster"),
        cluster="federated",
        nodes=0,
        discovery=False,
        environment={"POTLUCK_THREADS": "1"},
    ) as running:
        for number, path in enumerate(files, 1):
            settings = tmp_path_factory.mktemp("settings") / f"node-{number}.toml"
            settings.write_text(f'[data.digits]\npath = "{path}"\ntarget = "digit"\n')
            running.add_node("--config", str(settings))
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        eventually_now(lambda: [info for info in connected.datasets() if len(info.nodes) == 2], 60)
        yield connected


def plain_data() -> tuple[Any, Any]:
    """All that the nodes hold, with the classes as the cluster counts them."""
    data = split()
    return data["x_train"], np.array([IN_ORDER.index(WORDS[label]) for label in data["y_train"]])


def softmax(learning_rate: float = 0.1) -> Any:
    import keras

    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, activation="softmax")])
    model.compile(keras.optimizers.SGD(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def test_data_that_live_on_nodes_are_listed_with_all_classes_and_no_bytes(client: Client) -> None:
    (info,) = client.datasets()
    assert (info.name, info.nodes, info.count) == ("node:digits", ("node-1", "node-2"), len(split()["x_train"]))
    assert info.classes == tuple(IN_ORDER)
    assert [[data.name for data in node.data] for node in client.nodes()] == [["digits"], ["digits"]]


@pytest.mark.parametrize("momentum", [False, True])
def test_skewed_data_on_two_nodes_teach_what_they_hold_together(client: Client, momentum: bool) -> None:
    """Also with an optimizer whose momentum remembers the node's own data, and with rounds so short that this would dominate."""
    import keras

    model = mlp()
    if momentum:
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    job = client.train(model, "node:digits", epochs=12, batch_size=16, round_seconds=0.02).wait(timeout=200)
    data = split()
    y = np.array([IN_ORDER.index(WORDS[label]) for label in data["y_test"]])
    assert job.result().classes == tuple(IN_ORDER)
    assert (job.model().predict(data["x_test"], verbose=0).argmax(axis=1) == y).mean() > 0.9
    assert len(job.history["loss"]) == 12
    assert "stay on the nodes" in job.status().progress.strategy


@pytest.mark.parametrize("clip", [{}, {"l2_norm_clip": 1e6}, {"l2_norm_clip": 1e6, "private_unit": "node"}], ids=str)
def test_whole_batches_on_each_node_are_gradient_descent_on_all_data(client: Client, clip: Any) -> None:
    """Also if gradients are computed for each item, and cut to a norm that none of them reaches."""
    x, y = plain_data()
    options: Any = {"compression": "none", "outer_momentum": 0.0, "overlap": False, **clip}
    job = client.train(softmax(), "node:digits", epochs=4, batch_size=2000, **options).wait(timeout=120)
    model = softmax()
    history = model.fit(x, y, epochs=4, batch_size=len(x), verbose=0).history
    np.testing.assert_allclose(job.history["loss"], history["loss"], rtol=1e-5)
    for ours, theirs in zip(job.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_evaluation_on_the_nodes_equals_keras(client: Client) -> None:
    x, y = plain_data()
    model = softmax()
    model.fit(x, y, epochs=3, verbose=0)
    evaluation = client.evaluate(model, "node:digits").wait(timeout=120).evaluation
    wanted = model.evaluate(x, y, verbose=0, return_dict=True)
    assert evaluation.count == len(x)
    assert evaluation.metrics["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert evaluation.metrics["accuracy"] == pytest.approx(wanted["accuracy"], abs=1e-6)
    assert [score.label for score in evaluation.classes] == IN_ORDER


def test_validation_on_the_nodes(client: Client) -> None:
    job = client.train(softmax(), "node:digits", validation="node:digits", epochs=2).wait(timeout=120)
    x, y = plain_data()
    wanted = job.model().evaluate(x, y, verbose=0, return_dict=True)
    assert job.history["val_loss"][-1] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize("unit", ["example", "node"])
def test_noise_leaves_epsilon_and_no_metrics_of_training(client: Client, unit: Any) -> None:
    import dp_accounting
    from dp_accounting import pld

    job = client.train(
        softmax(0.5),
        "node:digits",
        epochs=2,
        batch_size=32,
        l2_norm_clip=1.0,
        noise_multiplier=1.0,
        private_unit=unit,
    ).wait(timeout=200)
    assert set(job.history) & {"loss", "accuracy", "epsilon"} == {"epsilon"}
    assert not any(round.metrics for round in job.result().rounds)
    epsilons = job.history["epsilon"]
    assert epsilons[1] > epsilons[0] > 0
    # Compare with the exact accountant (privacy loss distributions) for about as many steps: Renyi's is a close upper bound.
    items = min(info.count for node in client.nodes() for info in node.data)
    noise = dp_accounting.GaussianDpEvent(1.0)
    accountant = pld.PLDAccountant()
    if unit == "example":
        accountant.compose(dp_accounting.PoissonSampledDpEvent(32 / items, noise), 2 * items // 32)
    else:
        accountant.compose(noise, len(job.result().rounds))
    exact = accountant.get_epsilon(1e-5)
    assert 0.6 * exact < epsilons[1] < 2.0 * exact
    if unit == "example":
        x, y = plain_data()
        assert job.model().evaluate(x, y, verbose=0, return_dict=True)["accuracy"] > 0.5


def recurrent() -> Any:
    """A model that reads rows of pixels as a sequence. TensorFlow cannot compute its gradients for several items side by side."""
    import keras

    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Reshape((8, 8)),
            keras.layers.LSTM(8),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def test_recurrent_models_are_trained_with_noise(client: Client) -> None:
    job = client.train(recurrent(), "node:digits", batch_size=128, l2_norm_clip=1.0, noise_multiplier=1.0).wait(
        timeout=120
    )
    assert job.history["epsilon"][0] > 0
    assert all(np.isfinite(weights).all() for weights in job.model().get_weights())


def batch_normalised() -> Any:
    import keras

    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.BatchNormalization(), keras.layers.Dense(10, activation="softmax")]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "sync"}, "use 'local' or 'auto'"),
        ({"noise_multiplier": 1.0}, "give l2_norm_clip too"),
        ({"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "delta": 0.01}, "must be well below"),
        ({"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "validation": "node:digits"}, "is not secret"),
        ({"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "monitor": "loss"}, "monitor a val_ metric"),
        ({"l2_norm_clip": -1.0}, "a number above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(client: Client, options: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        client.train(softmax(), "node:digits", **options)


def test_data_that_stay_on_nodes_cannot_be_predicted_and_their_name_must_be_exact(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="evaluate it instead"):
        client.predict(softmax(), "node:digits")
    with pytest.raises(NotFound, match="no online node has data named 'digit'"):
        client.train(softmax(), "node:digit")
    x, y = plain_data()
    with pytest.raises(InvalidRequest, match="does not"):
        client.train(softmax(), (x, y), l2_norm_clip=1.0)


def test_a_model_that_mixes_items_cannot_hide_them(client: Client) -> None:
    with pytest.raises(InvalidModel, match="use GroupNormalization or LayerNormalization"):
        client.train(batch_normalised(), "node:digits", l2_norm_clip=1.0).wait(timeout=60)
