"""The whole way from training to asking without mosquitto, and the example in `examples/`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import potluck
from potluck.client import Client
from potluck.local_cluster import LocalCluster
from support.digits import mlp, split, write_png_folder
from support.documented import shortest_way

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]

PLAIN = Path(potluck.__file__).parent / "cli" / "plain_mqtt.py"
EXAMPLE = Path(__file__).parents[2] / "examples" / "image_classification.py"


def test_everything_works_over_the_embedded_broker(tmp_path: Path) -> None:
    data = split()
    with (
        LocalCluster(tmp_path, cluster="embedded", nodes=2, discovery=False, broker="embedded") as cluster,
        Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client,
    ):
        assert "amqtt" in cluster.coordinator.log_path.read_text()
        job = client.train(mlp(), (data["x_train"], data["y_train"]), epochs=5, name="mlp").wait(timeout=200)
        assert job.history["loss"][-1] < job.history["loss"][0]
        client.deploy("mlp", replicas=2).wait(timeout=100)
        expected = job.model().predict(data["x_test"], verbose=0)
        np.testing.assert_allclose(client.infer("mlp", data["x_test"]), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            client.predict("mlp", data["x_test"]).wait(timeout=100).predictions, expected, rtol=1e-5, atol=1e-6
        )
        if shutil.which("mosquitto_sub") is not None:  # `make test` says where it is missing
            ask_as_foreigners(cluster, data["x_test"][:1], expected[:1])
        cluster.coordinator.kill()
        cluster.restart_coordinator()
        assert [info.name for info in client.models()] == ["mlp"]


def ask_as_foreigners(cluster: LocalCluster, row: Any, expected: Any) -> None:
    """The plain client and mosquitto's own, while another client is subscribed to all retained messages and telemetry.

    Without our changes, amqtt sends that client's messages to every client that connects.
    """
    broker = ("-h", cluster.broker_host, "-p", str(cluster.broker_port))
    watch = ("mosquitto_sub", *broker, "-t", f"potluck/v1/{cluster.cluster}/#", "-F", "%t")
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching:
        try:
            assert watching.stdout is not None
            assert any("telemetry" in line for line in watching.stdout)
            tensor = {"name": "x", "datatype": "FP32", "shape": list(row.shape), "data": row.ravel().tolist()}
            address = [cluster.broker_host, str(cluster.broker_port), cluster.cluster, "mlp"]
            for inputs, status in (([tensor], 0), ([tensor | {"shape": [1, 3]}], 1)):
                asked = subprocess.run(
                    [sys.executable, str(PLAIN), *address],
                    input=json.dumps({"inputs": inputs}), capture_output=True, text=True, timeout=60, check=False,
                )  # fmt: skip
                assert asked.returncode == status, asked.stdout + asked.stderr
                answer = json.loads(asked.stdout)
                assert answer["type"] == ("RequestFailed" if status else "Inferred")
                if not status:
                    np.testing.assert_allclose([answer["outputs"][0]["data"]], expected, rtol=1e-4, atol=1e-6)
            nodes, refused = shortest_way(cluster, "mlp")
            assert [node["node_id"] for node in nodes["nodes"]] == ["node-1", "node-2"]
            assert refused["error"]["code"] == "invalid_request", "the page's row has 4 numbers, the model takes 64"
            modern = ("mosquitto_rr", *broker, "-V", "mqttv5", "-W", "10", "-t", "a", "-e", "b", "-m", "c")
            asked = subprocess.run(modern, capture_output=True, text=True, timeout=20, check=False)
            assert "protocol version" in (asked.stdout + asked.stderr).lower()
        finally:
            watching.terminate()


def test_the_founding_example_runs_against_a_cluster_that_it_finds_itself(tmp_path: Path) -> None:
    train = write_png_folder(tmp_path / "train", count=60, size=128)
    test = write_png_folder(tmp_path / "test", count=20, size=128)
    with LocalCluster(tmp_path / "cluster", cluster="example", nodes=2) as cluster:
        (tmp_path / "scratch").mkdir()
        environment = os.environ | {"POTLUCK_CLUSTER": cluster.cluster, "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment["TMPDIR"] = str(tmp_path / "scratch")
        ended = subprocess.run(
            [sys.executable, str(EXAMPLE), str(train), str(test)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "epoch 10/10" in ended.stdout
    assert "accuracy" in ended.stdout
    [saved] = (tmp_path / "scratch").glob("potluck-*/model.keras")
    assert f"the trained model is in {saved}\n" in ended.stdout
    assert not list(tmp_path.glob("*.keras")), "nothing is left in the user's folder"


def test_a_node_holds_only_the_shards_that_it_trains_on(tmp_path: Path) -> None:
    data = split()
    with (
        LocalCluster(tmp_path, cluster="shards", nodes=2, discovery=False) as cluster,
        Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client,
    ):
        client.add_data({"x": data["x_train"], "y": data["y_train"]}, "digits")
        (info,) = client.datasets()
        assert info.shards >= 16
        packed = {path.name for path in (tmp_path / "coordinator" / "blobs").iterdir()}
        client.train(mlp(), "digits", epochs=3).wait(timeout=200)
        held = [{path.name for path in (tmp_path / node.name / "blobs").iterdir()} & packed for node in cluster.nodes]
    # `packed` is the shards, the manifest and the keys. No node needs the last two. Shards move when the first measured
    # speeds differ from the assumed ones, but no node ever needs all shards.
    assert len(held[0] | held[1]) == info.shards
    assert all(0 < len(shards) < info.shards for shards in held)
