"""`deploy --quantize int8` on a real cluster: convert, measure before and after, register, deploy, ask; also after a kill."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.client import Client
from potluck.errors import InvalidRequest
from potluck.local_cluster import LocalCluster
from support.digits import mlp, split
from support.eventually import eventually

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


def reader() -> Any:
    """A model of texts."""
    import keras

    words = keras.layers.TextVectorization(output_sequence_length=2, vocabulary=["red", "green"])
    layers = [keras.Input((1,), dtype="string"), words, keras.layers.Embedding(5, 3), keras.layers.Flatten()]
    return keras.Sequential(layers)


def test_a_quantized_deployment(tmp_path: Path) -> None:
    data = split()
    model = mlp()
    model.fit(data["x_train"], data["y_train"], epochs=4, verbose=0)
    with (
        LocalCluster(tmp_path / "cluster", cluster="small", nodes=1, discovery=False) as cluster,
        Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster="small") as client,
    ):
        client.register(model, "digits")
        with pytest.raises(InvalidRequest, match="the training data of digits:1 are unknown"):
            client.deploy("digits", quantize="int8")
        with pytest.raises(InvalidRequest, match="calibration is only for a model that is quantized"):
            client.deploy("digits", calibration=data["x_train"])
        client.deploy(reader(), name="reader").wait(timeout=120)  # its inputs are known from its first replica on
        with pytest.raises(InvalidRequest, match="reader:1 takes text, which a LiteRT model cannot"):
            client.deploy("reader", quantize="int8", calibration=data["x_train"])
        job = client.deploy(
            "digits",
            quantize="int8",
            calibration=(data["x_train"], data["y_train"]),
            evaluation=(data["x_test"], data["y_test"]),
        )
        asyncio.run(eventually(lambda: client.job(job.id).status().state == "running", timeout_seconds=60))
        cluster.coordinator.kill()
        cluster.restart_coordinator()
        ended = job.wait(timeout=240).result()

        assert (ended.registered, ended.deployment) == ("digits-int8:1", "digits-int8:1")
        assert ended.before is not None
        assert ended.evaluation is not None
        whole = model.evaluate(data["x_test"], data["y_test"], verbose=0, return_dict=True)["accuracy"]
        assert ended.before.count == ended.evaluation.count == len(data["x_test"])
        assert ended.before.metrics["accuracy"] == pytest.approx(whole, abs=1e-6)
        assert ended.evaluation.metrics["accuracy"] == pytest.approx(whole, abs=0.03)
        info = client.get_model("digits-int8")
        assert (info.format, info.source) == ("tflite", "digits:1, int8")
        assert info.model.size < client.get_model("digits").model.size
        change = ended.evaluation.metrics["accuracy"] - ended.before.metrics["accuracy"]
        assert info.metrics["accuracy_change"] == pytest.approx(change)

        answer = client.infer("digits-int8", data["x_test"])
        assert isinstance(answer, np.ndarray)
        hits = float((answer.argmax(axis=-1) == data["y_test"]).mean())
        assert hits == pytest.approx(ended.evaluation.metrics["accuracy"])
        assert ended.evaluated_on.startswith("arrays-")
        assert client.datasets() == (), "they were packed for the job, over its coordinator's restart too"
        measured = client.evaluate("digits-int8", (data["x_test"], data["y_test"])).wait(timeout=120).evaluation
        assert measured is not None
        assert measured.metrics["accuracy"] == pytest.approx(hits)
        predicted = client.predict("digits-int8", data["x_test"][:20]).wait(timeout=120).predictions
        np.testing.assert_array_equal(np.asarray(predicted), answer[:20])
        with pytest.raises(InvalidRequest, match="is a LiteRT model already"):
            client.deploy("digits-int8", quantize="int8")
