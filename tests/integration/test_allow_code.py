"""Code of users on a cluster: jobs and deployments go to the nodes that allow it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from potluck.client import Client
from potluck.client.models import keras_file, model_file
from potluck.errors import CodeNotAllowed, InvalidModel
from potluck.local_cluster import LocalCluster
from support.allowing import X, Y, dense, own_code
from support.eventually import eventually

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


def test_a_node_that_does_not_allow_it_is_left_out(tmp_path: Path) -> None:
    allowing = tmp_path / "allowing.toml"
    allowing.write_text('allow_code = ["own_code"]\n')
    with (
        own_code() as own,
        LocalCluster(tmp_path / "cluster", cluster="code", nodes=1, discovery=False) as cluster,
        Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster="code") as client,
    ):
        with pytest.raises(CodeNotAllowed, match=r"no node runs this model.*'Scale'"):
            client.train(dense(own.Scale()), (X, Y), epochs=2).wait(timeout=120)
        with pytest.raises(CodeNotAllowed, match="'Scale'"):
            client.deploy(dense(own.Scale()), name="scaled").wait(timeout=120)
        cluster.add_node("--config", str(allowing))
        asyncio.run(eventually(lambda: len(client.nodes()) == 2, timeout_seconds=30))
        trained = client.train(dense(own.Scale()), (X, Y), epochs=2, batch_size=8).wait(timeout=120)
        assert len(trained.history["loss"]) == 2
        assert isinstance(trained.model().layers[0], own.Scale)
        client.deploy(dense(own.Scale()), name="scaled", replicas="all").wait(timeout=120)
        (deployment,) = client.deployments()
        assert [(replica.node_id, replica.state) for replica in deployment.replicas] == [("node-2", "ready")]


def test_a_class_that_is_not_registered_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    import keras

    @keras.saving.register_keras_serializable(package="elsewhere")
    class Known(keras.layers.ReLU):  # type: ignore[misc]
        pass

    class Unknown(keras.layers.ReLU):  # type: ignore[misc]
        pass

    with pytest.raises(InvalidModel, match=r"'Unknown', which is not registered.*register_keras_serializable\(\)"):
        keras_file(dense(Known(), Unknown()), tmp_path, compiled=True)
    assert keras_file(dense(Known()), tmp_path, compiled=True).path.exists()
    Unknown.__module__ = "__main__"  # of which Keras writes no module
    with pytest.raises(InvalidModel, match="'Unknown', which is not registered"):
        model_file(dense(Unknown()), tmp_path)
    Known.__module__ = "__main__"
    assert keras_file(dense(Known()), tmp_path, compiled=True).path.exists()
