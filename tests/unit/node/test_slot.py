"""A place for an engine: a start that has begun is finished, whoever waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from node.engine.process import EngineInfo
from node.slot import EngineSlot
from potluck.errors import EngineFailed, PotluckError


class Engine:
    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.alive = False
        self.stopped = False
        self.pid = 1
        self.dead: asyncio.Future[PotluckError] = asyncio.get_running_loop().create_future()
        self.broken = False
        self.connected = False

    async def start(self) -> EngineInfo:
        try:
            await self.up.wait()
        except asyncio.CancelledError:
            self.stopped = True
            raise
        if self.broken:
            raise EngineFailed("the engine did not start")
        self.alive = True
        return EngineInfo({}, ())

    async def stop(self) -> None:
        self.alive, self.stopped = False, True

    async def wait_dead(self) -> PotluckError:
        return await asyncio.shield(self.dead)


class Bench:
    def __init__(self) -> None:
        self.made: list[Engine] = []
        self.slot = EngineSlot("test", self._make, idle_seconds=100)

    def _make(self, connected: bool) -> Any:
        self.made.append(Engine())
        self.made[-1].connected = connected
        return self.made[-1]

    async def begun(self, count: int = 1) -> Engine:
        """The engine that starts now."""
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(self.made) == count
        return self.made[-1]


async def test_who_wants_it_no_more_does_not_end_its_start() -> None:
    bench = Bench()
    first = asyncio.create_task(bench.slot.get())
    engine = await bench.begun()
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(bench.slot.get())
    await bench.begun()
    engine.up.set()
    found: Any = await second
    assert found is engine
    assert not engine.stopped
    assert await bench.slot.get() is found
    await bench.slot.stop()


async def test_to_stop_it_ends_a_start_and_tells_who_waits() -> None:
    bench = Bench()
    waiting = asyncio.create_task(bench.slot.get())
    engine = await bench.begun()
    await bench.slot.stop()
    assert engine.stopped
    with pytest.raises(EngineFailed, match="stopped"):
        await waiting


async def test_a_start_that_fails_is_told_to_all_and_tried_again_by_the_next() -> None:
    bench = Bench()
    waiting = [asyncio.create_task(bench.slot.get()) for _ in range(2)]
    engine = await bench.begun()
    engine.broken = True
    engine.up.set()
    for one in waiting:
        with pytest.raises(EngineFailed, match="did not start"):
            await one
    again = asyncio.create_task(bench.slot.get())
    (await bench.begun(2)).up.set()
    assert await again
    await bench.slot.stop()


async def test_one_on_which_nothing_has_run_is_as_good_as_a_new_one() -> None:
    bench = Bench()
    waiting = asyncio.create_task(bench.slot.get())
    engine = await bench.begun()
    await bench.slot.renew()
    engine.up.set()
    assert await waiting
    await bench.slot.renew()
    await bench.slot.retire()
    assert not engine.stopped

    async def work(engine: Any) -> None:
        await bench.slot.retire()  # it is in use: only afterwards

    await bench.slot.use(work)
    assert not engine.stopped
    await bench.slot.renew()
    assert engine.stopped


async def test_only_one_that_was_renewed_for_a_group_has_the_network() -> None:
    bench = Bench()
    waiting = asyncio.create_task(bench.slot.get())
    engine = await bench.begun()
    engine.up.set()
    await waiting
    await bench.slot.renew(connected=True)
    assert engine.stopped, "nothing has run on it, but it has no network"
    waiting = asyncio.create_task(bench.slot.get())
    member = await bench.begun(2)
    member.up.set()
    await waiting
    await bench.slot.retire()
    assert member.stopped, "nothing has run on it, but nobody else may have the network"
    waiting = asyncio.create_task(bench.slot.get())
    (await bench.begun(3)).up.set()
    await waiting
    assert [one.connected for one in bench.made] == [False, True, False]
    await bench.slot.stop()
