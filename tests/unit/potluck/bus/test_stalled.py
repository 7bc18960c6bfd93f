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


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the bus sees."""
    clock = [100.0]
    monkeypatch.setattr(mqtt, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


async def test_only_a_bus_that_does_not_try_is_stalled(now: list[float]) -> None:
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


async def test_a_long_pause_is_no_standstill(now: list[float]) -> None:
    tried = asyncio.Event()

    async def addresses() -> tuple[str, int]:
        tried.set()
        raise Unavailable("no broker")

    timings = BusTimings(reconnect_min_seconds=1000, reconnect_max_seconds=1000)
    bus = MqttBus(addresses, Topics("t"), Credentials.of("node", "n"), client_id="n", timings=timings)
    running = asyncio.create_task(bus.run())
    await tried.wait()
    now[0] += 499
    assert bus.stalled_seconds() == 0, "the next attempt is due 500 to 1000 s after the last"
    now[0] += 1000
    assert 499 <= bus.stalled_seconds() <= 999
    running.cancel()


async def test_an_attempt_may_take_as_long_as_it_is_set(now: list[float]) -> None:
    here: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue(1)
    server = await asyncio.start_server(lambda reader, writer: here.put_nowait(writer), "127.0.0.1", 0)

    async def address() -> tuple[str, int]:
        return server.sockets[0].getsockname()[:2]

    timings = BusTimings(connect_timeout_seconds=300)
    bus = MqttBus(address, Topics("t"), Credentials.of("node", "n"), client_id="n", timings=timings)
    running = asyncio.create_task(bus.run())
    writer = await here.get()
    now[0] += 300  # without an answer
    assert bus.stalled_seconds() == 0
    now[0] += 200
    assert bus.stalled_seconds() == 200
    running.cancel()
    await asyncio.wait({running})
    writer.close()
    server.close()
