"""Folders of texts and recordings, and Parquet tables, from client and command line through a real cluster of processes."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from potluck.client import Client
from potluck.errors import InvalidRequest, PotluckError
from potluck.local_cluster import LocalCluster
from support.digits import mlp, split
from support.recordings import audio_model, text_model, write_texts, write_tones

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]
INSECURE = {"POTLUCK_LISTEN__INSECURE": "true"}  # TensorFlow's server listens beyond loopback


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(folder, cluster="files", nodes=2, discovery=False, environment=INSECURE) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        yield connected


def invoked(cluster: LocalCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = ("--seed", f"{cluster.broker_host}:{cluster.broker_port}", "--cluster", cluster.cluster)
    command = [sys.executable, "-m", "potluck.cli.main", *where, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def potluck(cluster: LocalCluster, *arguments: str) -> str:
    done = invoked(cluster, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_validation_and_evaluation_find_classes_by_their_names(client: Client) -> None:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, use_bias=False, activation="softmax")])
    model.set_weights([9 * np.eye(3, dtype=np.float32)])  # it is right from the beginning, and learns nothing
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", metrics=["accuracy"])
    numbers = np.arange(60) % 3
    x, names = np.eye(3, dtype=np.float32)[numbers], np.array(["ant", "bee", "cat"])[numbers]
    some = numbers > 0  # no ant
    job = client.train(model, (x, names), validation=(x[some], names[some]), name="insects").wait(timeout=200)
    assert job.history["val_accuracy"] == [1.0]
    found = client.evaluate("insects", (x[some], names[some])).wait(timeout=100).evaluation
    assert [(score.label, score.support) for score in found.classes] == [("ant", 0), ("bee", 20), ("cat", 20)]
    assert (found.metrics["accuracy"], found.metrics["f1"]) == (1.0, 1.0)  # classes that do not occur are in no mean
    with pytest.raises(InvalidRequest, match="classes that model insects:1 does not know: Bee; it knows ant, bee, cat"):
        client.evaluate("insects", (x[some], np.where(names[some] == "bee", "Bee", "cat")))


@pytest.mark.parametrize("strategy", ["local", "sync"])
def test_texts_from_training_to_answers(cluster: LocalCluster, client: Client, tmp_path: Path, strategy: str) -> None:
    train, held_out = write_texts(tmp_path / "train", 256), write_texts(tmp_path / "test", 40)
    name = f"films-{strategy}"
    job = client.train(
        text_model(train),
        train,
        validation=held_out,
        epochs=4,
        strategy=strategy,
        name=name,  # type: ignore[arg-type]
    ).wait(timeout=200)
    assert job.history["val_loss"][-1] < job.history["val_loss"][0]
    model = job.model()
    files = sorted(held_out.rglob("*.txt"))
    texts = np.array([path.read_text() for path in files], object)
    expected = model.predict(np.array(texts), verbose=0)
    labels = np.array([path.parent.name == "good" for path in files], np.float32)
    found = client.evaluate(name, held_out).wait(timeout=100).evaluation
    loss, accuracy = model.evaluate(texts, labels, verbose=0)
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert found.metrics["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert {score.label for score in found.classes} == {"bad", "good"}

    flat = tmp_path / "new"
    flat.mkdir()
    for number, text in enumerate(texts):
        (flat / f"{number:02}.txt").write_text(text)
    np.testing.assert_allclose(client.predict(name, flat).wait(timeout=100).predictions, expected, atol=1e-6)

    client.deploy(name, replicas=1).wait(timeout=100)
    np.testing.assert_allclose(client.infer(name, texts[:3]), expected[:3], atol=1e-6)
    signature = client.get_model(name).signature
    assert signature is not None
    tensor = {"name": signature.inputs[0].name, "datatype": "BYTES", "shape": [3], "data": texts[:3].tolist()}
    request = urllib.request.Request(
        f"{cluster.http_url}/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        np.testing.assert_allclose(json.load(response)["outputs"][0]["data"], expected[:3, 0], atol=1e-6)
    answer = json.loads(potluck(cluster, "infer", name, str(flat / "00.txt"), "--json"))
    np.testing.assert_allclose(answer["outputs"], expected[:1], atol=1e-6)


def test_recordings_from_the_command_line(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    train, held_out = write_tones(tmp_path / "train", 120), write_tones(tmp_path / "test", 20)
    audio_model().save(tmp_path / "tones.keras")
    potluck(
        cluster, "train", str(tmp_path / "tones.keras"), str(train), "--validation", str(held_out), "--epochs", "3",
        "--name", "tones", "--output", str(tmp_path / "trained.keras"),
    )  # fmt: skip
    found = json.loads(potluck(cluster, "evaluate", "tones", str(held_out), "--json"))
    assert found["metrics"]["accuracy"] > 0.9
    potluck(cluster, "predict", "tones", str(held_out), "--output", str(tmp_path / "scores.npy"))
    scores = np.load(tmp_path / "scores.npy")
    client.deploy("tones", replicas=1).wait(timeout=100)
    first = sorted(held_out.rglob("*.wav"))[0]
    answer = json.loads(potluck(cluster, "infer", "tones", str(first), "--json"))
    np.testing.assert_allclose(answer["outputs"], scores[:1], atol=1e-6)
    other = write_tones(tmp_path / "other", 20, rate=16000)
    with pytest.raises(InvalidRequest, match=r"has 8000 samples a second, but .* 16000: resample one"):
        client.train("tones", train, validation=other)
    with pytest.raises(
        InvalidRequest, match=r"tones:1 was trained on 8000 samples a second, but .* has 16000: resample"
    ):
        client.predict("tones", other)
    with pytest.raises(InvalidRequest, match=r"trained on 8000 .* resample"):
        client.evaluate("tones", other)
    refused = invoked(cluster, "infer", "tones", str(next(other.rglob("*.wav"))))
    assert refused.returncode != 0
    assert "it has 16000 samples a second, but the model was trained on 8000" in " ".join(refused.stderr.split())


def test_a_parquet_table_gives_what_the_arrays_give(client: Client, tmp_path: Path) -> None:
    data = split()
    path = tmp_path / "digits.parquet"
    columns = {f"pixel{place}": data["x_train"][:, place] for place in range(64)}
    parquet.write_table(pa.table(columns | {"digit": data["y_train"]}), path)
    options = {"epochs": 2, "strategy": "local", "compression": "none", "batch_size": len(data["x_train"])}
    from_table = client.train(mlp(), path, target="digit", validation=path, **options).wait(timeout=200)
    from_arrays = client.train(mlp(), (data["x_train"], data["y_train"]), **options).wait(timeout=200)
    np.testing.assert_allclose(from_table.history["loss"], from_arrays.history["loss"], rtol=1e-4)
    inputs = tmp_path / "inputs.parquet"
    parquet.write_table(pa.table(columns), inputs)
    found = client.predict(from_table.model(), inputs).wait(timeout=100).predictions
    np.testing.assert_allclose(found, from_table.model().predict(data["x_train"], verbose=0), atol=1e-5)


def test_a_job_that_fails_is_told_as_json_too(cluster: LocalCluster, tmp_path: Path) -> None:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.save(tmp_path / "m.keras")
    np.savez(tmp_path / "wrong.npz", x=np.zeros((40, 3), np.float32), y=np.arange(40) % 2 + 5)
    done = invoked(cluster, "train", str(tmp_path / "m.keras"), str(tmp_path / "wrong.npz"), "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 2
    assert (told["state"], told["error"]["code"]) == ("failed", "invalid_request")
    assert told["job_id"]
    assert told["error"]["message"] in done.stderr


def test_validation_data_that_do_not_fit_end_the_job_before_its_first_epoch(client: Client) -> None:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = np.zeros((400, 3), np.float32), np.arange(400) % 2
    job = client.train(model, (x, y), validation=(x, y + 5), epochs=2000, strategy="local")
    with pytest.raises(
        PotluckError, match="in validation: the targets are classes 5 to 6, but the model's output has 2"
    ):
        job.wait(timeout=100)
    assert job.result().history == ()
