"""The registry of a real cluster: models of every format in and out, their names, and copies on two machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from potluck.client import Client
from potluck.errors import Conflict
from potluck.local_cluster import LocalCluster
from potluck.wire.questions import ModelInfo
from support.digits import mlp, split
from support.eventually import eventually_now

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(200)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "cluster", cluster="registry", nodes=2, discovery=False) as running:
        yield running


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        yield connected


def potluck(cluster: LocalCluster, *arguments: str) -> str:
    where = ("--seed", f"{cluster.broker_host}:{cluster.broker_port}", "--cluster", cluster.cluster)
    command = [sys.executable, "-m", "potluck.cli.main", *where, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.stdout if done.returncode == 0 else f"{done.returncode} {done.stderr}"


def test_a_model_from_the_command_line_and_back(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    model, rows, folder = mlp(), split()["x_test"][:3], tmp_path / "net"
    model.export(folder, verbose=False)
    added = json.loads(potluck(cluster, "models", "add", str(folder), "--labels", "a,b", "--tag", "k=v", "--json"))
    assert (added["name"], added["version"], added["format"]) == ("net", 1, "savedmodel")
    assert (added["classes"], added["tags"]) == (["a", "b"], {"k": "v"})
    assert potluck(cluster, "models", "alias", "net:1", "prod") == "net:prod is net:1\n"
    shown = potluck(cluster, "models", "show", "net:prod")
    for said in ("net:prod", "k=v", "savedmodel", "imported from net", added["model"]["sha256"]):
        assert said in shown
    potluck(cluster, "models", "export", "net:prod", "--output", str(tmp_path / "back"))
    assert client.register(tmp_path / "back", "net").version == 1, "the same bytes, so the same version"
    model.save(tmp_path / "net.h5")
    assert client.register(tmp_path / "net.h5", "net").version == 2
    for named in ("net:prod", "net:2"):
        client.deploy(named, wait=True)
        np.testing.assert_allclose(client.infer(named, rows), model.predict(rows, verbose=0), rtol=1e-5, atol=1e-6)
    assert client.undeploy("net:prod") == ("net:1",)
    refused = potluck(cluster, "models", "delete", "net:1")
    assert refused.startswith("1 potluck: model net:1 has the alias net:prod")
    assert client.remove_alias("net:prod").aliases == ()
    assert client.delete_model("net:1") == ("net:1",)
    assert client.register(folder, "net").version == 3, "the number of a version that was deleted is not given again"


def held(client: Client, model: str) -> ModelInfo:
    """The model, once a node has told that it holds a copy beside the coordinator's."""
    return eventually_now(lambda: info if len((info := client.get_model(model)).model.holders) > 1 else None, 30)


def test_a_blob_that_the_coordinator_has_lost_comes_back_from_a_node(
    cluster: LocalCluster, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "lite.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(2**20))
    for model, name in ((mlp(), "digits"), (tmp_path / "lite.tflite", "lite")):
        client.register(model, name)
    infos = [held(client, name) for name in ("digits", "lite")]
    assert len({info.model.holders[0] for info in infos}) == 2, "on the node that holds fewest bytes"
    lost, damaged = (next((cluster.folder / "coordinator").rglob(info.model.sha256)) for info in infos)
    cluster.coordinator.kill()
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[::-1])
    cluster.restart_coordinator()
    client.set_alias("digits:1", "prod")
    client.deploy("digits:prod", replicas=2).wait(timeout=100)
    assert client.infer("digits:prod", split()["x_test"][:3]).shape == (3, 10)
    eventually_now(lost.is_file, 30)
    eventually_now(lambda: damaged.is_file() and damaged.read_bytes()[:8] == b"\x1c\x00\x00\x00TFL3", 30)
    exported = client.export("digits:prod", tmp_path)
    assert exported == tmp_path / "digits-1.keras"
    assert exported.read_bytes() == lost.read_bytes()
    with pytest.raises(Conflict, match="digits:1 is deployed"):
        client.delete_model("digits")
