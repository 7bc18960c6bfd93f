"""Clients that are not ours against a real cluster: tritonclient, kserve's and requests over HTTP, mosquitto's over MQTT."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.http as triton
from PIL import Image

from potluck.client import Client
from potluck.local_cluster import LocalCluster
from support.brokers import mosquitto_or_skip
from support.documented import shortest_way
from support.eventually import eventually_now
from support.models import dense

KSERVE = "kserve==0.21.0"
needs_mosquitto_clients = pytest.mark.skipif(
    shutil.which("mosquitto_rr") is None,
    reason="mosquitto's clients are not installed (apt install mosquitto-clients): they were not run",
)
ROWS = np.float32([[0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]])
pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


def pictures() -> Any:
    """A model that scores three classes by the means of an image's channels: large inputs, little to compute."""
    import keras

    return keras.Sequential(
        [keras.Input((128, 128, 3), name="image"), keras.layers.GlobalAveragePooling2D(name="scores")]
    )


def wide() -> Any:
    """A model with two small inputs and two outputs, one of them large."""
    import keras

    left, right = keras.Input((1,), name="left"), keras.Input((1,), name="right")
    many = keras.layers.Flatten(name="many")(keras.layers.RepeatVector(50_000)(left))
    total = keras.layers.Add(name="total")([left, right])
    return keras.Model({"left": left, "right": right}, {"many": many, "total": total})


class Served:
    """A cluster, and the models that are deployed on it."""

    def __init__(self, cluster: LocalCluster, client: Client, folder: Path) -> None:
        self.cluster = cluster
        self.client = client
        self.root = f"potluck/v1/{cluster.cluster}"
        self.broker = ("-h", cluster.broker_host, "-p", str(cluster.broker_port))
        self.url = cluster.http_url
        self.address = cluster.http_url.removeprefix("http://")
        self.models = {"points": dense(features=4, compiled=False), "pictures": pictures(), "wide": wide()}
        for name, model in self.models.items():
            path = folder / f"{name}.keras"
            model.save(path)
            classes = ("red", "green", "blue") if name == "pictures" else ()
            client.register(path, name, classes=classes)
            client.deploy(name, replicas=1).wait(timeout=120)
        self.inputs = {info.name: info.signature for info in client.models()}

    def expected(self, name: str, rows: Any) -> Any:
        return self.models[name].predict(rows, verbose=0)

    def input(self, name: str) -> str:
        return str(self.inputs[name].inputs[0].name)

    def output(self, name: str) -> str:
        return str(self.inputs[name].outputs[0].name)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    mosquitto_or_skip()
    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(folder / "state", cluster="foreign", nodes=1, discovery=False, broker="mosquitto") as cluster:
        with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
            yield Served(cluster, client, folder)


def asked(name: str, array: np.ndarray[Any, Any], *, binary: bool) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), "FP32")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_infers(served: Served, binary: bool, compression: str | None) -> None:
    client = triton.InferenceServerClient(served.address)
    try:
        answer = client.infer(
            "points",
            [asked(served.input("points"), ROWS, binary=binary)],
            outputs=[triton.InferRequestedOutput(served.output("points"), binary_data=binary)],
            request_id="seven",
            timeout=20_000_000,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        assert answer.get_response()["id"] == "seven"
        found = answer.as_numpy(served.output("points"))
        np.testing.assert_allclose(found, served.expected("points", ROWS), rtol=1e-4, atol=1e-6)
    finally:
        client.close()


def test_tritonclient_asks_for_everything_else(served: Served) -> None:
    client = triton.InferenceServerClient(served.address)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("points")
        assert client.is_model_ready("points", "1")
        assert not client.is_model_ready("nothing")
        assert client.get_server_metadata()["name"] == "potluck"
        metadata = client.get_model_metadata("points")
        assert metadata["inputs"] == [{"name": served.input("points"), "datatype": "FP32", "shape": [-1, 4]}]
        index = client.get_model_repository_index()
        assert {"name": "points", "version": "1", "state": "READY", "reason": ""} in index
        classes = client.infer(
            "pictures",
            [asked("image", np.full((1, 128, 128, 3), (0.5, 0.9, 0.1), np.float32), binary=True)],
            outputs=[triton.InferRequestedOutput(served.output("pictures"), class_count=2)],
        )
        best = classes.as_numpy(served.output("pictures"))[0].tolist()
        assert [text.decode().split(":")[1:] for text in best] == [["1", "green"], ["0", "red"]]
        for model, tensor, status, said in (
            ("nothing", asked("x", ROWS, binary=True), "404", "nothing"),
            ("points", asked("x", ROWS, binary=True), "400", "has the inputs"),
            ("points", asked(served.input("points"), ROWS[:, :3], binary=True), "400", "4"),
        ):
            with pytest.raises(triton.InferenceServerException, match=said) as refused:
                client.infer(model, [tensor])
            assert refused.value.status() == status
        with pytest.raises(triton.InferenceServerException, match="no version") as refused:
            client.infer("points", [asked(served.input("points"), ROWS, binary=True)], model_version="9")
        assert refused.value.status() == "404"
    finally:
        client.close()


def test_inputs_and_outputs_larger_than_a_message(served: Served) -> None:
    client = triton.InferenceServerClient(served.address)
    try:
        images = np.random.default_rng(1).random((32, 128, 128, 3), np.float32)
        answer = client.infer("pictures", [asked("image", images, binary=True)])
        found = answer.as_numpy(served.output("pictures"))
        np.testing.assert_allclose(found, images.mean(axis=(1, 2)), rtol=1e-3)
        left, right = np.float32([[1], [2], [3]]), np.float32([[10], [20], [30]])
        wide = client.infer("wide", [asked("left", left, binary=True), asked("right", right, binary=True)])
        many, total = wide.as_numpy("many"), wide.as_numpy("total")
        assert many.shape == (3, 50_000)
        assert (many == left).all()
        assert total.tolist() == [[11], [22], [33]]
    finally:
        client.close()


def test_kserve_client(served: Served, tmp_path: Path) -> None:
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), KSERVE)
    subprocess.run(install, check=True, timeout=120, capture_output=True)
    script = Path(__file__).with_name("kserve_client.py")
    command = (sys.executable, str(script), str(tmp_path), served.url, "points", served.input("points"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = served.expected("points", ROWS)
    for key in ("infer_False", "infer_True", "v1"):
        np.testing.assert_allclose(found.pop(key), expected, rtol=1e-4, atol=1e-6)
    status, said = found.pop("refused")
    assert status == 400
    assert "has the inputs" in said
    assert found == {
        "live": True, "ready": True, "model_ready": True, "unknown_ready": False, "id_False": "seven", "id_True": "seven",
        "v1_live": True, "v1_model_ready": True,
    }  # fmt: skip


def test_the_requests_library_in_every_protocol(served: Served) -> None:
    expected = served.expected("points", ROWS)
    tensor = {"name": served.input("points"), "datatype": "FP32", "shape": [2, 4], "data": ROWS.ravel().tolist()}
    answer = requests.post(f"{served.url}/v2/models/points/infer", json={"inputs": [tensor]}, timeout=30)
    np.testing.assert_allclose(np.reshape(answer.json()["outputs"][0]["data"], (2, 3)), expected, rtol=1e-4, atol=1e-6)
    answer = requests.post(f"{served.url}/v1/models/points:predict", json={"instances": ROWS.tolist()}, timeout=30)
    np.testing.assert_allclose(answer.json()["predictions"], expected, rtol=1e-4, atol=1e-6)
    answer = requests.post(f"{served.url}/models/points/infer", json=ROWS[0].tolist(), timeout=30)
    ((values,),) = answer.json()["outputs"].values()
    np.testing.assert_allclose(values, expected[0], rtol=1e-4, atol=1e-6)

    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (10, 20, 200)).save(buffer, "PNG")
    url = f"{served.url}/models/pictures/classify"
    for answer in (
        requests.post(url, data=buffer.getvalue(), headers={"Content-Type": "image/png"}, timeout=30),
        requests.post(url, files={"file": ("blue.png", buffer.getvalue(), "image/png")}, timeout=30),
    ):
        said = answer.json()
        assert said["label"] == "blue", said
        assert said["score"] == pytest.approx(200 / 255, rel=1e-4)

    both = {"inputs": {"left": [[1]], "right": [[2]]}}
    answer = requests.post(f"{served.url}/v1/models/wide:predict", json=both, timeout=30)
    assert answer.json()["outputs"]["total"] == [[3]]
    wrong = requests.post(f"{served.url}/v1/models/points:predict", json={"instances": [[1, 2]]}, timeout=30)
    assert wrong.status_code == 400
    assert "(any, 4)" in wrong.json()["error"]


def points(served: Served, **more: str) -> str:
    tensor = {"name": served.input("points"), "datatype": "FP32", "shape": [2, 4], "data": ROWS.ravel().tolist()}
    return json.dumps({"type": "Infer", "inputs": [tensor], **more})


@needs_mosquitto_clients
def test_the_shortest_way_of_the_protocol_page_works(served: Served) -> None:
    nodes, answer = shortest_way(served.cluster, "points")
    assert [node["node_id"] for node in nodes["nodes"]] == ["node-1"]
    expected = served.expected("points", np.float32([[5.1, 3.5, 1.4, 0.2]]))
    np.testing.assert_allclose([answer["outputs"][0]["data"]], expected, rtol=1e-4, atol=1e-6)


@needs_mosquitto_clients
def test_mosquitto_rr_asks_over_mqtt_5(served: Served) -> None:
    command = ("mosquitto_rr", *served.broker, "-V", "mqttv5", "-W", "20", "-e", "answers/me")
    topic = f"{served.root}/models/points/infer"
    done = subprocess.run(
        (*command, "-t", topic, "-m", points(served)), capture_output=True, text=True, timeout=30, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["type"] == "Inferred"
    found = np.reshape(answer["outputs"][0]["data"], (2, 3))
    np.testing.assert_allclose(found, served.expected("points", ROWS), rtol=1e-4, atol=1e-6)
    wrong = points(served).replace("FP32", "FP31")
    done = subprocess.run((*command, "-t", topic, "-m", wrong), capture_output=True, text=True, timeout=30, check=True)
    answer = json.loads(done.stdout)
    assert (answer["type"], answer["error"]["code"]) == ("RequestFailed", "invalid_request")


@needs_mosquitto_clients
def test_mosquitto_pub_and_sub_ask_over_mqtt_3(served: Served) -> None:
    inbox = f"{served.root}/clients/mosquitto/inbox"
    old = (*served.broker, "-V", "mqttv311", "-q", "1")
    listen = ("stdbuf", "-oL", "mosquitto_sub", *old, "-t", inbox, "-C", "1", "-W", "20", "-d")
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as listening:
        assert listening.stdout is not None
        said = iter(listening.stdout.readline, "")
        assert any("SUBACK" in line for line in said)
        question = points(served, id="q-1", reply_to=inbox)
        publish = ("mosquitto_pub", *old, "-t", f"{served.root}/models/points/infer", "-m", question)
        subprocess.run(publish, check=True, timeout=30)
        answer = next(json.loads(line) for line in said if line.startswith("{"))
        assert listening.wait(30) == 0
    assert (answer["type"], answer["id"], answer["model"]) == ("Inferred", "q-1", "points:1")
    job = json.dumps({"type": "SubmitJob", "job": {"kind": "deploy", "model": "points", "replicas": 1}})
    before = {job.job_id for job in served.client.jobs()}
    subprocess.run(("mosquitto_pub", *old, "-t", f"{served.root}/jobs/submit", "-m", job), check=True, timeout=30)
    eventually_now(lambda: any(job.job_id not in before for job in served.client.jobs()))
