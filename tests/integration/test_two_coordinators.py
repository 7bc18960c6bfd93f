"""Two coordinators of one name on one network, each with a broker of its own: real daemons, found by mDNS on loopback."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import numpy as np
import pytest

from potluck import Client
from potluck.client.health import examine
from potluck.errors import GaveWay
from potluck.local_cluster import LocalCluster
from potluck.settings import ClientSettings
from support.eventually import eventually


@pytest.fixture
def name() -> str:
    return f"twice-{uuid.uuid4().hex[:8]}"


def seed(cluster: LocalCluster) -> str:
    return f"{cluster.broker_host}:{cluster.broker_port}"


def keeping_something(folder: Path, name: str) -> LocalCluster:
    """One that was alone when it ran, and is to be started again where others are."""
    cluster = LocalCluster(folder, cluster=name, nodes=0, discovery=False)
    with cluster, Client(seed(cluster), cluster=name) as client:
        client.add_data((np.zeros((4, 2), np.float32), np.zeros(4, np.int64)), "something")
    cluster.coordinator.log_path.unlink()
    cluster.coordinator.command.remove("--no-discovery")
    return cluster


async def test_the_one_that_has_kept_nothing_gives_way_and_its_node_goes_to_the_other(
    tmp_path: Path, name: str
) -> None:
    other = await asyncio.to_thread(keeping_something, tmp_path / "other", name)
    with LocalCluster(tmp_path / "empty", cluster=name, nodes=1) as empty:
        (node,) = empty.nodes
        with other:
            await eventually(lambda: not empty.coordinator.running, 40)
            assert empty.coordinator.wait(5) == GaveWay.exit_code
            said = empty.coordinator.log_tail()
            assert f"has a coordinator on this network already, with its broker at {seed(other)}" in said
            await eventually(lambda: f"broker={seed(other)}" in node.log_path.read_text(), 40)
            assert other.coordinator.running


async def test_two_that_keep_something_both_warn_and_both_stay(tmp_path: Path, name: str) -> None:
    one, other = [await asyncio.to_thread(keeping_something, tmp_path / folder, name) for folder in ("one", "other")]
    with one, other:
        for here, there in ((one, other), (other, one)):

            async def told(here: LocalCluster = here, there: LocalCluster = there) -> bool:
                found = await examine(ClientSettings(cluster=name, seeds=(seed(here),)))
                return found.others == (seed(there),) and "other coordinators serve" in found.problems[0]

            await eventually(told, 40, every=0.5)
            assert "another coordinator serves" in here.coordinator.log_path.read_text()
            assert here.coordinator.running
