"""Looking at a cluster that is broken, by way of a real broker."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from potluck.bus.mqtt import MqttBus
from potluck.client import health
from potluck.credentials import Credentials
from potluck.settings import ClientSettings
from potluck.sole_use import clock_text, sole_use
from potluck.wire.births import CoordinatorStatus, NodeStatus, NodeTelemetry
from potluck.wire.topics import Topics
from support.brokers import TestBroker, some_kind

TOPICS = Topics("lab")


@asynccontextmanager
async def broker_and_bus(folder: Path) -> AsyncIterator[tuple[ClientSettings, MqttBus]]:
    broker = TestBroker(some_kind(), folder)
    await broker.start()
    bus = MqttBus(broker.address, TOPICS, Credentials(), client_id="node")
    running = asyncio.create_task(bus.run())
    try:
        await bus.connected(10)
        yield ClientSettings(cluster="lab", seeds=(f"127.0.0.1:{broker.port}",)), bus
    finally:
        running.cancel()
        await asyncio.wait([running])
        await broker.stop()


async def test_nodes_tell_since_when_the_coordinator_is_gone(tmp_path: Path) -> None:
    lost_at = time.time() - 3600
    telemetry = NodeTelemetry(
        node_id="n1",
        session="s",
        cpu_percent=1.0,
        memory_used_bytes=1,
        memory_available_bytes=1,
        coordinator_lost_at=lost_at,
    )
    async with broker_and_bus(tmp_path) as (settings, bus):
        will = CoordinatorStatus(session="c", epoch=1, state="offline")
        await bus.publish(TOPICS.coordinator_status, will, retain=True)
        await bus.publish(
            TOPICS.node("n1", "status"), NodeStatus(node_id="n1", session="s", state="online"), retain=True
        )

        async def tell() -> None:
            while True:
                await bus.publish(TOPICS.node("n1", "telemetry"), telemetry, qos=0, encoding="json")
                await asyncio.sleep(0.2)

        telling = asyncio.create_task(tell())
        found = await health.examine(settings)
        telling.cancel()
    assert (found.broker, found.coordinator, found.waiting) == (settings.seeds[0], "offline", ("n1",))
    assert abs(found.since - lost_at) < 1
    assert f"no coordinator of cluster 'lab' is there since {clock_text(lost_at)}: start one" in found.problems[0]


async def test_a_coordinator_that_does_not_answer_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ASK_SECONDS", 0.3)
    async with broker_and_bus(tmp_path) as (settings, bus):
        online = CoordinatorStatus(session="c", epoch=1, state="online", http=("http://127.0.0.1:1",))
        await bus.publish(TOPICS.coordinator_status, online, retain=True)
        found = await health.examine(settings)
    assert found.coordinator == "silent"
    assert "the coordinator at http://127.0.0.1:1 does not answer" in found.problems[0]


async def test_a_coordinator_that_hangs_here_is_found_by_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not answer by mDNS. The broker still has its status: first `online`, and later its will."""
    monkeypatch.setattr(health, "ASK_SECONDS", 0.3)
    monkeypatch.setattr(health, "TELEMETRY_SECONDS", 0.3)
    async with broker_and_bus(tmp_path) as (settings, bus):
        with sole_use(tmp_path, "coordinator", "lab") as tell:
            unseen = ClientSettings(cluster="lab", timeout_seconds=1.0)
            assert f"coordinator (pid {os.getpid()}, cluster 'lab'" in (await health.examine(unseen)).problems[0]
            tell(settings.seeds[0])
            for state, told in (("online", "It hangs, or is very busy"), ("offline", "and hangs, unless it has just")):
                status = CoordinatorStatus(session="c", epoch=1, state=state, http=("http://127.0.0.1:1",))
                await bus.publish(TOPICS.coordinator_status, status, retain=True)
                found = await health.examine(unseen)
                assert found.broker == settings.seeds[0]
                assert told in found.problems[0]
                assert f"`kill -9 {os.getpid()}`" in found.problems[0]


async def test_a_broker_that_does_not_answer_is_named(unused_tcp_port: int) -> None:
    found = await health.examine(ClientSettings(cluster="lab", seeds=(f"127.0.0.1:{unused_tcp_port}",)))
    assert (found.broker, found.coordinator) == ("", "")
    assert "no broker answers at" in found.problems[0]
