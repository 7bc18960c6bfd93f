"""A client in JavaScript, written from docs/protocol.md alone, against a real mosquitto: the protocol is open in fact."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from potluck.bus import MqttBus
from potluck.messages import Capacity, Evaluation, ListNodes, NodeInfo, NodesListed, SubmitJob
from potluck.topics import Topics
from support.brokers import TestBroker
from support.eventually import eventually
from support.scripted_coordinator import ScriptedCoordinator

FOLDER = Path(__file__).with_name("nodejs")
DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None,
    reason="node and npm are not installed (apt install nodejs npm): the JavaScript client was not run",
)


class Running(NamedTuple):
    coordinator: ScriptedCoordinator
    url: str


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and its packages installed."""
    folder = tmp_path_factory.mktemp("nodejs")
    for name in ("package.json", "client.mjs"):
        shutil.copy(FOLDER / name, folder)
    (folder / "documented.mjs").write_text(documented(), encoding="utf-8")
    command = ("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline")
    asyncio.run(run(folder, *command, timeout_seconds=120))
    return folder


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    mosquitto = TestBroker("mosquitto", tmp_path)
    await mosquitto.start()
    bus = MqttBus(mosquitto.address, Topics("garden"), client_id="coordinator")
    try:
        async with ScriptedCoordinator(bus, tmp_path / "store") as coordinator:
            capacity = Capacity(hostname="h", system="s", cores=2, memory_bytes=1)
            node = NodeInfo(node_id="n1", state="online", capacity=capacity)
            coordinator.answers[ListNodes] = lambda asked: NodesListed(nodes=(node,))
            yield Running(coordinator, f"mqtt://127.0.0.1:{mosquitto.port}")
    finally:
        await mosquitto.stop()


def documented() -> str:
    """The client that the documentation shows."""
    (found,) = re.findall(r"```js\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    return str(found)


async def run(folder: Path, *command: str, timeout_seconds: float = 40) -> str:
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


async def test_the_documented_client_runs_as_it_stands(packages: Path, running: Running) -> None:
    nodes, scores = (await run(packages, "node", "documented.mjs", running.url, "garden", "iris")).splitlines()
    assert nodes == "n1 online"
    assert [round(float(score), 4) for score in scores.split()] == [5.1, 3.5, 1.4, 0.2]


@pytest.mark.parametrize("version", ["4", "5"])
async def test_a_whole_client(packages: Path, running: Running, version: str) -> None:
    coordinator = running.coordinator

    async def work() -> None:
        await eventually(lambda: any(isinstance(asked, SubmitJob) for asked in coordinator.asked), 30)
        await coordinator.state("job-1", "running", done=3, total=12)
        evaluation = Evaluation(count=12, metrics={"accuracy": 0.75})
        await coordinator.end("job-1", evaluation=evaluation)

    working = asyncio.create_task(work())
    try:
        saw = json.loads(await run(packages, "node", "client.mjs", running.url, "garden", version))
    finally:
        working.cancel()
        await asyncio.wait([working])
    assert saw["put"] == 201
    assert saw["range"] == "model"
    assert saw["registered"] == 1
    assert [node["node_id"] for node in saw["nodes"]] == ["n1"]
    assert saw["state"] == {"done": 3, "total": 12}
    assert saw["result"] == {"accuracy": 0.75}
    assert saw["binary"] == saw["text"] == [5.5, -3, 1.25, 0]
    assert saw["encodings"] == ["msgpack", "json"]
    assert saw["errors"] == ["RequestFailed not_found", "RequestFailed bad_message", "RequestFailed bad_message"]
