"""A real cluster of processes: train, evaluate, predict, deploy, ask; and clear errors."""

from __future__ import annotations

import json
import os
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
from support.pasted import pasted

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
    job = client.train(
        mlp(),
        (data["x_train"], data["y_train"]),
        validation=(data["x_test"], data["y_test"]),
        epochs=8,
        batch_size=32,
        name="mlp",
    )
    assert [info.packed for info in client.datasets()] == [True, True]
    job.messages = [progress.message for progress in job.progress()]  # type: ignore[attr-defined]
    return job.wait(timeout=200)


def potluck_at(cluster: LocalCluster, *arguments: str, **environment: str) -> str:
    """What the command line prints."""
    where = {"POTLUCK_SEEDS": f"{cluster.broker_host}:{cluster.broker_port}", "POTLUCK_CLUSTER": cluster.cluster}
    done = subprocess.run(
        [sys.executable, "-m", "potluck.cli.main", *arguments],
        env=os.environ | where | environment, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_on_two_nodes_learns(trained: Any) -> None:
    history = trained.history
    assert len(history["loss"]) == len(history["val_accuracy"]) == 8
    assert history["val_accuracy"][-1] > 0.9
    assert history["loss"][-1] < history["loss"][0] / 3


def test_the_start_of_engines_is_told(trained: Any) -> None:
    """Engines take seconds to start. Without this message, users would see nothing meanwhile."""
    assert [text for text in trained.messages if text.startswith("starting engine (TensorFlow) on node-")]


def test_data_packed_for_a_job_are_named_and_go_with_it(trained: Any, client: Client) -> None:
    [listed] = [job for job in client.jobs() if job.job_id == trained.id]
    assert (listed.state, listed.subject.name) == ("succeeded", trained.registered)
    assert listed.subject.model.startswith("sequential")
    assert listed.subject.data.startswith("arrays-")
    assert trained.result().subject == trained.status().subject == listed.subject
    assert client.datasets() == ()
    again = client.train(mlp(), (split()["x_train"], split()["y_train"]), resume=trained, epochs=9).wait(timeout=100)
    assert len(again.history["loss"]) == 1
    assert client.datasets() == ()


def test_jobs_and_what_they_made_from_the_command_line(trained: Any, cluster: LocalCluster, tmp_path: Path) -> None:
    listed = potluck_at(cluster, "jobs")
    for part in (trained.id, "succeeded", "mlp:1", trained.result().subject.data, "sequential"):
        assert part in listed, part
    potluck_at(cluster, "job", trained.id, "--output", str(tmp_path / "later.keras"))
    assert (tmp_path / "later.keras").read_bytes() == trained.model(tmp_path / "now.keras").read_bytes()
    offered = potluck_at(cluster, _POTLUCK_COMPLETE="complete_bash", COMP_WORDS="potluck job ", COMP_CWORD="2")
    assert trained.id in offered.split()
    offered = potluck_at(
        cluster, _POTLUCK_COMPLETE="complete_bash", COMP_WORDS="potluck models show ml", COMP_CWORD="3"
    )
    assert offered.split() == ["mlp", "mlp:1"]
    parts = "potluck\nmodels\nshow\nmlp\n:"  # as bash splits words at a colon
    assert potluck_at(cluster, _POTLUCK_COMPLETE="complete_bash", COMP_WORDS=parts, COMP_CWORD="4").split() == ["1"]


def test_deploy_ends_with_a_line_that_works_when_it_is_pasted(
    trained: Any, client: Client, cluster: LocalCluster, tmp_path: Path
) -> None:
    line = potluck_at(cluster, "deploy", "mlp:1").splitlines()[-1]
    assert line.startswith(f"curl {cluster.http_url}/v2/models/mlp/infer -d '")
    [output] = json.loads(pasted(line, tmp_path))["outputs"]
    expected = trained.model().predict(np.full((1, 64), 0.5), verbose=0)
    np.testing.assert_allclose(np.reshape(output["data"], (1, 10)), expected, rtol=1e-4, atol=1e-6)
    client.undeploy("mlp")


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


def test_images_from_folders(client: Client, cluster: LocalCluster, tmp_path: Path) -> None:
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
    *_, with_a_file, as_it_is = potluck_at(cluster, "deploy", "pictures").splitlines()
    (tmp_path / "picture.jpg").write_bytes(next(folder.glob("*/*.png")).read_bytes())
    for line in (with_a_file, as_it_is):
        assert json.loads(pasted(line, tmp_path))["label"] in {score.name for score in folder.iterdir()}
    client.undeploy("pictures")
    found = client.evaluate("pictures", folder).wait(timeout=100).evaluation
    assert {score.label for score in found.classes} >= {"zero", "nine"}
    assert found.count == 300


def test_errors_name_the_fault(client: Client, tmp_path: Path) -> None:
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


def test_the_reason_of_an_error_in_a_models_code_is_not_cut_off(client: Client) -> None:
    import keras

    model = mlp(compiled=False)
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=[keras.metrics.F1Score("macro")])
    data = (split()["x_train"], split()["y_train"])
    for ask in (client.train, client.evaluate):
        with pytest.raises(InvalidModel, match=r"FBetaScore expects 2D inputs .*y_true\.shape=\(\w+,\)\.$"):
            ask(model, data).wait(timeout=100)


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
