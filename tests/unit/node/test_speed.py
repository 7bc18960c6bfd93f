"""When a machine's speed is measured again, and which measurement counts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node import capacity, presence
from node.presence import Presence
from node.speed import AGREEING, WAITS_SECONDS, Speed, idle
from potluck.settings import NodeSettings
from potluck.wire.topics import Topics


def after(first: float, *found: float) -> tuple[Speed, list[bool]]:
    speed, told = Speed(first), []
    for gflops in found:
        assert speed.wait_seconds is not None
        told.append(speed.measured(gflops))
    return speed, told


def test_the_best_counts_and_only_what_is_better_is_told() -> None:
    speed, told = after(7.0, 36.7, 36.9, 12.0)
    assert (speed.gflops, told) == (36.7, [True, False, False])


def test_what_is_known_is_not_measured_for_ever() -> None:
    assert after(36.0, *[36.0] * AGREEING)[0].wait_seconds is None
    assert after(1.0, *[2.0**number for number in range(1, len(WAITS_SECONDS) + 1)])[0].wait_seconds is None
    assert after(0.0, *[0.0] * len(WAITS_SECONDS))[0].wait_seconds is None  # it cannot be measured
    assert after(0.0, 0.0, 5.0)[0].gflops == 5.0


def test_a_busy_machine_is_waited_for_as_long_again() -> None:
    speed = Speed(5.0)
    assert [speed.wait_seconds, speed.wait_seconds] == [WAITS_SECONDS[0]] * 2
    speed.measured(9.0)
    assert speed.wait_seconds == WAITS_SECONDS[1]


def test_idle_is_a_tenth_of_the_processors_at_most() -> None:
    assert idle(0.1, 4.0)
    assert not idle(1.0, 4.0)  # one of four processors worked all of the time
    assert not idle(0.0, 0.0)


def test_processors_tell_what_they_did() -> None:
    busy, whole = capacity.processor_seconds()
    assert 0 < busy < whole


async def test_a_node_measures_again_while_it_is_idle_keeps_the_best_and_then_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter(
        [(0.0, 0.0), (2.0, 2.0), (2.0, 2.0), (2.0, 4.0), (2.0, 4.0), (2.0, 6.0), *[(2.0, 6.0), (2.0, 9.0)] * 9]
    )
    found = iter([36.7, 12.0, 36.0])
    gently: list[bool] = []

    async def benchmark(threads: int = 0, *, gently: bool = False, into: list[bool] = gently) -> float:
        into.append(gently)
        return next(found)

    kept = tmp_path / "speed"
    await capacity.keep(kept, 7.0, 2)
    monkeypatch.setattr(capacity, "processor_seconds", lambda: next(readings))
    monkeypatch.setattr(capacity, "benchmark", benchmark)
    monkeypatch.setattr(presence, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr("node.speed.WAITS_SECONDS", (0.0,) * 5)
    node = Presence(NodeSettings(threads=2), Topics("c"), "n", "s", 1, "", "http")
    working = iter([False, True, False, False, False])
    bus: Any = SimpleNamespace()  # not joined yet: nothing is told
    async with asyncio.timeout(10):
        await node.measure(bus, kept, lambda: next(working))
    assert gently == [True] * 3  # twice it was not: the machine was busy, and then the node itself was
    assert node.capacity.gflops == 36.7
    assert await capacity.measure(kept, 2) == 36.7


async def test_the_lowest_priority_measures_too() -> None:
    assert await capacity.benchmark(1, gently=True) > 0.1
