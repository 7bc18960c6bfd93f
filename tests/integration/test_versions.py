"""Programs of different versions in one cluster: fabricated versions of the protocol, and the last release beside this version."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from coordinator.journal import _MIGRATIONS
from potluck.client import AsyncClient
from potluck.errors import Unavailable
from potluck.wire.births import Versions
from potluck.wire.questions import NodeInfo
from support import release
from support.brokers import TestBroker, some_kind
from support.eventually import eventually
from support.node_lab import NodeProcess

SUPPORT = Path(__file__).parents[1] / "support"
SPEAKING = str(SUPPORT / "speaking.py")
TWICE = SUPPORT / "twice.tflite"
"""Doubles two numbers a row: a small model for LiteRT, whose engine starts in half the time of TensorFlow's."""
CLUSTER = "versions"


class Running(NamedTuple):
    seed: str
    """The broker's address."""
    daemons: list[NodeProcess]


@asynccontextmanager
async def daemons(folder: Path, *commands: tuple[str, list[str], dict[str, str]]) -> AsyncIterator[Running]:
    """A broker and these daemons (name, command, environment); the first is the coordinator, which is ready."""
    broker = TestBroker(some_kind(), folder)
    await broker.start()
    seed = f"127.0.0.1:{broker.port}"
    started: list[NodeProcess] = []
    try:
        for name, command, environment in commands:
            given = ["--cluster", CLUSTER, "--seed", seed, "--no-discovery", "--port", "0"]
            given += ["--state-dir", str(folder / name), *(["--node-id", name] if name != "coordinator" else [])]
            daemon = NodeProcess(folder, [sys.executable, "-P", *command, *given])
            await daemon.start(**environment)
            started.append(daemon)
        await eventually(lambda: "coordinator ready" in started[0].log(), 30)
        yield Running(seed, started)
    except BaseException:
        print(*(daemon.log()[-3000:] for daemon in started), sep="\n---\n")
        raise
    finally:
        for daemon in started:
            await daemon.stop()
        await broker.stop()


def logs(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.glob("log-*")]


async def nodes_of(client: AsyncClient, count: int) -> dict[str, NodeInfo]:
    found: dict[str, NodeInfo] = {}
    async with asyncio.timeout(20):
        while len(found) < count:
            found = {node.node_id: node for node in await client.nodes() if node.state == "online"}
    return found


def speaking(oldest: int, newest: int, daemon: str) -> list[str]:
    return [SPEAKING, str(oldest), str(newest), daemon]


async def test_nodes_of_other_versions_of_the_protocol(tmp_path: Path) -> None:
    async with (
        daemons(
            tmp_path,
            ("coordinator", ["-m", "coordinator"], {}),
            ("same", ["-m", "node"], {}),
            ("newer", speaking(1, 2, "node"), {}),
            ("new", speaking(2, 3, "node"), {}),
        ) as (seed, _),
        AsyncClient(seed, cluster=CLUSTER) as client,
    ):
        nodes = await nodes_of(client, 3)
        assert {name: node.left_out for name, node in nodes.items()} == {
            "same": "",
            "newer": "",
            "new": "it speaks version 2 to 3 of the protocol, but the coordinator speaks 1: install the same potluck on both",
        }


async def test_a_newer_coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemons(
        tmp_path,
        ("coordinator", speaking(2, 3, "coordinator"), {}),
        ("old", ["-m", "node"], {}),
        ("between", speaking(1, 2, "node"), {}),
    ) as (seed, _):
        with pytest.raises(
            Unavailable, match="speaks version 2 to 3 of the protocol, but this program speaks version 1"
        ):
            async with AsyncClient(seed, cluster=CLUSTER):
                pass
        monkeypatch.setattr("potluck.client.connection.OURS", Versions(1, 2))
        async with AsyncClient(seed, cluster=CLUSTER) as client:
            nodes = await nodes_of(client, 2)
            assert nodes["between"].left_out == ""
            assert "it speaks version 1 of the protocol, but the coordinator speaks 2 to 3" in nodes["old"].left_out
    (log,) = [text for text in logs(tmp_path) if "node started node=old" in text]
    assert "coordinator of another protocol ignored" in log


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which Python finds the last release."""
    folder = release.unpacked(tmp_path_factory.mktemp("release"))
    environment = {"PYTHONPATH": str(folder)}
    found = subprocess.run(
        [sys.executable, "-P", "-c", "import potluck, node, coordinator; print(potluck.__file__, node.__file__, coordinator.__file__)"],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == [str(folder / name / "__init__.py") for name in ("potluck", "node", "coordinator")]
    return environment


ROWS = np.array([[1, 2], [3, 4], [5, 6]], np.float32)


async def ask(client: AsyncClient) -> None:
    np.testing.assert_array_equal(await client.infer("twice", ROWS), 2 * ROWS)


async def use(seed: str) -> str:
    """Deploy, ask and run a job; returns the job's id."""
    async with AsyncClient(seed, cluster=CLUSTER) as client:
        assert [node.left_out for node in (await nodes_of(client, 1)).values()] == [""]
        await (await client.deploy(TWICE, name="twice")).wait(timeout=60)
        await ask(client)
        job = await client.predict("twice", ROWS)
        np.testing.assert_array_equal(await (await job.wait(timeout=60)).predictions(), 2 * ROWS)
        return job.id


async def upgraded(folder: Path, old: dict[str, str]) -> None:
    """This version's node and client with the coordinator of the last release, which is then upgraded beside them."""
    async with daemons(folder, ("coordinator", ["-m", "coordinator"], old), ("node", ["-m", "node"], {})) as running:
        job_id = await use(running.seed)
        coordinator = running.daemons[0]
        await coordinator.stop()
        journal = folder / "coordinator" / "journal.sqlite"
        before = version_of(journal)
        await coordinator.start()
        await eventually(lambda: coordinator.log().count("coordinator ready") == 2, 30)
        async with AsyncClient(running.seed, cluster=CLUSTER) as client:
            await ask(client)
            job = await client.job(job_id)
            np.testing.assert_array_equal(await job.predictions(), 2 * ROWS)
            assert [model.name for model in await client.models()] == ["twice"]
        copy = journal.with_name(f"{journal.name}.v{before}")
        if before < len(_MIGRATIONS):
            assert version_of(copy) == before
        else:
            assert not copy.exists()


async def beside(folder: Path, old: dict[str, str]) -> None:
    """A node of the last release with this version's coordinator."""
    async with daemons(folder, ("coordinator", ["-m", "coordinator"], {}), ("node", ["-m", "node"], old)) as running:
        await use(running.seed)


def version_of(journal: Path) -> int:
    db = sqlite3.connect(journal)
    (found,) = db.execute("PRAGMA user_version").fetchone()
    db.close()
    return int(found)


async def test_the_last_release_works_with_this_version(tmp_path: Path, released: dict[str, str]) -> None:
    """So a cluster can be upgraded machine by machine, in any order."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(upgraded(tmp_path / "one", released))
        tasks.create_task(beside(tmp_path / "other", released))
