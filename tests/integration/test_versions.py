"""Programs of different versions in one cluster: fabricated versions of the protocol."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from potluck.client import AsyncClient
from potluck.errors import Unavailable
from potluck.wire.births import Versions
from potluck.wire.questions import NodeInfo
from support.brokers import TestBroker, some_kind
from support.eventually import eventually
from support.node_lab import NodeProcess

SPEAKING = str(Path(__file__).parents[1] / "support" / "speaking.py")
CLUSTER = "versions"


@asynccontextmanager
async def daemons(folder: Path, *commands: tuple[str, list[str], dict[str, str]]) -> AsyncIterator[str]:
    """A broker and these daemons (name, command, environment); the first is the coordinator. Gives the broker's address when that is ready."""
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
        yield seed
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
        ) as seed,
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
    ) as seed:
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
