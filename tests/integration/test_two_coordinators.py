"""Two coordinators of one name on one network, each with a broker of its own: real daemons, found by mDNS on loopback."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from potluck import Client
from potluck.bus.mqtt import MqttBus
from potluck.client.health import examine
from potluck.credentials import Credentials
from potluck.errors import GaveWay
from potluck.lifecycle import die_with_parent
from potluck.local_cluster import LocalCluster
from potluck.settings import ClientSettings
from potluck.wire.births import CoordinatorStatus
from potluck.wire.topics import Topics
from support.brokers import TestBroker, some_kind
from support.eventually import eventually


@pytest.fixture
def name() -> str:
    return f"twice-{uuid.uuid4().hex[:8]}"


def seed(cluster: LocalCluster) -> str:
    return f"{cluster.broker_host}:{cluster.broker_port}"


def keeping_something(folder: Path, name: str) -> LocalCluster:
    """A cluster that ran alone first, and is then started again beside others."""
    cluster = LocalCluster(folder, cluster=name, nodes=0, discovery=False)
    with cluster, Client(seed(cluster), cluster=name) as client:
        client.add_data((np.zeros((4, 2), np.float32), np.zeros(4, np.int64)), "something")
    cluster.coordinator.log_path.unlink()
    cluster.coordinator.command.remove("--no-discovery")
    return cluster


async def test_the_coordinator_that_keeps_nothing_gives_way_and_its_node_goes_to_the_other(
    tmp_path: Path, name: str
) -> None:
    other = await asyncio.to_thread(keeping_something, tmp_path / "other", name)
    with LocalCluster(tmp_path / "empty", cluster=name, nodes=1) as empty:
        (node,) = empty.nodes
        with other:
            await eventually(lambda: not empty.coordinator.running, 40)
            assert empty.coordinator.wait(5) == GaveWay.exit_code
            said = empty.coordinator.log_tail()
            assert f"already has a coordinator on this network, with its broker at {seed(other)}" in said
            await eventually(lambda: f"broker={seed(other)}" in node.log_path.read_text(), 40)
            assert other.coordinator.running


async def test_two_coordinators_that_keep_something_both_warn_and_both_stay(tmp_path: Path, name: str) -> None:
    one, other = [await asyncio.to_thread(keeping_something, tmp_path / folder, name) for folder in ("one", "other")]
    with one, other:
        for here, there in ((one, other), (other, one)):

            async def told(here: LocalCluster = here, there: LocalCluster = there) -> bool:
                found = await examine(ClientSettings(cluster=name, seeds=(seed(here),)))
                return found.others == (seed(there),) and "other coordinators serve" in found.problems[0]

            await eventually(told, 40, every=0.5)
            assert "another coordinator serves" in here.coordinator.log_path.read_text()
            assert here.coordinator.running


@pytest.fixture
async def bus(tmp_path: Path, name: str) -> AsyncIterator[MqttBus]:
    """A bus on a broker that no coordinator started, such as a site's own broker."""
    broker = TestBroker(some_kind(), tmp_path)
    await broker.start()
    found = MqttBus(broker.address, Topics(name), Credentials(), client_id="test")
    running = asyncio.create_task(found.run())
    await found.connected(10)
    try:
        yield found
    finally:
        running.cancel()
        await asyncio.wait([running])
        await broker.stop()


def coordinator(folder: Path, name: str, bus: MqttBus) -> subprocess.Popen[str]:
    assert bus.address is not None
    where = ["--cluster", name, "--seed", f"127.0.0.1:{bus.address[1]}", "--no-discovery", "--port", "0"]
    command = [sys.executable, "-P", "-m", "potluck.daemons", "coordinator", *where, "--state-dir", str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=die_with_parent()
    )


GONE = CoordinatorStatus(session="gone", epoch=1, state="online", http=("http://192.0.2.1:7814",))


async def test_retained_status_of_a_dead_coordinator_does_not_keep_another_from_starting(
    tmp_path: Path, name: str, bus: MqttBus
) -> None:
    """The machine with both lost power, and the broker had stored retained messages."""
    topic = Topics(name).coordinator_status
    await bus.publish(topic, GONE, retain=True)
    online: list[str] = []
    bus.subscribe(topic, lambda envelope: online.append(envelope.message.session))  # type: ignore[attr-defined]
    process = coordinator(tmp_path / "state", name, bus)
    try:
        await eventually(lambda: set(online) - {"gone"}, 30)
    finally:
        process.terminate()
        said = (await asyncio.to_thread(process.communicate))[0]
    assert "another coordinator was on this bus, is it there?" in said
    assert process.returncode == 0


async def test_a_running_coordinator_keeps_another_from_starting(tmp_path: Path, name: str, bus: MqttBus) -> None:
    topic = Topics(name).coordinator_status
    await bus.publish(topic, GONE, retain=True)
    process = coordinator(tmp_path / "state", name, bus)
    ended = asyncio.create_task(asyncio.to_thread(process.communicate))
    while not ended.done():  # as a coordinator does
        await bus.publish(topic, GONE, retain=True)
        await asyncio.wait([ended], timeout=1.0)
    assert "has a coordinator on this bus already (http://192.0.2.1:7814)" in (await ended)[0]
    assert process.returncode == 1
