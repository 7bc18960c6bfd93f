"""A bus that tries is well, whether or not a broker answers; one that has stopped trying can be told apart."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from potluck.bus import mqtt
from potluck.bus.mqtt import MqttBus
from potluck.credentials import Credentials
from potluck.errors import Unavailable
from potluck.settings import BusTimings
from potluck.wire.topics import Topics
from support.eventually import eventually


async def test_only_a_bus_that_does_not_try_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(mqtt, "time", SimpleNamespace(monotonic=lambda: now[0]))
    tries = 0
    hanging = asyncio.Event()

    async def addresses() -> tuple[str, int]:
        nonlocal tries
        tries += 1
        if hanging.is_set():
            await asyncio.Event().wait()
        raise Unavailable("no broker")

    timings = BusTimings(reconnect_min_seconds=0.01, reconnect_max_seconds=0.01)
    bus = MqttBus(addresses, Topics("t"), Credentials.of("node", "n"), client_id="n", timings=timings)
    running = asyncio.create_task(bus.run())
    for _ in range(3):
        now[0] += 1000
        before = tries
        await eventually(lambda before=before: tries > before + 1)  # type: ignore[misc]
        assert bus.stalled_seconds() == 0.0
    hanging.set()
    before = tries
    await eventually(lambda: tries > before)
    now[0] += 300
    assert bus.stalled_seconds() == 300
    running.cancel()
