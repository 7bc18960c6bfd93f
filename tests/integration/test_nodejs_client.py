"""A client in JavaScript, written only from docs/protocol.md, with a running cluster: the protocol really is open."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.client import Client
from potluck.local_cluster import LocalCluster
from support.brokers import mosquitto_or_skip
from support.models import dense

FOLDER = Path(__file__).with_name("nodejs")
DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
CLUSTER = "garden"

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        shutil.which("node") is None or shutil.which("npm") is None,
        reason="node and npm are not installed (apt install nodejs npm): the JavaScript client was not run",
    ),
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and its packages installed, and the model that it sends."""
    folder = tmp_path_factory.mktemp("nodejs")
    for name in ("package.json", "client.mjs"):
        shutil.copy(FOLDER / name, folder)
    (folder / "documented.mjs").write_text(documented(), encoding="utf-8")
    command = ("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline")
    asyncio.run(run(folder, *command))
    dense(features=4).save(folder / "model.keras")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    mosquitto_or_skip()  # the embedded broker speaks no MQTT 5
    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(folder, cluster=CLUSTER, nodes=2, discovery=False, broker="mosquitto") as running:
        yield running


def documented() -> str:
    """The client that the documentation shows."""
    (found,) = re.findall(r"```js\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    return str(found)


async def run(folder: Path, *command: str, timeout_seconds: float = 150) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), timeout_seconds)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{' '.join(command)}:\n{errors.decode()}"
    return output.decode()


def url(cluster: LocalCluster) -> str:
    return f"mqtt://{cluster.broker_host}:{cluster.broker_port}"


def test_the_documented_client_asks_a_model_that_the_python_client_deployed(
    packages: Path, cluster: LocalCluster
) -> None:
    model = dense(features=4)
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=CLUSTER) as client:
        client.register(model, "iris")
        client.deploy("iris").wait(timeout=120)
        *nodes, scores = asyncio.run(
            run(packages, "node", "documented.mjs", url(cluster), CLUSTER, "iris")
        ).splitlines()
        client.undeploy("iris")
    assert nodes == ["node-1 online", "node-2 online"]
    expected = model.predict(np.float32([[5.1, 3.5, 1.4, 0.2]]), verbose=0)[0]
    np.testing.assert_allclose([float(score) for score in scores.split()], expected, rtol=1e-4)


@pytest.mark.parametrize("version", ["4", "5"])
def test_a_whole_client(packages: Path, cluster: LocalCluster, version: str) -> None:
    name = f"js-{version}"
    command = ("node", "client.mjs", url(cluster), CLUSTER, version, "model.keras", name)
    saw: dict[str, Any] = json.loads(asyncio.run(run(packages, *command)))
    assert saw["nodes"] == ["node-1 online", "node-2 online"]
    assert saw["range"] == "206 PK"
    assert (saw["dataset"]["name"], saw["dataset"]["count"]) == (name, 300)
    assert saw["again"] is True
    assert saw["other"].startswith("conflict: ")
    assert "running" in saw["states"]
    assert saw["trained"] == {"registered": f"{name}:1", "epochs": 4}
    assert saw["evaluation"]["count"] == 300
    assert saw["evaluation"]["accuracy"] > 0.5  # a third would be chance
    assert saw["deployed"] == f"{name}:1"
    assert saw["binary"] == saw["http"]
    np.testing.assert_allclose(saw["text"], saw["binary"], rtol=1e-6)
    assert np.argmax(saw["binary"]) == 1
    assert sum(saw["binary"]) == pytest.approx(1, abs=1e-5)
    assert saw["encodings"] == ["msgpack", "json"]
    assert saw["errors"] == [
        f"{kind} {encoding} {code}"
        for kind, code in (
            ("GetJob", "not_found"),
            ("Nonsense", "bad_message"),
            ("GetJob", "bad_message"),
            ("RegisterModel", "invalid_request"),
            ("SubmitJob", "not_found"),
            ("Infer", "invalid_request"),
            ("Infer", "not_found"),
        )
        for encoding in ("json", "msgpack")
    ]
    assert saw["undeployed"] == [f"{name}:1"]
