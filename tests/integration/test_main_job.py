"""The main job on a real cluster of processes: train, evaluate, predict, deploy, ask; and what goes wrong, told clearly."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import potluck
from potluck.client import Client
from potluck.errors import InvalidData, InvalidModel, InvalidRequest, NotFound
from potluck.local_cluster import LocalCluster
from support.digits import mlp, split, write_png_folder

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster"), cluster="main-job", nodes=2, discovery=False) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        yield connected


@pytest.fixture(scope="module")
def trained(client: Client) -> Any:
    data = split()
    return client.train(
        mlp(),
        (data["x_train"], data["y_train"]),
        validation=(data["x_test"], data["y_test"]),
        epochs=8,
        batch_size=32,
        name="mlp",
    ).wait(timeout=200)


def test_training_on_two_nodes_learns(trained: Any) -> None:
    history = trained.history
    assert len(history["loss"]) == len(history["val_accuracy"]) == 8
    assert history["val_accuracy"][-1] > 0.9
    assert history["loss"][-1] < history["loss"][0] / 3


def test_the_registered_model_knows_where_it_came_from(trained: Any, client: Client) -> None:
    info = client.get_model(trained.registered)
    assert (info.source, info.job_id, info.format) == (f"job {trained.id}", trained.id, "keras")
    assert info.signature is not None
    assert [spec.shape for spec in (*info.signature.inputs, *info.signature.outputs)] == [(-1, 64), (-1, 10)]
    assert {name: [value] for name, value in info.metrics.items()} == {
        name: values[-1:] for name, values in trained.history.items()
    }


def test_evaluation_equals_keras(trained: Any, client: Client) -> None:
    data = split()
    found = client.evaluate("mlp", (data["x_test"], data["y_test"])).wait(timeout=120).evaluation
    model = trained.model()
    loss, accuracy = model.evaluate(data["x_test"], data["y_test"], verbose=0)
    assert found.count == len(data["y_test"])
    assert found.metrics["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert np.sum(found.confusion) == found.count


def test_predictions_equal_keras_in_input_order(trained: Any, client: Client) -> None:
    rows = np.tile(split()["x_test"], (8, 1))
    found = client.predict("mlp", rows).wait(timeout=120).predictions
    expected = trained.model().predict(rows, verbose=0)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_deployed_model_answers_in_every_way(trained: Any, client: Client, cluster: LocalCluster) -> None:
    client.deploy("mlp:1", replicas=2).wait(timeout=120)
    row = split()["x_test"][:3]
    expected = trained.model().predict(row, verbose=0)
    np.testing.assert_allclose(client.infer("mlp", row), expected, rtol=1e-5, atol=1e-6)

    (info,) = [info for info in client.models() if info.name == "mlp"]
    assert info.signature is not None
    tensor = {"name": info.signature.inputs[0].name, "datatype": "FP32", "shape": [3, 64], "data": row.ravel().tolist()}
    request = json.dumps({"inputs": [tensor]})
    url = f"{cluster.http_url}/v2/models/mlp/infer"
    with urllib.request.urlopen(urllib.request.Request(url, request.encode()), timeout=30) as response:
        over_http = json.load(response)["outputs"][0]
    assert over_http["shape"] == [3, 10]
    np.testing.assert_allclose(np.reshape(over_http["data"], (3, 10)), expected, rtol=1e-4, atol=1e-6)

    script = Path(potluck.__file__).parent / "cli" / "plain_mqtt.py"
    address = [cluster.broker_host, str(cluster.broker_port), cluster.cluster, "mlp"]
    answer = subprocess.run(
        [sys.executable, str(script), *address], input=request, capture_output=True, text=True, timeout=60, check=True
    )
    over_mqtt = json.loads(answer.stdout)
    assert over_mqtt["type"] == "Inferred"
    np.testing.assert_allclose(np.reshape(over_mqtt["outputs"][0]["data"], (3, 10)), expected, rtol=1e-4, atol=1e-6)

    with pytest.raises(InvalidRequest, match="64"):
        client.infer("mlp", row[:, :60])
    assert client.undeploy("mlp") == ("mlp:1",)
    with pytest.raises(NotFound, match="deploy"):
        client.infer("mlp", row)


def test_images_from_folders(client: Client, tmp_path: Path) -> None:
    import keras

    folder = write_png_folder(tmp_path / "train", count=300)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    job = client.train(model, folder, epochs=3, batch_size=16, name="pictures").wait(timeout=200)
    assert job.history["loss"][-1] < job.history["loss"][0]
    flat = tmp_path / "unsorted"
    flat.mkdir()
    for file in sorted(folder.glob("*/*.png"))[:20]:
        (flat / file.name).write_bytes(file.read_bytes())
    assert client.predict("pictures", flat).wait(timeout=100).predictions.shape == (20, 10)
    found = client.evaluate("pictures", folder).wait(timeout=100).evaluation
    assert {score.label for score in found.classes} >= {"zero", "nine"}
    assert found.count == 300


def test_what_is_wrong_is_named(client: Client, tmp_path: Path) -> None:
    data = split()
    with pytest.raises(InvalidModel, match="compile"):
        client.train(mlp(compiled=False), (data["x_train"], data["y_train"]))
    with pytest.raises((InvalidData, NotFound), match="nowhere"):
        client.train(mlp(), tmp_path / "nowhere")
    with pytest.raises(NotFound, match="nothing"):
        client.deploy("nothing").wait(timeout=30)
    with pytest.raises((InvalidRequest, InvalidModel), match="60"):
        client.train(mlp(), (data["x_train"][:, :60], data["y_train"])).wait(timeout=100)
    with pytest.raises((InvalidRequest, InvalidModel), match="10"):
        client.train(mlp(), (data["x_train"], data["y_train"] + 5)).wait(timeout=100)


def test_a_cancelled_job_ends_and_the_next_one_runs(client: Client) -> None:
    data = split()
    job = client.train(mlp(), (data["x_train"], data["y_train"]), epochs=10_000)
    next(iter(job.progress()))
    job.cancel()
    with pytest.raises(potluck.errors.Cancelled):
        job.wait(timeout=30)
    assert client.evaluate(mlp_path(client), (data["x_test"], data["y_test"])).wait(timeout=60).evaluation.count > 0


def mlp_path(client: Client) -> str:
    return next(info.name for info in client.models())


def test_unknown_http_model_is_404(client: Client, cluster: LocalCluster) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.http_url}/v2/models/nothing", timeout=10)
    with refused.value as response:
        assert response.code == 404
        assert "error" in json.load(response)
